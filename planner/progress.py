"""What a sweep tells whoever watches it: the CLI's live display, the job's event stream, a test's list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planner.specs.variants import Variant
from planner.trials import Plan, Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepStarted:
    variants: tuple[Variant, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantStarted:
    variant: Variant
    index: int
    """Counted from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStarted:
    variant: Variant
    batch_size: int
    low: int
    """Largest batch size known to fit; 0 = none yet."""
    high: int | None
    """Smallest batch size known to run out of memory; ``None`` = none yet."""
    remaining_trials: int | None
    """An upper estimate of the trials still to come, this one included; ``None`` while there is no upper bracket."""
    fresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialFinished:
    variant: Variant
    trial: Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantFinished:
    plan: Plan
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepFinished:
    plans: tuple[Plan, ...]


Progress = SweepStarted | VariantStarted | TrialStarted | TrialFinished | VariantFinished | SweepFinished
Listener = Callable[[Progress], None]
