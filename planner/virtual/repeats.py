"""Operator calls that were answered before: a model's layers repeat them hundreds of times.

``FakeTensorMode`` takes a good part of a millisecond to say what an operator returns. The answer follows from the
operator, the layout of the tensors that it is given and its other arguments; so the answer to an equal call is made
from the first one's, with the same sizes, strides and aliases. Whatever is not plainly of that kind is asked again:
tensors of known values, where these could decide; sparse and quantized ones; results that are neither new, nor an
argument, nor a view of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch

# By name: to look one up in torch's modules takes a good part of the time that a call takes, and these are called for
# each answer.
from torch import empty, empty_strided, is_inference_mode_enabled
from torch._C import _DisableTorchDispatch, _set_throw_on_mutable_data_ptr
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from planner.virtual.operators import Operator
from planner.virtual.values import tensors_of

Plain = int | float | bool | str | None | torch.dtype | torch.device | torch.layout | torch.memory_format
_PLAIN = set(get_args(Plain))
Key = tuple[Any, ...]


class Call(NamedTuple):
    """An operator call that may repeat: what its answer follows from, and the tensors that it is given, in order."""

    key: Key
    tensors: list[FakeTensor]
    has_values: bool
    """Whether what it returns may have known values: they are computed each time."""


class Layout(NamedTuple):
    """What there is to know of a strided tensor without values; sizes and strides in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: FakeTensor) -> Layout:
        offset = int(tensor.storage_offset())
        return cls(tuple(tensor.shape), tensor.stride(), offset, tensor.dtype, tensor.fake_device)


@dataclass(frozen=True, slots=True)
class Result:
    """One tensor that an operator returns: an argument itself, a view of one, or a new tensor."""

    argument: int | None
    """Which of the call's tensors it is, or is a view of."""
    layout: Layout | None
    """``None``: it is the argument itself."""

    def made(self, call: Call) -> FakeTensor:
        if self.argument is None:
            assert self.layout is not None
            return new_tensor(call.tensors[0].fake_mode if call.tensors else _active_mode(), self.layout)
        argument = call.tensors[self.argument]
        if self.layout is None:
            return argument
        with _DisableTorchDispatch():
            meta = _meta_of(argument, self.layout)
        return _fake(argument.fake_mode, meta, self.layout.device)


def _meta_of(tensor: FakeTensor, layout: Layout) -> torch.Tensor:
    """A meta tensor of that layout in the memory of ``tensor``, to be made where dispatch to Python is switched off."""
    shape, stride, offset, dtype, _ = layout
    # A third of the time of as_strided, which asks a fake for its device.
    return empty(0, dtype=dtype, device=_META).set_(tensor.untyped_storage(), offset, shape, stride)


def new_tensor(mode: FakeTensorMode, layout: Layout) -> FakeTensor:
    """A tensor of that layout with a storage of its own."""
    shape, stride, _, dtype, device = layout
    with _DisableTorchDispatch():
        meta = empty_strided(shape, stride, dtype=dtype, device=_META)
    return _fake(mode, meta, device)


def _active_mode() -> Any:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def lifted(tensor: Any) -> FakeTensor | None:
    """The fake of a ``tensor`` that was just made from numbers; ``None`` where it is not plainly of its own."""
    mode = _active_mode()
    if mode is None or type(tensor) is not torch.Tensor or tensor.requires_grad or tensor.device.type != "cpu":
        return None
    if tensor.dtype.is_complex or tensor.layout is not torch.strided or tensor.is_quantized:
        return None
    if tensor.untyped_storage().nbytes() != _dense_bytes(tensor):
        return None
    return new_tensor(mode, Layout(tuple(tensor.shape), tensor.stride(), 0, tensor.dtype, tensor.device))


def like_each(tensors: Sequence[FakeTensor]) -> list[FakeTensor] | None:
    """New tensors laid out as ``tensors``; ``None`` where an operator might lay them out otherwise."""
    for tensor in tensors:
        dense = isinstance(tensor, FakeTensor) and _is_plain(tensor) and tensor.is_floating_point()
        if not dense or _dense_elements(tensor) != tensor.numel():
            return None
    return [new_tensor(tensor.fake_mode, Layout.of(tensor)) for tensor in tensors]


_META = torch.device("meta")
_make_subclass = torch.Tensor._make_subclass


