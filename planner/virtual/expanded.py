"""Values that do not change along some of their dimensions, kept without them: a mask of ``[batch, 1, length, length]``
elements that hides padding alone has ``batch * length`` of them.

Such a value is a view with a stride of 0 along these dimensions, as ``torch.Tensor.expand`` makes it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

aten = torch.ops.aten
_COPYING = {aten._to_copy.default, aten.clone.default}
_LOOKED_AT = 1 << 16
"""Elements up to which a value is compared along each dimension."""
_shared: dict[int, weakref.ref[torch.UntypedStorage]] = {}
"""Storages in which one element stands for several of what it is the value of."""


def is_elementwise(func: Any) -> bool:
    """Whether each element of ``func``'s only result follows from those at its place."""
    return (torch.Tag.pointwise in func.tags or func in _COPYING) and not func._schema.is_mutable


def num_stored(value: torch.Tensor) -> int:
    """Elements that ``value`` has of its own."""
    count = 1
    for size, stride in zip(value.shape, value.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def is_shared(value: torch.Tensor) -> bool:
    """Whether an element in the memory of ``value`` stands for several."""
    return value.untyped_storage()._cdata in _shared


def computed(func: Any, most: int, *args: Any, **kwargs: Any) -> Any:
    """``func(*args, **kwargs)`` of an elementwise operator; a result of more than ``most`` elements without the
    dimensions along which no argument changes."""
    tensors = [item for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor)]
    shape = torch.broadcast_shapes(*(item.shape for item in tensors))  # type: ignore[no-untyped-call]
    if shape.numel() <= most:
        return func(*args, **kwargs)
    result = func(*map(_collapsed, args), **{name: _collapsed(item) for name, item in kwargs.items()})
    if not isinstance(result, torch.Tensor) or result.shape == shape:
        return result
    storage = result.untyped_storage()
    key = storage._cdata
    _shared[key] = weakref.ref(storage, lambda _: _shared.pop(key, None))
    return result.expand(shape)


def _collapsed(item: Any) -> Any:
    """A value with one element along each dimension where it does not change."""
    if not isinstance(item, torch.Tensor):
        return item
    for dim in range(item.dim()):
        if item.shape[dim] > 1:
            first = item.narrow(dim, 0, 1)
            if item.stride(dim) == 0 or (item.numel() <= _LOOKED_AT and bool((item == first).all())):
                item = first
    return item
