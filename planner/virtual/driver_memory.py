"""What the CUDA driver takes for itself while the kernels of a step run for the first time.

It counts to no figure of the allocator, but lies among its segments, and so decides where later ones lie.

*Measured* on an H200 (torch 2.11.0+cu130, driver 580): where 65 processes had device memory mapped
(``measurements/h200/driver.json.xz``), and in which calls. The same kinds of call took the same in all of them. Not
foretold: code for which the last piece has no room any more, one to three pieces of 2 MiB a process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from planner.units import MIB

aten = torch.ops.aten

PIECE_BYTES = 2 * MIB
"""Kernels' code comes in such pieces, and so do memory of cuDNN's handles and what is shared with the host."""
HEAP_BYTES = 10 * MIB
"""The heap of kernels that may end in an assertion: 8 MiB (``cudaLimitMallocHeapSize``) and 0.25, to the next 2 MiB."""
_PIECES_OF_CUDNN_HANDLE = 4


def _packets(names: str) -> set[Any]:
    return {packet for name in names.split() if (packet := getattr(aten, name, None)) is not None}


_LAUNCHING_NOTHING = _packets("empty empty_like empty_strided empty_permuted new_empty new_empty_strided")
_BY_CUBLAS = _packets("mm addmm bmm baddbmm addmv mv")
_BY_CUDNN = _packets(
    "convolution convolution_backward _scaled_dot_product_cudnn_attention _cudnn_rnn _cudnn_rnn_backward "
    "_scaled_dot_product_cudnn_attention_backward"
)
_ATTENTION = _packets("_scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention _safe_softmax")
_ASSERTING = _packets(
    "embedding index index_put index_put_ _index_put_impl_ index_select index_add gather scatter scatter_add "
    "nll_loss_forward nll_loss2d_forward sum mean prod any all max min amax amin argmax argmin linalg_vector_norm "
    "std var var_mean nansum"
)
"""They check indices, or are reductions, whose template asserts (``gpu_reduce_kernel``)."""
_CASTING = _packets("_to_copy copy_ add sub mul div pow where maximum minimum")
_READING = _packets("_local_scalar_dense item is_nonzero nonzero masked_select")


class DriverMemory:
    """Of one process: what the driver took already."""

    def __init__(self) -> None:
        self._handles: set[tuple[str, str]] = set()
        self._waits_for = {"kernel", "heap", "value", "layer"}

    def of_handles(self, packet: Any, thread: str) -> Iterator[int]:
        """Bytes, one piece after another, taken where ``thread`` first calls the library that ``packet`` calls."""
        library = "cublas" if packet in _BY_CUBLAS else "cudnn" if packet in _BY_CUDNN else None
        if library is None or (library, thread) in self._handles:
            return
        is_first_of_all = not self._handles
        is_first = not any(known == library for known, _ in self._handles)
        self._handles.add((library, thread))
        if library == "cudnn":
            yield from [PIECE_BYTES] * _PIECES_OF_CUDNN_HANDLE
        if is_first_of_all:  # cuDNN's handle has one of cuBLAS's
            yield PIECE_BYTES
        if library == "cudnn" and is_first:
            yield from self._once("layer")

    def of_launch(self, packet: Any, args: Any, outputs: Any) -> Iterator[int]:
        """Bytes, one piece after another, taken where the kernel of ``packet`` is launched."""
        if not self._waits_for or packet in _LAUNCHING_NOTHING:
            return
        yield from self._once("kernel")
        if packet in _READING:
            yield from self._once("value")
        if packet in _ASSERTING or (packet in _CASTING and _casts(packet, args, outputs)):
            yield from self._once("heap", HEAP_BYTES)
        if packet in _ATTENTION and self._handles:
            yield from self._once("layer")

    def _once(self, what: str, size: int = PIECE_BYTES) -> Iterator[int]:
        if what in self._waits_for:
            self._waits_for.remove(what)
            yield size


def _casts(packet: Any, args: Any, outputs: Any) -> bool:
    """Whether values are cast as they are read or written, with an assertion that their dtypes are known
    (``fetch_and_cast``, c10/core/DynamicCast.h). Float32 is cast to halves by a kernel without."""
    tensors = [item for item in (*args, outputs) if isinstance(item, torch.Tensor)]
    dtypes = [item.dtype for item in tensors]
    if packet is aten._to_copy and dtypes[0] is torch.float32 and dtypes[-1] in (torch.float16, torch.bfloat16):
        return False
    return len({*dtypes}) > 1
