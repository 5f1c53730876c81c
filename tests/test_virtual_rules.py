"""What CUDA kernels allocate and how they are chosen: the rules, with numbers that were recorded on a GPU."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from planner.virtual.architecture import MIB, Architecture
from planner.virtual.kernels import Kernels
from planner.virtual.reductions import reduction_loops, semaphore_bytes, staging_buffer_bytes
from planner.virtual.rules import Call
from planner.virtual.trace import Formula

aten = torch.ops.aten
HOPPER = Architecture(compute_capability=(9, 0), num_sms=132, torch_version=(2, 11))
AMPERE = Architecture(compute_capability=(8, 0), num_sms=108, torch_version=(2, 11))
VOLTA = Architecture(compute_capability=(7, 0), num_sms=80, torch_version=(2, 11))


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad)


# Recorded on an H200 (tests/golden/traces): gradients of biases, bf16 autocast, batch size 4.
RECORDED_SUMS = {
    (2048, 1024): (16_777_216, 32),
    (2048, 4096): (67_108_864, 128),
    (2048, 30522): (23_440_896, 1908),
    (4096, 768): (25_165_824, 24),
    (4096, 2304): (75_497_472, 72),
    (4096, 3072): (100_663_296, 96),
}


@pytest.mark.parametrize("shape", RECORDED_SUMS)
def test_a_sum_over_rows_takes_the_recorded_buffer(shape: tuple[int, int]) -> None:
    loops = reduction_loops(_meta(*shape), (0,))
    buffer = staging_buffer_bytes(4, HOPPER.num_sms, HOPPER.threads_per_sm, loops)
    assert (buffer, semaphore_bytes(4, HOPPER.num_sms, HOPPER.threads_per_sm, loops)) == RECORDED_SUMS[shape]


@pytest.mark.parametrize(("shape", "dims"), [((8, 16), (1,)), ((100,), ()), ((1, 1024), (0,)), ((4, 3, 8), (0, 2))])
def test_a_small_reduction_takes_no_buffer(shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
    assert staging_buffer_bytes(4, 132, 2048, reduction_loops(_meta(*shape), dims)) == 0


def test_dimensions_that_lie_side_by_side_reduce_as_one() -> None:
    assert reduction_loops(_meta(4, 512, 1024), (0, 1)) == [(2048, 1024, True), (1024, 1, False)]
    assert reduction_loops(_meta(4, 8, 16).transpose(0, 1), ()) == [(512, 1, True)]


def _steps(architecture: Architecture, packet: Any, args: Any, *outputs: int, **kwargs: Any) -> list[tuple[str, int]]:
    return _sized(Kernels(architecture).layout(Call(packet, args, kwargs, outputs), "forward"))


def _sized(steps: Any) -> list[tuple[str, int]]:
    return [(kind, value.size() if isinstance(value, Formula) else value) for kind, value in steps]


@pytest.mark.parametrize(("architecture", "size"), [(HOPPER, 32 * MIB), (AMPERE, 8 * MIB + 128 * 1024)])
def test_each_thread_keeps_one_cublas_workspace(architecture: Architecture, size: int) -> None:
    kernels = Kernels(architecture)
    call = Call(aten.mm, (_meta(8, 8), _meta(8, 8)), {}, [128])
    handle = ("library", 64 * MIB)
    assert _sized(kernels.layout(call, "forward")) == [("output", 0), handle, ("kept", size)]
    assert _sized(kernels.layout(call, "forward")) == [("output", 0)]
    assert _sized(kernels.layout(call, "backward")) == [("output", 0), handle, ("kept", size)]
    biased = Call(aten.addmm, (_meta(8), _meta(8, 8), _meta(8, 8)), {}, [128])
    assert _sized(kernels.layout(biased, "forward")) == [("output", 0), ("kept", MIB)]


def test_the_gradient_of_an_embedding_sorts_more_than_3072_indices() -> None:
    def temporaries(count: int) -> list[int]:
        args = (_meta(count, 64, dtype=torch.float32), _meta(count, dtype=torch.int64), 50_257, -1, False)
        found = _steps(HOPPER, aten.embedding_dense_backward, args, 50_257 * 64 * 4)
        return [size for kind, size in found if kind == "temporary" and size]

    assert temporaries(3072) == []
    # gpt2 at 4 x 1024 tokens: the sizes of the recorded trace.
    sizes = temporaries(4096)
    assert sizes[:4] == [32_768, 32_768, 32_768, 83_455]
    assert sizes[-2:] == [8 * (409 + 4096), 4 * (409 + 4096) * 64]


def test_the_recorded_partial_sums_of_gpt2s_embedding() -> None:
    args = (_meta(4096, 768, dtype=torch.float32), _meta(4096, dtype=torch.int64), 50_257, -1, False)
    found = _steps(HOPPER, aten.embedding_dense_backward, args, 1)
    assert {36_040, 13_839_360} <= {size for _, size in found}


def test_flash_attention_backward_takes_the_queries_gradient_in_float32() -> None:
    query = _meta(2, 100, 4, 64).transpose(1, 2)
    found = _steps(AMPERE, aten._scaled_dot_product_flash_attention_backward, (query, query, query, query), 1, 2, 3)
    assert found[:3] == [("output", 0), ("output", 1), ("output", 2)]
    assert found[3:] == [("temporary", 4 * 2 * 4 * 128), ("temporary", 4 * 2 * 128 * 4 * 64)]


def test_the_mask_of_dropout_is_made_first() -> None:
    assert _steps(HOPPER, aten.native_dropout, (_meta(8), 0.1, True), 16, 8) == [("output", 1), ("output", 0)]


@pytest.mark.parametrize(
    ("packet", "args"),
    [
        (aten.sum, (_meta(4096, 768), (0,))),
        (aten.embedding_dense_backward, (_meta(4096, 64), _meta(4096, dtype=torch.int64), 50_257, -1, False)),
        (aten.convolution, (_meta(4, 3, 32, 32), _meta(8, 3, 3, 3), None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)),
    ],
)
def test_a_formula_gives_the_same_bytes_in_another_process(packet: Any, args: Any) -> None:
    steps = list(Kernels(HOPPER).layout(Call(packet, args, {}, [1]), "forward"))
    assert any(isinstance(value, Formula) for _, value in steps)
    assert _sized(pickle.loads(pickle.dumps(steps))) == _sized(steps)
