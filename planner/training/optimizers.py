"""Optimizers of torch.optim by their lower-case names, with arguments checked against the class."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch

from planner.errors import InvalidSpec, nearest
from planner.specs.model import OptimizerSpec
from planner.specs.variants import OptimizerImplementation


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


_SWITCHES: dict[OptimizerImplementation, dict[str, bool]] = {
    OptimizerImplementation.DEFAULT: {},
    OptimizerImplementation.FOR_LOOP: {"foreach": False, "fused": False},
    OptimizerImplementation.FOREACH: {"foreach": True},
    OptimizerImplementation.FUSED: {"fused": True},
}
"""Arguments of torch.optim's classes that say how they walk over the parameters."""


def make_optimizer(
    spec: OptimizerSpec,
    parameters: Iterable[torch.nn.Parameter],
    implementation: OptimizerImplementation = OptimizerImplementation.DEFAULT,
) -> torch.optim.Optimizer:
    """The optimizer over ``parameters``, with torch's own defaults where the spec says nothing.

    torch.optim picks its foreach kernels by itself for CUDA parameters (torch/optim/optimizer.py,
    ``_default_to_fused_or_foreach``) where ``implementation`` is the default. Raises ``InvalidSpec`` for an argument
    that the class lacks or refuses, and for an implementation that it lacks.
    """
    kind = optimizer_class(spec.name)
    arguments: dict[str, Any] = dict(spec.args)
    known = [name for name in inspect.signature(kind).parameters if name not in ("self", "params")]
    for key in arguments:
        if key not in known:
            raise InvalidSpec("unknown argument", field=f"train.optimizer.{key}", suggestion=nearest(key, known))
    switches: dict[str, Any] = {
        name: value for name, value in _SWITCHES[implementation].items() if value or name in known
    }
    for name in switches:
        if name in arguments:
            raise InvalidSpec(
                f"is for variants.optimizer_implementation to say ({implementation} here)",
                field=f"train.optimizer.{name}",
            )
        if name not in known:
            message = f"{kind.__name__} of torch {torch.__version__} has no {implementation} implementation"
            raise InvalidSpec(message, field="variants.optimizer_implementation", suggestion="default")
    try:
        return kind(parameters, **arguments, **switches)
    except (TypeError, ValueError) as error:
        raise InvalidSpec(f"{kind.__name__} refused its arguments: {error}", field="train.optimizer") from error
