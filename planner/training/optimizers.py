"""Optimizers of torch.optim by their lower-case names, with arguments checked against the class."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch

from planner.errors import InvalidSpec, nearest
from planner.specs.model import OptimizerSpec


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """``adamw`` -> ``torch.optim.AdamW``. Raises ``InvalidSpec`` for a name that this version of torch lacks."""
    known = {
        item.lower(): value
        for item, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name not in known:
        message = f"torch {torch.__version__} has no optimizer {name!r}"
        raise InvalidSpec(message, field="train.optimizer", suggestion=nearest(name, known))
    return known[name]


def make_optimizer(spec: OptimizerSpec, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer over ``parameters``, with torch's own defaults where the spec says nothing.

    torch.optim picks its foreach kernels by itself for CUDA parameters (torch/optim/optimizer.py,
    ``_default_to_fused_or_foreach``). Raises ``InvalidSpec`` for an argument that the class lacks or refuses.
    """
    kind = optimizer_class(spec.name)
    arguments: dict[str, Any] = dict(spec.args)
    known = [name for name in inspect.signature(kind).parameters if name not in ("self", "params")]
    for key in arguments:
        if key not in known:
            raise InvalidSpec("unknown argument", field=f"train.optimizer.{key}", suggestion=nearest(key, known))
    try:
        return kind(parameters, **arguments)
    except (TypeError, ValueError) as error:
        raise InvalidSpec(f"{kind.__name__} refused its arguments: {error}", field="train.optimizer") from error
