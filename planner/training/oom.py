"""What an exception of a training step means: out of memory, a fault of the GPU's libraries, a lost GPU, or none.

The one place that decides what is an OOM. Types decide first; of texts only those count that a library prints for
exactly one status, so that an error that merely resembles one ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED") is never
taken for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_CUDA_ERROR_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation, driver_types.h
_OUT_OF_MEMORY_TEXTS = (
    "CUDA out of memory",  # c10/cuda/CUDACachingAllocator.cpp, where an extension re-raised it as a RuntimeError
    "CUDA error: out of memory",  # cudaGetErrorString(cudaErrorMemoryAllocation), for memory outside the allocator
    "CUBLAS_STATUS_ALLOC_FAILED",  # aten/src/ATen/cuda/Exceptions.cpp, as are the next three
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",  # cuDNN 9, cudnn_graph.h
    "Cuda failure 2 'out of memory'",  # nccl/src/include/checks.h, CUDACHECK
    "Cuda failure 'out of memory'",  # the same before NCCL 2.19
)
# What a library says for want of memory among other reasons. *Measured* on a full H200 (torch 2.11.0+cu130): cuDNN
# answers CUDNN_STATUS_INTERNAL_ERROR, cuSOLVER's cusolverDnCreate CUSOLVER_STATUS_INTERNAL_ERROR, cuFFT
# CUFFT_INTERNAL_ERROR. Where the allocator refuses a convolution every workspace, none of its plans runs and the last
# words are "unable to find an engine" (aten/src/ATen/native/cudnn/Conv_v8.cpp, run_single_conv catches each refusal).
_UNCERTAIN_TEXTS = (
    "CUDNN_STATUS_INTERNAL_ERROR", "CUDNN_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_NOT_SUPPORTED",
    "CUBLAS_STATUS_INTERNAL_ERROR", "CUBLAS_STATUS_NOT_INITIALIZED", "CUBLAS_STATUS_NOT_SUPPORTED",
    "CUSOLVER_STATUS_INTERNAL_ERROR", "CUSOLVER_STATUS_NOT_INITIALIZED", "CUSPARSE_STATUS_INTERNAL_ERROR",
    "CUSPARSE_STATUS_NOT_INITIALIZED", "CUSPARSE_STATUS_INSUFFICIENT_RESOURCES", "CUFFT_INTERNAL_ERROR",
    "CUFFT_ALLOC_FAILED", "unable to find an engine to execute this computation",
)  # fmt: skip
_FAULT_TEXTS = (
    "CUDA error:", "cuDNN error:", "CUBLAS_STATUS_", "CUDNN_STATUS_", "CUSPARSE_STATUS_", "CUSOLVER_STATUS_",
    "CUFFT_", "NCCL error", "CUDA driver error:", "NVML_", "unable to find an engine to execute this computation",
)  # fmt: skip
# cudaGetErrorString of cudaErrorDevicesUnavailable, cudaErrorECCUncorrectable, cudaErrorNoDevice and
# cudaErrorDeviceUninitialized, and NVML's own words: no trial can run after one of these.
_LOST_TEXTS = (
    "CUDA-capable device(s) is/are busy or unavailable",
    "uncorrectable ECC error encountered",
    "no CUDA-capable device is detected",
    "GPU is lost",
    "fallen off the bus",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU ran out of memory, in the caching allocator or in a library beside it.

    An exception that was raised ``from`` such an error (a wrapper of the user's or of torch.compile) is one too; one of
    the host (``MemoryError``) is not.
    """
    return any(
        isinstance(link, torch.OutOfMemoryError)
        or getattr(link, "error_code", None) == _CUDA_ERROR_MEMORY_ALLOCATION
        or (isinstance(link, RuntimeError) and _says(link, _OUT_OF_MEMORY_TEXTS))
        for link in _chain(error)
    )


def may_be_out_of_memory(error: BaseException) -> bool:
    """Whether a library of the GPU failed in a way that want of memory is one cause of: only what the allocator and the
    device counted in that step can tell."""
    return any(isinstance(link, RuntimeError) and _says(link, _UNCERTAIN_TEXTS) for link in _chain(error))


def is_gpu_fault(error: BaseException) -> bool:
    """Whether CUDA or one of its libraries failed for another reason than memory: it says nothing about the model."""
    kinds = (getattr(torch, "AcceleratorError", torch.OutOfMemoryError),)
    return not is_out_of_memory(error) and any(
        isinstance(link, kinds) or (isinstance(link, RuntimeError) and _says(link, _FAULT_TEXTS))
        for link in _chain(error)
    )


def is_gpu_lost(error: BaseException) -> bool:
    """Whether the GPU itself is gone or unusable."""
    return any(isinstance(link, RuntimeError) and _says(link, _LOST_TEXTS) for link in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__


def _says(error: BaseException, texts: tuple[str, ...]) -> bool:
    message = str(error)
    return any(text in message for text in texts)
