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
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

Plain = int | float | bool | str | None | torch.dtype | torch.device | torch.layout | torch.memory_format
_PLAIN = set(get_args(Plain))
Key = tuple[Any, ...]


class Call(NamedTuple):
    """An operator call that may repeat: what its answer follows from, and the tensors that it is given, in order."""

    key: Key
    tensors: list[FakeTensor]


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
        argument = call.tensors[self.argument or 0]
        if self.layout is None:
            return argument
        shape, stride, offset, dtype, device = self.layout
        mode = argument.fake_mode
        with in_kernel_invocation_manager(mode):
            if self.argument is None:
                meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            else:
                meta = torch.as_strided(argument, shape, stride, offset)
        return FakeTensor(mode, meta, device)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call returns."""

    results: tuple[Result | Plain, ...]
    container: type | None
    """``tuple`` or ``list`` of the results; ``None``: the one result itself, or nothing."""

    def made(self, call: Call) -> Any:
        """New tensors as the operator would return them to ``call``."""
        made = [result.made(call) if isinstance(result, Result) else result for result in self.results]
        if self.container is not None:
            return self.container(made)
        return made[0] if made else None


def described(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Call | None:
    """The call as a key, ``None`` for one that has to be asked."""
    if torch.is_inference_mode_enabled():
        return None
    key: list[Any] = [func]
    tensors: list[FakeTensor] = []
    values = not func._schema.name.startswith("aten::_foreach_")
    if not _describe(args, key, tensors, values):
        return None
    if kwargs:
        for name, value in kwargs.items():
            key.append(name)
            if not _describe((value,), key, tensors, values):
                return None
    if not tensors:
        return None
    if any("_planner_range" in tensor.__dict__ for tensor in tensors):
        return None
    known = [tensor for tensor in tensors if tensor.__dict__.get("_planner_value") is not None]
    if known and (len(known) == len(tensors) or func._schema.is_mutable or not _only_layouts_decide(func, known)):
        return None
    return Call(tuple(key), tensors)


def _only_layouts_decide(func: Any, known: Sequence[FakeTensor]) -> bool:
    """Whether the values of the ``known`` arguments have no part in the result's size: they do as indices and masks."""
    return torch.Tag.pointwise in func.tags or all(tensor.is_floating_point() for tensor in known)


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
            if item.constant is not None or not _is_plain(item):
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
    dtype = tensor.dtype
    return tensor.layout is torch.strided and not (dtype.is_complex or tensor.is_quantized or tensor.is_neg())


def answer_of(call: Call, outputs: Any) -> Answer | None:
    """What to answer to an equal call, from what this one returned; ``None`` where it has to be asked again."""
    container = type(outputs) if isinstance(outputs, (tuple, list)) else None
    items = outputs if container else () if outputs is None else (outputs,)
    new: set[int] = set()
    results: list[Result | Plain] = []
    for item in items:
        if type(item) in _PLAIN:
            results.append(item)
            continue
        if not isinstance(item, FakeTensor) or item.constant is not None or item.requires_grad or not _is_plain(item):
            return None
        if item.__dict__.get("_planner_value") is not None:
            return None
        result = _result(call, item)
        storage = item.untyped_storage()
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


def _result(call: Call, item: FakeTensor) -> Result | None:
    for index, tensor in enumerate(call.tensors):
        if tensor is item:
            return Result(index, None)
    for index, tensor in enumerate(call.tensors):
        if tensor.untyped_storage()._cdata == item.untyped_storage()._cdata:
            same = tensor.dtype is item.dtype and tensor.fake_device == item.fake_device
            return Result(index, Layout.of(item)) if same else None
    return Result(None, Layout.of(item))


def _dense_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the storage that ``torch.empty_strided`` makes for a tensor of this shape; -1 for one with an offset."""
    if tensor.storage_offset():
        return -1
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(last + 1) * tensor.element_size()
