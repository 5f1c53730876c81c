"""What an exception of a training step means, with torch's real exceptions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import DeviceLost, InvalidSpec, ModelError
from planner.runtime.context import memory_fraction
from planner.runtime.trial import _judge
from planner.training.oom import is_gpu_fault, is_gpu_lost, is_out_of_memory
from planner.trials import Outcome


def raised_from(error, cause):
    error.__cause__ = cause
    return error


OOM = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.cuda.OutOfMemoryError("reworded one day"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("NCCL error in: ...\nLast error:\nCuda failure 2 'out of memory'"),
    raised_from(RuntimeError("backend='inductor' raised"), torch.OutOfMemoryError("no")),
    raised_from(ValueError("my wrapper"), raised_from(KeyError("x"), torch.OutOfMemoryError("no"))),
]
FAULT = [
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("NCCL error in: ..., unhandled system error"),
]
LOST = [
    RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("CUDA error: no CUDA-capable device is detected"),
]
NEITHER = [
    ValueError("out of memory"),
    RuntimeError("This is not supported by cuDNN; memory format must be contiguous"),
    RuntimeError("shape mismatch: [2, 3] and [4]"),
    RuntimeError("triton: out of resource: shared memory, Required: 300000"),
    KeyError("labels"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OOM, ids=str)
def test_out_of_memory(error):
    assert is_out_of_memory(error)
    assert not is_gpu_fault(error)
    assert _judge(error) == (Outcome.OOM, str(error))


@pytest.mark.parametrize("error", FAULT, ids=str)
def test_a_fault_that_merely_resembles_it_is_a_failed_trial(error):
    assert is_gpu_fault(error)
    assert not is_out_of_memory(error)
    outcome, words = _judge(error)
    assert outcome is Outcome.FAILED
    assert str(error).splitlines()[0] in words


@pytest.mark.parametrize("error", LOST, ids=str)
def test_a_lost_gpu(error):
    assert is_gpu_lost(error)
    with pytest.raises(DeviceLost):
        _judge(error)


@pytest.mark.parametrize("error", NEITHER, ids=repr)
def test_neither(error):
    assert not is_out_of_memory(error)
    assert not is_gpu_fault(error)
    assert not is_gpu_lost(error)


def test_an_unrelated_error_that_was_handled_before_does_not_count():
    """``__context__`` is not ``__cause__``: user code may catch an OOM and then fail for a reason of its own."""
    error = ValueError("a bug")
    error.__context__ = torch.OutOfMemoryError("no")
    assert not is_out_of_memory(error)


def test_a_chain_in_a_circle_ends():
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)


def test_a_models_own_error_is_told_in_one_line():
    with pytest.raises(ModelError, match=r"raised ValueError: no such layer$") as caught:
        _judge(ValueError("no such layer\nwith details"))
    assert caught.value.field == "model"
    with pytest.raises(ModelError, match="SystemExit"):
        _judge(SystemExit(3))


def test_the_planners_own_errors_pass_and_host_memory_is_a_failed_trial():
    own = InvalidSpec("no checkpointing", field="variants.checkpointing")
    with pytest.raises(InvalidSpec) as caught:
        _judge(own)
    assert caught.value is own
    assert _judge(MemoryError())[0] is Outcome.FAILED


@given(total=st.integers(1 << 30, 300 << 30), data=st.data())
def test_torchs_limit_is_exactly_the_capacity(total, data):
    """As C++ computes it: ``static_cast<size_t>(fraction * total)``, in doubles."""
    capacity = data.draw(st.integers(1 << 20, total))
    fraction = memory_fraction(capacity, total)
    assert 0 < fraction <= 1
    assert math.floor(fraction * total) == capacity


def test_the_whole_card_is_no_more_than_the_whole_card():
    assert memory_fraction(200, 100) == 1.0
