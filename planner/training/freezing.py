"""Parameters that are not trained, by shell patterns of their names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from planner.errors import InvalidSpec, nearest


def freeze(model: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters whose names match any of ``patterns`` out of training.

    A parameter that several names share is frozen by each of them. Raises ``InvalidSpec`` (field ``train.freeze[i]``)
    for a pattern that matches none.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    for index, pattern in enumerate(patterns):
        matching = [parameter for name, parameter in named if fnmatchcase(name, pattern)]
        if not matching:
            names = [name for name, _ in named]
            modules = sorted({f"{name[:end]}.*" for name in names for end in range(len(name)) if name[end] == "."})
            raise InvalidSpec(
                f"no parameter's name matches {pattern!r}",
                field=f"train.freeze[{index}]",
                suggestion=nearest(pattern, modules if pattern.endswith("*") else names),
            )
        for parameter in matching:
            parameter.requires_grad_(False)
