"""Values that depend on weights, where the step cannot go on without one: each a stated assumption.

A mixture of experts makes tensors as large as its router says. The router's choice follows from weights, which are not
there; it is assumed to be balanced. ``train.routing: worst`` needs nothing here: the step itself then chooses the first
experts (``planner.training.routing``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from planner.virtual.backend import NAME
from planner.virtual.values import MAX_ASSUMED, mark_assumed, set_value, value_of

aten = torch.ops.aten
BALANCED = "experts: every one is assumed to get as many tokens as any other; train.routing: worst assumes the opposite"
READ_BY_STEP = (
    "train.step reads values that depend on the weights, which a prediction does not have: numbers are taken as 1, "
    "truth values as false"
)
NO_OVERFLOW = (
    "fp16-amp: every step is assumed to update the weights; one whose gradients overflow does not, as may be in the "
    "first steps of a new model: until one does there is no optimizer state, and less memory is taken than later"
)
# The operators that choose, and where among their results the chosen indices are.
_CHOOSING = {aten.topk.default: 1, aten.argmax.default: 0, aten.max.dim: 1, aten.multinomial.default: 0}


def assume_choice(func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
    """Give the indices that ``func`` chooses among scores without values their assumed ones.

    Row after row takes the next entries in turn, so that each entry is chosen as often as any other.
    """
    position = _CHOOSING.get(func)
    scores = args[0] if args else None
    if position is None or not isinstance(scores, FakeTensor) or scores.fake_device.type != NAME:
        return
    if not scores.is_floating_point() or value_of(scores) is not None or scores.dim() == 0:
        return
    indices = outputs[position] if isinstance(outputs, (tuple, list)) else outputs
    dim = _dim(func, args, kwargs)
    if dim is None or indices.numel() > MAX_ASSUMED:
        return
    entries, is_kept = scores.shape[dim], indices.dim() == scores.dim()
    chosen = indices.shape[dim] if is_kept else 1
    with unset_fake_temporarily():
        in_turn = torch.arange(indices.numel()) % entries
        if is_kept:
            moved = [size for place, size in enumerate(indices.shape) if place != dim % scores.dim()]
            in_turn = in_turn.view(*moved, chosen).movedim(-1, dim)
        else:
            in_turn = in_turn.view(tuple(indices.shape))
    set_value(indices, in_turn)
    mark_assumed(indices)


def _dim(func: Any, args: Any, kwargs: Any) -> int | None:
    """Along which dimension ``func`` chooses; ``None`` for all of them together."""
    if func is aten.multinomial.default:
        return -1
    place = 2 if func is aten.topk.default else 1
    given = args[place] if len(args) > place else kwargs.get("dim")
    return -1 if given is None and func is aten.topk.default else given
