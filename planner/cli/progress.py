"""What a running sweep looks like so far: pure state, fed by progress events, read by the display."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from planner.progress import Progress, SweepStarted, TrialFinished, TrialStarted, VariantFinished, VariantStarted
from planner.specs.variants import Variant
from planner.trials import Plan, Trial


@dataclass(slots=True)
class VariantProgress:
    """One row of the display."""

    variant: Variant
    started_at_s: float | None = None
    """Reading of the clock when the variant began; ``None`` = it waits."""
    batch_size: int | None = None
    """Running now; ``None`` = no trial is running."""
    trial_started_at_s: float | None = None
    low: int = 0
    """Largest batch size known to fit; 0 = none yet."""
    high: int | None = None
    """Smallest batch size known to run out of memory; ``None`` = none yet."""
    remaining_trials: int | None = None
    """Upper estimate of trials still to come, the running one included; ``None`` = not known yet."""
    trials: list[Trial] = field(default_factory=list)
    trial_seconds: list[float] = field(default_factory=list)
    plan: Plan | None = None
    seconds: float | None = None
    """How long the finished variant took."""

    @property
    def state(self) -> str:
        if self.plan is not None:
            return "stored" if self.plan.stored else str(self.plan.status)
        return "waiting" if self.started_at_s is None else "running"

    def bracket(self) -> str:
        """The bracket so far, e.g. ``fits 8 · OOM 16``; empty before the first trial ends."""
        return bracket(self.low, self.high)


def bracket(low: int, high: int | None) -> str:
    """``(8, 16)`` -> ``"fits 8 · OOM 16"``; 0 and ``None`` leave their half out."""
    return " · ".join([*([f"fits {low}"] if low else []), *([f"OOM {high}"] if high is not None else [])])


class SweepProgress:
    """Collects the events of one sweep. ``plans`` are the finished variants, in the order they finished.

    ``clock`` gives seconds that only ever grow; a test passes its own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.rows: list[VariantProgress] = []
        self.started_at_s = clock()

    @property
    def plans(self) -> tuple[Plan, ...]:
        return tuple(row.plan for row in self.rows if row.plan is not None)

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self.started_at_s

    def handle(self, event: Progress) -> VariantProgress | None:
        """Take one event in; returns the row that it changed, or ``None`` when it is about the whole sweep."""
        now = self._clock()
        match event:
            case SweepStarted(variants=variants):
                self.rows = [VariantProgress(variant) for variant in variants]
                return None
            case VariantStarted(variant=variant):
                row = self._row(variant)
                row.started_at_s = now
            case TrialStarted(variant=variant):
                row = self._row(variant)
                row.batch_size, row.trial_started_at_s = event.batch_size, now
                row.low, row.high, row.remaining_trials = event.low, event.high, event.remaining_trials
            case TrialFinished(variant=variant, trial=trial):
                row = self._row(variant)
                self._finish_trial(row, trial, now)
            case VariantFinished(plan=plan):
                row = self._row(plan.variant)
                row.plan, row.batch_size = plan, None
                row.seconds = 0.0 if row.started_at_s is None else now - row.started_at_s
            case _:
                return None
        return row

    def seconds_left(self) -> float | None:
        """Trials left x mean of the last two, plus waiting variants x mean variant; ``None`` = not known yet."""
        total = 0.0
        for row in self.rows:
            if row.plan is not None:
                continue
            seconds = self._running_seconds_left(row) if row.started_at_s is not None else self._mean_variant_s()
            if seconds is None:
                return None
            total += seconds
        return total

    def variant_seconds_left(self) -> float | None:
        """The same estimate for the running variant alone; ``None`` = none runs, or not known yet."""
        for row in self.rows:
            if row.plan is None and row.started_at_s is not None:
                return self._running_seconds_left(row)
        return None

    @property
    def waiting(self) -> int:
        """How many variants have not begun."""
        return sum(1 for row in self.rows if row.started_at_s is None and row.plan is None)

    def _running_seconds_left(self, row: VariantProgress) -> float | None:
        if row.remaining_trials is None:
            return None
        seconds = row.trial_seconds or [s for other in self.rows for s in other.trial_seconds]
        if not seconds:
            return None
        # Of the last two: the first trial of a variant also builds its model, and must not count for all of them.
        recent = seconds[-2:]
        mean = sum(recent) / len(recent)
        already = 0.0 if row.trial_started_at_s is None else self._clock() - row.trial_started_at_s
        return max(row.remaining_trials * mean - already, 0.0)

    def _mean_variant_s(self) -> float | None:
        # A variant that was read back from the store says nothing about how long one takes to work out.
        worked = [row.seconds for row in self.rows if row.seconds is not None and row.plan and not row.plan.stored]
        return sum(worked) / len(worked) if worked else None

    def _finish_trial(self, row: VariantProgress, trial: Trial, now: float) -> None:
        row.trials.append(trial)
        started = row.trial_started_at_s
        row.trial_seconds.append(trial.duration_s if started is None else now - started)
        row.batch_size, row.trial_started_at_s = None, None
        if trial.fits:
            row.low = max(row.low, trial.batch_size)
        elif trial.outcome == "oom":
            row.high = trial.batch_size if row.high is None else min(row.high, trial.batch_size)
        if row.remaining_trials is not None:
            row.remaining_trials = max(row.remaining_trials - 1, 0)

    def _row(self, variant: Variant) -> VariantProgress:
        for row in self.rows:
            if row.variant == variant:
                return row
        row = VariantProgress(variant)
        self.rows.append(row)
        return row
