"""Indices that are out of range: on a GPU a device-side assertion, which a step without data would pass by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from planner.errors import InvalidSpec, ModelError, PlannerError
from planner.specs.model import DataKind, Spec
from planner.virtual.values import is_assumed, range_of, value_of

aten = torch.ops.aten
_ALONG_DIM = {aten.index_select, aten.gather, aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_}
_LISTED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
_CLASSES = {aten.nll_loss_forward, aten.nll_loss2d_forward}


class IndexOutOfRange(Exception):
    """``index`` was looked up where there are only ``size`` entries; ``in_loss``: by the loss, among its classes."""

    def __init__(self, index: int, size: int, *, operator: str, in_loss: bool) -> None:
        super().__init__(
            f"{operator} looks up {'class' if in_loss else 'index'} {index} of {size}: out of range, which a GPU "
            "answers with a device-side assertion"
        )
        self.index, self.size, self.in_loss = index, size, in_loss

    def of_spec(self, spec: Spec) -> PlannerError:
        """What is wrong for the user: the field of ``spec`` that it follows from, where that is known."""
        data = spec.data
        if data.kind is DataKind.TOKENS and not self.in_loss and data.sequence_length is not None:
            # Tokens are drawn from the vocabulary, so what is too large is a position; positions count up by one.
            longest = data.sequence_length - (self.index - self.size + 1)
            if data.lengths:
                cut = f"; data.sequence_length: {longest} cuts longer ones" if longest > 0 else ""
                return InvalidSpec(
                    f"samples of {data.sequence_length} tokens are more than the model has positions for{cut}",
                    field="data.lengths",
                )
            return InvalidSpec(
                f"{data.sequence_length} tokens are more than the model has positions for",
                field="data.sequence_length",
                suggestion=str(longest) if longest > 0 else None,
            )
        if data.kind is DataKind.IMAGES and self.in_loss and data.classes is None:
            # Some of timm's models have no classifier by default, and so no number of classes to draw labels from.
            message = f"is needed: the model has {self.size} outputs and does not say how many classes it tells apart"
            return InvalidSpec(message, field="data.classes")
        if data.kind is DataKind.IMAGES and self.in_loss:
            return InvalidSpec(
                f"the model tells {self.size} classes apart, not {data.classes}",
                field="data.classes",
                suggestion=str(self.size),
            )
        return ModelError(f"{self}; check the shape and the range (low, high) of each input", field="model")


def check_indices(func: Any, args: Any) -> None:
    """Raise ``IndexOutOfRange`` where a known index of an operator's call is outside what it indexes."""
    packet = func._overloadpacket
    for size, indices, lowest, ignored in _indices(packet, args):
        if is_assumed(indices):
            continue
        known, bounds = value_of(indices), range_of(indices)
        if known is not None and known.numel() and known.dtype not in (torch.bool, torch.uint8):
            low, high = _extremes(known, ignored)
        elif known is None and bounds is not None:
            low, high = bounds
        else:
            continue
        if low < lowest or high >= size:
            worst = high if high >= size else low
            name = str(packet).removeprefix("aten.")
            raise IndexOutOfRange(worst, size, operator=name, in_loss=packet in _CLASSES)


def _indices(packet: Any, args: Any) -> Iterator[tuple[int, Any, int, int | None]]:
    """``(entries, indices, lowest valid index, value that is no index)`` for each tensor of indices."""
    if packet is aten.embedding:
        yield args[0].shape[0], args[1], 0, None
    elif packet in _CLASSES:
        logits = args[0]
        yield logits.shape[1 if logits.dim() > 1 else 0], args[1], 0, args[4]
    elif packet in _ALONG_DIM and args[0].dim():
        yield args[0].shape[args[1]], args[2], 0, None
    elif packet in _LISTED:
        for position, item in enumerate(args[1]):
            if isinstance(item, torch.Tensor) and item.dtype is torch.bool:
                return  # a mask takes as many dimensions as it has
            if item is not None:
                yield args[0].shape[position], item, -args[0].shape[position], None


def _extremes(values: torch.Tensor, ignored: int | None) -> tuple[int, int]:
    with unset_fake_temporarily():
        used = values if ignored is None else values[values != ignored]
        return (int(used.min()), int(used.max())) if used.numel() else (0, -1)
