"""What the recorder has to know of an operator itself, looked up once: dispatch is asked tens of thousands of times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from planner.virtual.backend import kernels_beside_decompositions
from planner.virtual.kernels import has_handles, is_modelled
from planner.virtual.values import fills, is_factory

aten = torch.ops.aten

_READS = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default}
_ADDS_TO_ZEROS = {
    aten.index_put.default,
    aten.index_add.default,
    aten.scatter_add.default,
    aten.scatter.src,
}
_LAUNCHES_NOTHING = {
    packet
    for name in "empty empty_like empty_strided new_empty new_empty_strided randn randint normal_ random_".split()
    if (packet := getattr(aten, name, None)) is not None
}
_COPIES = {aten._to_copy.default, aten.detach.default, aten.unsqueeze.default}


@dataclass(frozen=True, slots=True)
class Operator:
    """One overload of an operator."""

    func: Any
    packet: Any
    name: str
    """With its namespace: ``aten::add``."""
    is_question: bool
    """Of a tensor's metadata: no work."""
    is_composite: bool
    """CUDA runs it as its parts."""
    writes_lists: bool
    """An optimizer's kernel that writes into lists of tensors, allocates nothing and returns nothing."""
    takes_lists: bool
    """Any kernel of that family: no size follows from a number that it is given."""
    reads: bool
    """It tells the value of a tensor."""
    is_mutable: bool
    is_modelled: bool
    has_handles: bool
    """It calls libraries that keep a workspace for each thread."""
    is_factory: bool
    """It makes values that follow from no other tensor's."""
    fills: bool
    """Zeros or ones."""
    copies: bool
    """Of known values it makes known ones, in a layout that follows from its argument's."""
    is_pointwise: bool
    adds_to_zeros: bool
    """Backward passes make zeros and put a gradient into them with it."""
    launches: bool
    """Its kernel has the driver free what it set aside at its start, where it is the first. Those that draw random
    numbers do not (traces of resnet50, resnext50 and eva02)."""

    @classmethod
    def of(cls, func: Any) -> Operator:
        found = _known.get(id(func))
        if found is None:
            schema = func._schema
            takes_lists = schema.name.startswith("aten::_foreach_")
            found = _known[id(func)] = cls(
                func=func,
                packet=func._overloadpacket,
                name=schema.name,
                is_question=func.namespace == "prim",
                is_composite=_is_composite(func),
                writes_lists=takes_lists and not schema.returns,
                takes_lists=takes_lists,
                reads=func in _READS,
                is_mutable=schema.is_mutable,
                is_modelled=is_modelled(func._overloadpacket),
                has_handles=has_handles(func._overloadpacket),
                is_factory=is_factory(func),
                fills=fills(func),
                copies=func in _COPIES,
                is_pointwise=torch.Tag.pointwise in func.tags,
                adds_to_zeros=func in _ADDS_TO_ZEROS,
                launches=not func.is_view and func._overloadpacket not in _LAUNCHES_NOTHING,
            )
        return found


_known: dict[int, Operator] = {}
"""By the overload's id, which it keeps since it is kept: hashing one runs Python."""


def _is_composite(func: Any) -> bool:
    """Whether CUDA runs ``func`` as its parts; ``silu_backward`` has a decomposition too, but a kernel before it."""
    return (
        func.namespace == "aten"
        and func not in _READS
        and bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))
        and func.name() not in kernels_beside_decompositions()
    )
