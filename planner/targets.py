"""Which user code a spec names, and whether this machine's operator allows it to run.

A spec that comes over the network is data. ``source: python``, a custom loss and a custom step make a worker import
code that is already installed there; that happens only for targets under a prefix that the operator listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from planner.errors import TargetNotAllowed
from planner.specs.model import ModelSource, Spec


def named_targets(spec: Spec) -> Iterator[tuple[str, str]]:
    """Every ``(field path, module:attribute)`` of user code in ``spec``."""
    if spec.model.source is ModelSource.PYTHON:
        yield "model.target", spec.model.name
    if spec.train.loss is not None:
        yield "train.loss", spec.train.loss
    if spec.train.step is not None:
        yield "train.step", spec.train.step


def parse_prefixes(text: str) -> tuple[str, ...]:
    """``"my_project, other.models"`` -> ``("my_project", "other.models")``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def is_allowed(target: str, prefixes: Iterable[str]) -> bool:
    """Whether ``target``'s module is one of ``prefixes`` or inside one.

    ``my_project`` allows ``my_project.models:UNet`` and not ``my_project_two:UNet``.
    """
    module = target.partition(":")[0]
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def check_targets(spec: Spec, prefixes: Iterable[str]) -> None:
    """Raise ``TargetNotAllowed``, naming the field, for user code outside ``prefixes``."""
    allowed = tuple(prefixes)
    for path, target in named_targets(spec):
        if not is_allowed(target, allowed):
            raise TargetNotAllowed(
                f"this service does not run {target!r}: its operator lists the modules it may import in "
                f"PLANNER_ALLOWED_TARGETS ({', '.join(allowed) or 'none'})",
                field=path,
            )
