"""Which batch size is the fastest, and which micro-batches reach a global batch size: judged from timed trials. Pure.

Speed rises with the batch size up to a knee and is flat beyond it, or falls; so a few sizes between tell most of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from planner.trials import Source, Trial

MAX_TIMED = 3
"""Trials that only measure speed, at most, for each plan."""
_SATURATED = 0.97
"""Half the size with at least this share of the speed: the knee is further down."""
_NEAR = 1.2
"""A size that was timed stands in for one that is within this factor of it."""
_GRAIN = 8
"""Sizes to be timed are multiples of it where they are large enough: matrix kernels work in tiles of 8 and more."""
KNEE = 0.95
"""Share of the best speed that the knee has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What one batch size was measured at."""

    batch_size: int
    step_time_s: float
    samples_per_second: float

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "source": str(Source.MEASURED)}


def speeds(trials: Iterable[Trial]) -> list[Speed]:
    """The best of each batch size that fits and was measured, by ascending size."""
    best: dict[int, Speed] = {}
    for trial in trials:
        step_time_s, rate = trial.step_time_s, trial.samples_per_second
        if not trial.fits or step_time_s is None or rate is None:
            continue
        speed = Speed(batch_size=trial.batch_size, step_time_s=step_time_s, samples_per_second=rate)
        before = best.get(trial.batch_size)
        if before is None or speed.samples_per_second > before.samples_per_second:
            best[trial.batch_size] = speed
    return [best[size] for size in sorted(best)]


def fastest(timed: Sequence[Speed]) -> Speed | None:
    return max(timed, key=lambda speed: speed.samples_per_second, default=None)


def knee(timed: Sequence[Speed]) -> Speed | None:
    """The smallest size that has ``KNEE`` of the best speed: from there on a larger batch hardly pays."""
    best = fastest(timed)
    if best is None:
        return None
    return next(speed for speed in timed if speed.samples_per_second >= KNEE * best.samples_per_second)


def next_to_time(timed: Sequence[Speed], largest: int, multiple_of: int = 1) -> int | None:
    """The batch size below ``largest`` whose speed would tell most; ``None`` when enough is known.

    Half of ``largest`` first; then towards the knee: a quarter where half was as fast, three quarters where it was not.
    """
    rates = {speed.batch_size: speed.samples_per_second for speed in timed}
    if largest not in rates:
        return None
    half = _stand_in(rates, largest / 2, largest, multiple_of)
    if half is None or half not in rates:
        return half
    share = 1 / 4 if rates[half] >= _SATURATED * rates[largest] else 3 / 4
    further = _stand_in(rates, largest * share, largest, multiple_of)
    return further if further not in rates else None


def _stand_in(rates: Iterable[int], target: float, largest: int, multiple_of: int) -> int | None:
    """A timed size near ``target``, or else the round size nearest to it; ``None`` where that is ``largest`` or 0."""
    near = [size for size in rates if size != largest and max(size / target, target / size) <= _NEAR]
    if near:
        return min(near, key=lambda size: abs(size - target))
    grain = math.lcm(multiple_of, _GRAIN)
    if target < 2 * grain:
        grain = multiple_of
    size = round(target / grain) * grain
    return size if 0 < size < largest else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulation:
    """A way to reach a global batch size exactly."""

    micro_batch_size: int
    accumulation_steps: int
    gpus: int = 1

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.accumulation_steps * self.gpus


def accumulations(
    global_batch_size: int, largest: int, *, gpus: int = 1, multiple_of: int = 1, steps: int | None = None
) -> Iterator[Accumulation]:
    """Every micro-batch up to ``largest`` that reaches ``global_batch_size`` exactly, the largest first.

    ``steps``: only with this number of accumulation steps.
    """
    each, rest = divmod(global_batch_size, gpus)
    if rest:
        return
    for size in range(min(largest, each) // multiple_of * multiple_of, 0, -multiple_of):
        if each % size == 0 and steps in (None, each // size):
            yield Accumulation(micro_batch_size=size, accumulation_steps=each // size, gpus=gpus)
