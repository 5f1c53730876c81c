"""What an exception of a training step means, with torch's real exceptions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import DeviceLost, InvalidSpec, ModelError
from planner.runtime.context import memory_fraction
from planner.runtime.trial import _judge
from planner.training.oom import is_gpu_fault, is_gpu_lost, is_out_of_memory, may_be_out_of_memory
from planner.trials import Outcome


def judge(error, is_short=lambda: False):
    return _judge(error, is_short)


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
    assert judge(error) == (Outcome.OOM, str(error))


@pytest.mark.parametrize("error", FAULT, ids=str)
def test_a_fault_that_merely_resembles_it_is_a_failed_trial(error):
    assert is_gpu_fault(error)
    assert not is_out_of_memory(error)
    outcome, words = judge(error)
    assert outcome is Outcome.FAILED
    assert str(error).splitlines()[0] in words


# Measured on an H200 whose memory was full (torch 2.11.0+cu130): 4 to 10 MiB free, the allocator without a limit.
FULL_DEVICE = [
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError(
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`. If you keep"
    ),
    RuntimeError("cuFFT error: CUFFT_INTERNAL_ERROR"),
    NotImplementedError("GET was unable to find an engine to execute this computation"),
]


@pytest.mark.parametrize("error", FULL_DEVICE, ids=str)
def test_a_librarys_status_is_memory_only_where_memory_was_short(error):
    """The last one is what a T4 answers to bfloat16 convolutions too, with all of its memory free."""
    assert may_be_out_of_memory(error)
    assert not is_out_of_memory(error)
    assert judge(error, lambda: True) == (Outcome.OOM, str(error))
    assert judge(error)[0] is Outcome.FAILED


def test_a_fault_stays_a_fault_where_memory_was_short():
    for error in FAULT[1:]:
        assert not may_be_out_of_memory(error)
        assert judge(error, lambda: True)[0] is Outcome.FAILED


@pytest.mark.parametrize("error", LOST, ids=str)
def test_a_lost_gpu(error):
    assert is_gpu_lost(error)
    with pytest.raises(DeviceLost):
        judge(error)


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
        judge(ValueError("no such layer\nwith details"))
    assert caught.value.field == "model"
    with pytest.raises(ModelError, match="SystemExit"):
        judge(SystemExit(3))


def test_the_planners_own_errors_pass_and_host_memory_is_a_failed_trial():
    own = InvalidSpec("no checkpointing", field="variants.checkpointing")
    with pytest.raises(InvalidSpec) as caught:
        judge(own)
    assert caught.value is own
    assert judge(MemoryError())[0] is Outcome.FAILED


@given(total=st.integers(1 << 30, 300 << 30), data=st.data())
def test_torchs_limit_is_exactly_the_capacity(total, data):
    """As C++ computes it: ``static_cast<size_t>(fraction * total)``, in doubles."""
    capacity = data.draw(st.integers(1 << 20, total))
    fraction = memory_fraction(capacity, total)
    assert 0 < fraction <= 1
    assert math.floor(fraction * total) == capacity


def test_the_whole_card_is_no_more_than_the_whole_card():
    assert memory_fraction(200, 100) == 1.0
