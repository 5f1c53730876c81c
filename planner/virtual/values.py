"""Real values for the few small tensors that a model looks at.

A fake tensor has no data, but models read some: position checks, masks, packed-sequence detection, ``.item()`` on a
counter. Every tensor that follows from constants, ranges and random integers alone is therefore also computed for real
on the CPU, beside its fake. Whatever depends on a weight or an activation has no value.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map

from planner.virtual import expanded

UNKNOWN = object()
_LIMIT = 1 << 20  # elements: ample for a batch of masks, little enough to compute in passing
_TABLE_LIMIT = 1 << 23
"""The same for whole numbers and truth values by sample and position: a model reads the padding mask of any batch."""
MAX_ASSUMED = 1 << 25
"""The same for what follows from an assumed value (``planner.virtual.assumptions``): a router's choice for each token
and expert."""
aten = torch.ops.aten

_FACTORIES = {
    packet
    for name in """arange zeros ones full scalar_tensor randint eye linspace tril_indices triu_indices zeros_like
    ones_like full_like new_zeros new_ones new_full randint_like randperm""".split()
    if (packet := getattr(aten, name, None)) is not None
}
_FILLED = {aten.zeros: 0, aten.zeros_like: 0, aten.new_zeros: 0, aten.ones: 1, aten.ones_like: 1, aten.new_ones: 1}
# The virtual GPU assumes that no gradient overflows, so this leaves ``found_inf`` as it was: zero.
_KEEPS_VALUES = {aten._amp_foreach_non_finite_check_and_unscale_.default}


@dataclass(frozen=True, slots=True)
class Filled:
    """The value of a tensor whose elements are all the same ``number``: made when it is first looked at.

    An optimizer's state begins as zeros, as large as small layers are, that nobody looks at.
    """

    number: complex
    shape: torch.Size
    dtype: torch.dtype

    def made(self) -> torch.Tensor:
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            return torch.full(self.shape, self.number, dtype=self.dtype, device="cpu")


def tensors_of(given: object) -> Iterator[torch.Tensor]:
    """The tensors among an operator's arguments or results: alone, or in lists and dictionaries of any depth."""
    if isinstance(given, torch.Tensor):
        yield given
    elif isinstance(given, (tuple, list)):
        for item in given:
            yield from tensors_of(item)
    elif isinstance(given, dict):
        yield from tensors_of(list(given.values()))


def value_of(tensor: object) -> torch.Tensor | None:
    """The tensor's real value on the CPU, or ``None`` where it is not known."""
    if isinstance(tensor, FakeTensor):
        known: torch.Tensor | Filled | None = tensor.__dict__.get("_planner_value")
        if isinstance(known, Filled):
            known = tensor.__dict__["_planner_value"] = known.made()
        return None if known is not None and known.untyped_storage()._cdata in _overwritten else known
    if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and type(tensor) is torch.Tensor:
        return tensor
    return None


def is_filled(tensor: object) -> bool:
    return isinstance(tensor, FakeTensor) and isinstance(tensor.__dict__.get("_planner_value"), Filled)


def mark_assumed(tensor: FakeTensor) -> None:
    """Its value, and whatever shares memory with it, is an assumption."""
    known = value_of(tensor)
    if known is not None:
        storage = known.untyped_storage()
        key = storage._cdata
        _assumed[key] = weakref.ref(storage, lambda _: _assumed.pop(key, None))


def is_assumed(*arguments: Any) -> bool:
    """Whether any tensor among ``arguments`` has a value that follows from an assumption."""
    if not _assumed:
        return False
    known = (value_of(item) for item in tensors_of(arguments) if isinstance(item, FakeTensor) and not is_filled(item))
    return any(value is not None and value.untyped_storage()._cdata in _assumed for value in known)


def range_of(tensor: object) -> tuple[int, int] | None:
    """The least and the greatest value of an integer tensor that is too large for its values to be kept; ``None`` where
    they are not known."""
    return tensor.__dict__.get("_planner_range") if isinstance(tensor, FakeTensor) else None


_assumed: dict[int, weakref.ref[torch.UntypedStorage]] = {}
"""Storages of values that follow from an assumption."""
_overwritten: dict[int, weakref.ref[torch.UntypedStorage]] = {}
"""Storages of values that are not true any more: views of a tensor have values that are views of its value."""


