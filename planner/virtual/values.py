"""Real values for the few small tensors that a model looks at.

A fake tensor has no data, but models read some: position checks, masks, packed-sequence detection, ``.item()`` on a
counter. Every tensor that follows from constants, ranges and random integers alone is therefore also computed for real
on the CPU, beside its fake. Whatever depends on a weight or an activation has no value.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map

UNKNOWN = object()
_LIMIT = 1 << 20  # elements: ample for a batch of masks, little enough to compute in passing
aten = torch.ops.aten

_FACTORIES = {
    packet
    for name in """arange zeros ones full scalar_tensor randint eye linspace tril_indices triu_indices zeros_like
    ones_like full_like new_zeros new_ones new_full randint_like randperm""".split()
    if (packet := getattr(aten, name, None)) is not None
}
# The virtual GPU assumes that no gradient overflows, so this leaves ``found_inf`` as it was: zero.
_KEEPS_VALUES = {aten._amp_foreach_non_finite_check_and_unscale_.default}


def value_of(tensor: object) -> torch.Tensor | None:
    """The tensor's real value on the CPU, or ``None`` where it is not known."""
    if isinstance(tensor, FakeTensor):
        known: torch.Tensor | None = tensor.__dict__.get("_planner_value")
        return None if known is not None and known.untyped_storage()._cdata in _overwritten else known
    if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and type(tensor) is torch.Tensor:
        return tensor
    return None


_overwritten: dict[int, weakref.ref[torch.UntypedStorage]] = {}
"""Storages of values that are not true any more: views of a tensor have values that are views of its value."""


def _forget(tensor: torch.Tensor) -> None:
    """Drop the values of ``tensor`` and of whatever shares its memory."""
    known = value_of(tensor)
    if known is not None:
        storage = known.untyped_storage()
        key = storage._cdata
        _overwritten[key] = weakref.ref(storage, lambda _: _overwritten.pop(key, None))
    set_value(tensor, None)


def set_value(tensor: torch.Tensor, value: torch.Tensor | None) -> None:
    tensor.__dict__["_planner_value"] = value


def compute_values(func: Any, args: Any, kwargs: Any) -> Any:
    """The operator's result on the CPU where every input is known and small; else ``UNKNOWN``."""
    tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
    shape_only = func._overloadpacket in _FACTORIES
    if not tensors and not shape_only:
        return UNKNOWN
    if not shape_only:
        for item in tensors:
            if item.numel() > _LIMIT or value_of(item) is None:
                return UNKNOWN

    def real(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            known = value_of(item)
            return known if known is not None else torch.empty(item.shape, dtype=item.dtype)
        if isinstance(item, torch.device):
            return torch.device("cpu")
        return item

    with unset_fake_temporarily(), torch.no_grad():
        real_args, real_kwargs = tree_map(real, args), tree_map(real, kwargs)
        if shape_only and func(*real_args, **{**real_kwargs, "device": "meta"}).numel() > _LIMIT:
            return UNKNOWN  # host memory is not the GPU's: nothing large is made here
        result = func(*real_args, **real_kwargs)
        if func._overloadpacket is aten.randint:
            _show_range(result, real_args)
        return result


def _show_range(drawn: torch.Tensor, args: Any) -> None:
    """Put the lowest and the highest value among random integers: an epoch of real data has both."""
    bounds = [item for item in args if isinstance(item, int)]  # high, or low and high; the size is a list
    low, high = (0, *bounds)[-2:]
    flat = drawn.view(-1)
    flat[:1] = low
    flat[-1:] = high - 1


def forget_mutated(func: Any, args: Any, kwargs: Any) -> None:
    """Drop the values of tensors that ``func`` writes to from unknown inputs."""
    if func in _KEEPS_VALUES or not func._schema.is_mutable:
        return
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            for item in tree_leaves(given):
                if isinstance(item, FakeTensor):
                    _forget(item)


def adopt_constants(outputs: Any) -> None:
    """Take over what FakeTensorMode itself knows of ``torch.tensor(...)``: it would run operators on it for real, on
    any device."""
    for item in tree_leaves(outputs):
        if isinstance(item, FakeTensor) and item.constant is not None:
            set_value(item, item.constant)
            item.constant = None


def attach_values(outputs: Any, values: Any) -> None:
    """Tie the real results to their fakes."""
    for fake, real in zip(tree_leaves(outputs), tree_leaves(values), strict=True):
        if isinstance(fake, FakeTensor) and isinstance(real, torch.Tensor) and real.numel() <= _LIMIT:
            set_value(fake, real)


def listed_indices(indices: Any) -> list[Any] | None:
    """``indices`` of an indexing, with masks replaced by the positions that they list; ``None`` if one is unknown.

    To be called where no recorder is active: on CUDA the positions are temporaries of the operator.
    """
    listed: list[Any] = []
    for item in indices:
        if item is None or item.dtype is not torch.bool:
            listed.append(item)
            continue
        known = value_of(item)
        if known is None:
            return None
        with unset_fake_temporarily():
            count = int(known.sum())
        listed.extend(torch.empty(count, dtype=torch.int64, device=item.device) for _ in range(known.dim()))
    return listed
