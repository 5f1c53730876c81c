"""What the pages show of plans: one row for each question that was answered, and the chart of a GPU type."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from planner.summaries import FIT_WORDS, further_answers
from planner.trials import Plan, PlanStatus, Source
from planner.units import GIB, format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One plan as a row of a table. Sizes are in bytes; ``None`` shows as a dash."""

    id: str | None
    model: str
    spec_name: str | None
    variant: str
    capacity_bytes: int
    answer: str
    """Largest batch size, or whether the asked one fits."""
    first_oom_batch_size: int | None
    allocated_bytes: int | None
    reserved_bytes: int | None
    device_bytes: int | None
    interval: str | None
    """Predictions: where the true reserved peak is expected."""
    step_time_s: float | None
    samples_per_second: float | None
    num_alloc_retries: int
    evidence: str
    """``certified``, ``measured``, ``predicted``, ``unsupported`` or ``failed``: also the badge's class."""
    num_trials: int
    created_at: datetime | None
    remarks: tuple[str, ...]
    """The plan's notes, why it failed, and what it answers beside its batch size."""


def plan_row(plan: Plan) -> PlanRow:
    peaks, interval = plan.peaks, plan.reserved_interval
    error = (str(plan.error.get("message", "")),) if plan.error else ()
    return PlanRow(
        id=plan.id,
        model=plan.model,
        spec_name=plan.spec_name,
        variant=plan.variant.label(),
        capacity_bytes=plan.capacity_bytes,
        answer=_answer(plan),
        first_oom_batch_size=plan.first_oom_batch_size,
        allocated_bytes=peaks.allocated_bytes if peaks else None,
        reserved_bytes=peaks.reserved_bytes if peaks else None,
        device_bytes=peaks.device_bytes if peaks else None,
        interval=f"{format_bytes(interval.low_bytes)} to {format_bytes(interval.high_bytes)}" if interval else None,
        step_time_s=plan.step_time_s,
        samples_per_second=plan.samples_per_second,
        num_alloc_retries=0 if plan.fits is False else plan.num_alloc_retries,
        evidence=_evidence(plan),
        num_trials=len(plan.trials),
        created_at=plan.created_at,
        remarks=(*error, *plan.notes, *further_answers(plan)),
    )


def newest_answers(plans: Iterable[Plan]) -> list[Plan]:
    """Of ``plans`` (newest first) the first for each question and kind of evidence, sorted so that a measurement and
    the prediction of the same thing stand together."""
    newest: dict[tuple[Any, ...], Plan] = {}
    for plan in plans:
        newest.setdefault(_question(plan), plan)
    return [newest[key] for key in sorted(newest)]


def chart(plans: Sequence[Plan]) -> dict[str, Any] | None:
    """Peak reserved bytes against capacity in GiB, a bar for each plan in which anything fits; ``None`` without any.

    The peak of a size that ran out of memory is no bar: it is where it ended, not what it needs.
    """
    shown = [plan for plan in plans if plan.peaks is not None and plan.max_batch_size != 0 and plan.fits is not False]
    if not shown:
        return None
    several_models = len({plan.model for plan in shown}) > 1
    bars = []
    for plan in shown:
        assert plan.peaks is not None
        size = plan.batch_size if plan.batch_size is not None else plan.max_batch_size
        name = f"{plan.model}: {plan.variant.label()}" if several_models else plan.variant.label()
        bars.append(
            {
                "label": name,
                "group": plan.source.value,
                "batch_size": size,
                "allocated_gib": round(plan.peaks.allocated_bytes / GIB, 3),
                "reserved_gib": round(plan.peaks.reserved_bytes / GIB, 3),
                "capacity_gib": round(plan.capacity_bytes / GIB, 3),
            }
        )
    return {"bars": bars}


def _question(plan: Plan) -> tuple[Any, ...]:
    variant = plan.variant
    axes = tuple(
        list(type(value)).index(value) for value in (variant.precision, variant.checkpointing, variant.compile)
    )
    return (
        plan.model,
        plan.spec_hash,
        -plan.capacity_bytes,
        axes,
        variant.label(),
        plan.batch_size or 0,
        json.dumps(plan.question, sort_keys=True),
        plan.source is not Source.MEASURED,
    )


def _answer(plan: Plan) -> str:
    if plan.status is not PlanStatus.PLANNED:
        return "–"
    if plan.batch_size is not None:
        return f"{plan.batch_size:,} {FIT_WORDS[plan.fits]}"
    return "nothing fits" if plan.max_batch_size == 0 else f"{plan.max_batch_size:,}"


def _evidence(plan: Plan) -> str:
    if plan.status is not PlanStatus.PLANNED:
        return plan.status.value
    return "certified" if plan.certified else plan.source.value