def _forget(tensor: torch.Tensor) -> None:
    """Drop the values of ``tensor`` and of whatever shares its memory."""
    known = None if is_filled(tensor) else value_of(tensor)
    if known is not None:
        storage = known.untyped_storage()
        key = storage._cdata
        _overwritten[key] = weakref.ref(storage, lambda _: _overwritten.pop(key, None))
    set_value(tensor, None)


def set_value(tensor: torch.Tensor, value: torch.Tensor | Filled | None) -> None:
    tensor.__dict__["_planner_value"] = value


def is_factory(func: Any) -> bool:
    """Whether it makes a tensor of values that follow from no other tensor's."""
    return func._overloadpacket in _FACTORIES


def fills(func: Any) -> bool:
    """Whether it makes a tensor of equal elements."""
    return func._overloadpacket in _FILLED


def _limit(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Elements up to which the value of a tensor like this is kept."""
    return _TABLE_LIMIT if len(shape) <= 2 and not (dtype.is_floating_point or dtype.is_complex) else _LIMIT


def _made_limit(func: Any, shape: Sequence[int], dtype: torch.dtype) -> int:
    """The same for what a factory makes."""
    # Zeros of whole numbers: ``one_hot`` makes them, and marks in them what a router chose.
    return _LARGE_ZEROS if func._overloadpacket is aten.zeros and dtype is torch.int64 else _limit(shape, dtype)


def _filled(func: Any, args: Any, kwargs: Any) -> Filled | None:
    """What a factory of equal elements makes, ``None`` where that is not plainly a contiguous tensor."""
    number, like = _FILLED.get(func._overloadpacket), args[0]
    if number is None or set(kwargs) - {"dtype", "device", "pin_memory", "memory_format", "layout"}:
        return None
    if kwargs.get("layout") not in (None, torch.strided):
        return None
    if kwargs.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format):
        return None
    if not isinstance(like, torch.Tensor):
        return Filled(number, torch.Size(like), kwargs.get("dtype") or torch.get_default_dtype())
    known = None if is_filled(like) else value_of(like)
    if known is not None and not known.is_contiguous():
        return None
    shape = like.shape if len(args) == 1 else torch.Size(args[1])
    return Filled(number, shape, kwargs.get("dtype") or like.dtype)


def compute_values(func: Any, args: Any, kwargs: Any) -> Any:
    """The operator's result on the CPU where every input is known and small; else ``UNKNOWN``."""
    tensors = list(tensors_of((args, kwargs)))
    shape_only = is_factory(func)
    if not tensors and not shape_only:
        return UNKNOWN
    assumed = is_assumed(tensors)
    elementwise = expanded.is_elementwise(func)
    as_stored = elementwise or func.is_view
    if not shape_only:
        for item in tensors:
            value = None if is_filled(item) else value_of(item)
            if value is None and not is_filled(item):
                return UNKNOWN
            count = item.numel() if value is None or not as_stored else expanded.num_stored(value)
            if count > (MAX_ASSUMED if assumed else _limit(item.shape, item.dtype)):
                return UNKNOWN
    if func._schema.is_mutable:
        _own_values(func, args)

    filled = _filled(func, args, kwargs) if shape_only else None
    if filled is not None:
        return UNKNOWN if filled.shape.numel() > _made_limit(func, filled.shape, filled.dtype) else filled

    def real(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            known = value_of(item)
            return known if known is not None else torch.empty(item.shape, dtype=item.dtype)
        if isinstance(item, torch.device):
            return torch.device("cpu")
        return item

    with unset_fake_temporarily(), torch.no_grad():
        real_args, real_kwargs = tree_map(real, args), tree_map(real, kwargs)
        if shape_only:
            made = func(*real_args, **{**real_kwargs, "device": "meta"})
            if made.numel() > _made_limit(func, made.shape, made.dtype):
                return UNKNOWN  # host memory is not the GPU's: nothing large is made here
        if func._overloadpacket is aten.histc and not real_args[0].is_floating_point():  # CUDA's counts whole numbers
            result = func(real_args[0].double(), *real_args[1:], **real_kwargs).to(real_args[0].dtype)
        else:
            try:
                most = MAX_ASSUMED if assumed else _LIMIT
                run = functools.partial(expanded.computed, func, most) if elementwise else func
                result = run(*real_args, **real_kwargs)
            except NotImplementedError:
                return UNKNOWN  # a dtype that only the GPU's kernel takes
            except (RuntimeError, IndexError):
                if is_assumed(tensors):
                    return UNKNOWN  # what was assumed does not suit what the model does with it
                if any(expanded.is_shared(known) for item in tensors if (known := value_of(item)) is not None):
                    return UNKNOWN  # a view that the tensor has and its expanded value has not
                raise
        if func._overloadpacket is aten.randint:
            _show_range(result, real_args)
        return result


_LARGE_ZEROS = 1 << 24


def _show_range(drawn: torch.Tensor, args: Any) -> None:
    """Put the lowest and the highest value among random integers: an epoch of real data has both."""
    bounds = [item for item in args if isinstance(item, int)]  # high, or low and high; the size is a list
    low, high = (0, *bounds)[-2:]
    flat = drawn.view(-1)
    flat[:1] = low
    flat[-1:] = high - 1


def _own_values(func: Any, args: Any) -> None:
    """Give what ``func`` writes to a value of its own, where others are kept in the same memory that are not in its."""
    written = args[0] if args else None
    known = value_of(written)
    if isinstance(written, FakeTensor) and known is not None and expanded.is_shared(known):
        small = known.numel() <= _limit(known.shape, known.dtype)
        with unset_fake_temporarily():
            own = known.clone(memory_format=torch.contiguous_format) if small else None
        _forget(written)
        set_value(written, own)


def forget_mutated(func: Any, args: Any, kwargs: Any) -> None:
    """Drop the values of tensors that ``func`` writes to from unknown inputs."""
    if func in _KEEPS_VALUES or not func._schema.is_mutable:
        return
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            for item in tensors_of(given):
                if isinstance(item, FakeTensor):
                    _forget(item)


def adopt_constants(outputs: Any) -> None:
    """Take over what FakeTensorMode itself knows of ``torch.tensor(...)``: it would run operators on it for real, on
    any device."""
    for item in tensors_of(outputs):
        if isinstance(item, FakeTensor) and item.constant is not None:
            set_value(item, item.constant)
            item.constant = None


def attach_values(outputs: Any, values: Any, *, assumed: bool = False) -> None:
    """Tie the real results to their fakes; of large ones their range alone."""
    for fake, real in zip(tree_leaves(outputs), tree_leaves(values), strict=True):
        if not isinstance(fake, FakeTensor) or not isinstance(real, (torch.Tensor, Filled)):
            continue
        limit = _LARGE_ZEROS if real.dtype is torch.int64 else _limit(real.shape, real.dtype)
        stored = expanded.num_stored(real) if isinstance(real, torch.Tensor) else real.shape.numel()
        if stored <= (MAX_ASSUMED if assumed else limit):
            set_value(fake, real)
            if assumed:
                mark_assumed(fake)
        elif real.dtype in _WHOLE and isinstance(real, torch.Tensor):
            with unset_fake_temporarily():
                fake.__dict__["_planner_range"] = int(real.min()), int(real.max())


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8)
_REARRANGING = {
    packet
    for name in """view _unsafe_view reshape expand slice select transpose permute t clone contiguous _to_copy alias
    detach unsqueeze squeeze narrow as_strided split chunk unbind""".split()
    if (packet := getattr(aten, name, None)) is not None
}


def carry_range(func: Any, args: Any, outputs: Any) -> None:
    """Tell the range of whole numbers without values: drawn at random, or rearranged from others of a known range."""
    packet = func._overloadpacket
    if packet is aten.randint:
        bounds = [item for item in args if isinstance(item, int)]
        low, high = (0, *bounds)[-2:]
        found: tuple[int, int] | None = (low, high - 1)
    elif packet in _REARRANGING:
        found = range_of(args[0])
    else:
        return
    if found is not None:
        for item in tensors_of(outputs):
            if isinstance(item, FakeTensor) and item.dtype in _WHOLE and value_of(item) is None:
                item.__dict__["_planner_range"] = found


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
