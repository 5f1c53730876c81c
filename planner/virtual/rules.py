"""The form that rules about CUDA's kernels have: one for each operator that allocates more than it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planner.virtual.architecture import Architecture
from planner.virtual.trace import Formula

aten = torch.ops.aten

Step = tuple[str, int | Formula]
"""``("output", i)``: the i-th new storage that the operator returns; ``("temporary", bytes)``: freed when the operator
ends, last first; ``("workspace", bytes)``: a temporary that the kernel can do without, should it be refused; ``("kept",
bytes)``: for the life of the process; ``("free", i)``: the newest temporary but ``i`` is freed now; ``("size",
bytes)``: the storage of the next output is so large, whatever its shape; ``("doubt", bytes)``: nothing is allocated,
but the call may take up to so much more or less; ``("library", bytes)``: a library takes them from the driver
itself. An output that no step names is in host memory."""


@dataclass(frozen=True, slots=True)
class Call:
    """One operator call as the recorder sees it: fake tensors in and out. A rule must keep none of them."""

    packet: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    sizes: Sequence[int]
    """Bytes of each new storage among the results, in order."""


Rule = Callable[[Call, Architecture], Iterator[Step]]
RULES: dict[Any, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Declare the decorated function as the rule of the ``aten`` operators ``names``."""

    def register(function: Rule) -> Rule:
        for name in names:
            packet = getattr(aten, name, None)
            if packet is not None:  # an operator that this version of torch lacks is never called
                RULES[packet] = function
        return function

    return register


def outputs(call: Call) -> Iterator[Step]:
    """What an operator returns and nothing else."""
    for index in range(len(call.sizes)):
        yield "output", index


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of its elements, contiguous."""
    return tensor.numel() * tensor.element_size()


def copies(items: Sequence[Any]) -> Iterator[Step]:
    """Copies of those tensors that are not contiguous."""
    for item in items:
        if isinstance(item, torch.Tensor) and not item.is_contiguous():
            yield "temporary", bytes_of(item)
