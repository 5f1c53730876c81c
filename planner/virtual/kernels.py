"""What CUDA kernels allocate beside the tensors that they return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from planner.virtual.reductions import staging

aten = torch.ops.aten
MIB = 1 << 20

Step = tuple[str, int]


class Kernels:
    def __init__(self, compute_capability: tuple[int, int] = (9, 0)) -> None:
        self.compute_capability = compute_capability
        self._handles: set[str] = set()

    def writes_in_place(self, func: Any, args: Any) -> bool:
        return False

    def layout(self, func: Any, args: Any, kwargs: Any, outputs: Any, sizes: list[int], thread: str) -> Iterator[Step]:
        packet = func._overloadpacket
        order = range(len(sizes))
        if packet is aten.native_dropout:
            order = reversed(order)
        if packet is aten._scaled_dot_product_flash_attention:
            for i in (2, 3, 0, 1):
                if i < len(sizes) and sizes[i]:
                    yield ("output", i)
            for i in range(4, len(sizes)):
                yield ("output", i)
            yield ("temporary", 256)
            return
        if packet is aten.embedding and not args[1].is_contiguous():
            yield ("temporary", args[1].numel() * args[1].element_size())
        for i in order:
            yield ("output", i)
        if packet is aten.embedding_dense_backward and not args[1].is_contiguous():
            yield ("temporary", args[1].numel() * args[1].element_size())
        if packet is aten.sum and isinstance(args[0], torch.Tensor):
            dims = args[1] if len(args) > 1 and args[1] else ()
            needed = staging(args[0], tuple(dims), accumulator_bytes=4, num_sms=132, threads_per_sm=2048)
            if needed.buffer_bytes:
                yield ("temporary", needed.buffer_bytes)
                yield ("temporary", needed.semaphore_bytes)
        if packet in GEMMS and thread not in self._handles:
            self._handles.add(thread)
            yield ("kept", 32 * MIB)
        if packet is aten.addmm and "lt" not in self._handles:
            self._handles.add("lt")
            yield ("kept", MIB)
        if packet is aten._scaled_dot_product_flash_attention_backward:
            q = args[1]; b,h,n,d = q.shape
            yield ("temporary", b*h*n*d*4 + b*h*n*4 + 256)


GEMMS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
