"""The plans that a question about one variant is answered with: made of the trial behind the answer, or of why there is
none. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from planner.errors import InvalidSpec, PlannerError
from planner.specs.model import Spec
from planner.specs.variants import Variant
from planner.trials import Environment, Plan, PlanStatus, Trial
from planner.units import format_bytes


class TrialFailed(PlannerError):
    """A trial ended twice for another reason than memory: the ``error`` of a failed plan, never raised."""

    code = "trial_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What every answer to one question says: one variant on one device."""

    spec: Spec
    variant: Variant
    environment: Environment
    capacity_bytes: int
    usable_bytes: int
    """The capacity without the headroom."""
    batch_size: int | None
    """The only one that was asked about; ``None`` of a search."""
    question: Mapping[str, Any]
    trials: Sequence[Trial]
    """What ran so far; grows."""
    worker: str | None

    def planned(
        self,
        best: Trial | None,
        notes: Sequence[str],
        *,
        max_batch_size: int | None = None,
        first_oom_batch_size: int | None = None,
        certified: bool = False,
        batch_size: int | None = None,
        fits: bool | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Plan:
        """The plan whose figures are those of ``best``; ``None`` when not even one sample fits."""
        return replace(
            self._base(),
            max_batch_size=max_batch_size,
            first_oom_batch_size=first_oom_batch_size,
            certified=certified,
            batch_size=batch_size,
            fits=fits,
            peaks=best.peaks if best else None,
            reserved_interval=best.reserved_interval if best else None,
            step_time_s=best.step_time_s if best else None,
            num_alloc_retries=best.num_alloc_retries if best else 0,
            notes=tuple(dict.fromkeys(notes)),
            details={**self._headroom(), **(details or {})},
        )

    def failed(self, failure: Trial, notes: Sequence[str], predicted_failure: str | None) -> Plan:
        """The plan of a trial that failed twice; ``predicted_failure`` is what the virtual GPU says of it."""
        words = f"batch size {failure.batch_size} failed twice: {failure.error or 'no reason was given'}"
        if predicted_failure:
            words = f"{words}; on the virtual GPU: {predicted_failure}"
        why = TrialFailed(words)
        return replace(self._base(), status=PlanStatus.FAILED, error=why.as_dict(), notes=tuple(notes))

    def unanswered(self, error: PlannerError) -> Plan:
        """The plan of a variant that could not be run."""
        # The only bad input that is one variant's own: this model or GPU cannot run it.
        status = PlanStatus.UNSUPPORTED if isinstance(error, InvalidSpec) else PlanStatus.FAILED
        return replace(self._base(), status=status, error=error.as_dict())

    def _headroom(self) -> dict[str, Any]:
        kept = self.capacity_bytes - self.usable_bytes
        return {"headroom": {"bytes": kept, "usable_bytes": self.usable_bytes}} if kept else {}

    def _base(self) -> Plan:
        return Plan(
            spec_hash=self.spec.hash,
            spec_name=self.spec.name,
            model=self.spec.model.name,
            variant=self.variant,
            environment=self.environment,
            capacity_bytes=self.capacity_bytes,
            source=self.environment.source,
            batch_size=self.batch_size,
            question=self.question,
            details=self._headroom(),
            trials=tuple(self.trials),
            worker=self.worker,
            created_at=datetime.now(UTC),
        )


def explained_size(plan: Plan) -> int:
    """The batch size that is explained: that of the plan's figures; where nothing fits, the smallest asked about."""
    return plan.batch_size or plan.max_batch_size or int(plan.question.get("multiple_of", 1))


def notes_of(trials: Sequence[Trial]) -> list[str]:
    """What the device said must be read beside the figures of these trials, each sentence once."""
    return list(dict.fromkeys(str(note) for trial in trials for note in trial.details.get("notes", ())))


def doubts_of(trial: Trial, capacity_bytes: int) -> list[str]:
    """What a reader of a predicted "fits" or "does not fit" must know: that the gate would not say it."""
    if trial.reserved_interval is None or not trial.reserved_interval.is_around(capacity_bytes):
        return []
    return [
        f"batch size {trial.batch_size} is too close to {format_bytes(capacity_bytes)} for a prediction to be sure: "
        "planner preflight says not enough evidence; measure it with planner probe"
    ]