def by_meta_kernel(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``func``, which returns new tensors or views, returns by torch's meta kernel: in a fifth of the time that
    ``FakeTensorMode`` takes for the same, which decomposes many operators in Python. It is asked where tensors are not
    plain or not all on one device."""
    given: list[Any] = list(tensors_of((args, kwargs)))
    plain = [tensor for tensor in given if isinstance(tensor, FakeTensor) and _is_plain(tensor)]
    devices = {tensor.fake_device for tensor in plain}
    mode = _active_mode()
    if mode is None or len(plain) < len(given) or len(devices) != 1 or torch.is_inference_mode_enabled():
        return func(*args, **kwargs)

    def meta(item: Any) -> Any:
        if isinstance(item, FakeTensor):
            return _meta_of(item, Layout.of(item))
        if isinstance(item, (list, tuple)):
            return [meta(each) for each in item]
        return _META if isinstance(item, torch.device) else item

    with torch._C._DisableTorchDispatch():
        outputs = func(*meta(args), **{name: meta(value) for name, value in kwargs.items()})
    device = kwargs.get("device") or plain[0].fake_device
    if isinstance(outputs, torch.Tensor):
        return _fake(mode, outputs, device)
    return tuple(None if item is None else _fake(mode, item, device) for item in outputs)


def _fake(mode: FakeTensorMode, meta: torch.Tensor, device: torch.device) -> FakeTensor:
    """``FakeTensor(mode, meta, device)`` of a plain ``meta``, with the attributes of the first one that was made so:
    the constructor's own checks and setters take as long as all else that an answer needs."""
    attributes: dict[str, Any] | None = mode.__dict__.setdefault("_planner_attributes", {}).get(device)
    if attributes is None:
        made = FakeTensor(mode, meta, device)
        mode.__dict__["_planner_attributes"][device] = {**made.__dict__, "_planner_plain": True}
        return made
    made = _make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device)
    _set_throw_on_mutable_data_ptr(made)
    made.__dict__.update(attributes)
    return made


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call returns."""

    results: tuple[Result | Plain, ...]
    container: type | None
    """``tuple`` or ``list`` of the results; ``None``: the one result itself, or nothing."""

    def made(self, call: Call) -> Any:
        """New tensors as the operator would return them to ``call``."""
        if self.container is None and len(self.results) == 1 and isinstance(self.results[0], Result):
            return self.results[0].made(call)
        made = [result.made(call) if isinstance(result, Result) else result for result in self.results]
        if self.container is not None:
            return self.container(made)
        return made[0] if made else None


def described(operator: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> Call | None:
    """The call as a key, ``None`` for one that has to be asked."""
    if is_inference_mode_enabled():
        return None
    key: list[Any] = [id(operator.func)]
    tensors: list[FakeTensor] = []
    values = not operator.takes_lists
    if not _describe(args, key, tensors, values):
        return None
    if kwargs:
        for name, value in kwargs.items():
            key.append(name)
            if not _describe((value,), key, tensors, values):
                return None
    if not tensors:
        if not operator.fills or _active_mode() is None:
            return None
        key.append(torch.get_default_dtype())
    known = [tensor for tensor in tensors if tensor.__dict__.get("_planner_value") is not None]
    if not known:
        return Call(tuple(key), tensors, operator.is_factory)
    if operator.is_mutable or not _only_layouts_decide(operator, known):
        return None
    all_known = len(known) == len(tensors)
    if all_known and not (operator.copies or operator.is_factory):
        return None
    return Call(tuple(key), tensors, all_known or operator.is_factory)


def _only_layouts_decide(operator: Operator, known: Sequence[FakeTensor]) -> bool:
    """Whether the values of the ``known`` arguments have no part in the result's size: they do as indices and masks."""
    return operator.is_pointwise or all(tensor.is_floating_point() for tensor in known)


def _describe(items: Iterable[Any], key: list[Any], tensors: list[FakeTensor], values: bool) -> bool:
    """Extend ``key`` and ``tensors`` by ``items``; whether all of them are plain.

    No size follows from the value of a number that a ``_foreach_`` operator is given (``values`` is false): an
    optimizer's change with every step.
    """
    for item in items:
        kind = type(item)
        if kind in _PLAIN:
            key.append(kind)  # 1, 1.0 and True are equal, and make other dtypes
            if values or kind is not float:
                key.append(item)
        elif isinstance(item, FakeTensor):
            known = item.__dict__
            if known["constant"] is not None or "_planner_range" in known or not _is_plain(item):
                return False
            key += (item.shape, item.stride(), item.storage_offset(), item.dtype, item.fake_device)
            tensors.append(item)
        elif kind is list or kind is tuple:
            key.append(len(item))
            if not _describe(item, key, tensors, values):
                return False
        else:
            return False
    return True


def _is_plain(tensor: FakeTensor) -> bool:
    if tensor.dtype.is_complex:
        return False
    plain: bool | None = tensor.__dict__.get("_planner_plain")
    if plain is None:
        plain = tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_neg() or tensor.is_inference())
        tensor.__dict__["_planner_plain"] = plain
    return plain


def answer_of(call: Call, outputs: Any) -> Answer | None:
    """What to answer to an equal call, from what this one returned; ``None`` where it has to be asked again."""
    container = type(outputs) if isinstance(outputs, (tuple, list)) else None
    items = outputs if container else () if outputs is None else (outputs,)
    new: set[int] = set()
    tensors, storages = {}, {}  # where among the arguments each stands first
    for index, tensor in reversed([*enumerate(call.tensors)]):
        tensors[id(tensor)], storages[tensor.untyped_storage()._cdata] = index, index
    results: list[Result | Plain] = []
    for item in items:
        if type(item) in _PLAIN:
            results.append(item)
            continue
        if not isinstance(item, FakeTensor) or item.constant is not None or item.requires_grad or not _is_plain(item):
            return None
        if not call.has_values and item.__dict__.get("_planner_value") is not None:
            return None
        storage = item.untyped_storage()
        result = _result(call, item, tensors.get(id(item)), storages.get(storage._cdata))
        if (
            result is None
            or storage._cdata in new
            or (result.argument is None and storage.nbytes() != _dense_bytes(item))
        ):
            return None
        if result.argument is None:
            new.add(storage._cdata)
        results.append(result)
    return Answer(tuple(results), container)


def _result(call: Call, item: FakeTensor, itself: int | None, base: int | None) -> Result | None:
    """``item`` as a result: ``itself`` says which argument it is, ``base`` whose memory it lies in."""
    if itself is not None:
        return Result(itself, None)
    if base is None:
        return Result(None, Layout.of(item))
    tensor = call.tensors[base]
    same = tensor.dtype is item.dtype and tensor.fake_device == item.fake_device
    return Result(base, Layout.of(item)) if same else None


def _dense_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the storage that ``torch.empty_strided`` makes for a tensor of this shape; -1 for one with an offset."""
    return -1 if tensor.storage_offset() else _dense_elements(tensor) * tensor.element_size()


def _dense_elements(tensor: torch.Tensor) -> int:
    """Elements from the first to the last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
