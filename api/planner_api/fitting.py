"""What stored plans say about one batch size: the logic behind ``GET /v1/capacity``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from planner.trials import Plan, PlanStatus, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One plan's answer about a batch size."""

    plan: Plan
    fits: bool | None
    """``None``: the plan's evidence does not reach that batch size."""
    evidence_batch_size: int | None
    """The batch size that ran (or was predicted) and that the answer rests on."""


def judge(plan: Plan, batch_size: int) -> Fit:
    """Whether ``batch_size`` fits by ``plan``: at most a size that fits does, at least one that ran out does not."""
    if plan.batch_size is not None:
        largest = plan.batch_size if plan.fits else None
        smallest_oom = plan.batch_size if plan.fits is False else None
    else:
        largest, smallest_oom = plan.max_batch_size, plan.first_oom_batch_size
    if "headroom" in plan.question:  # it ran out of less than the capacity
        smallest_oom = None
    if "leak" in plan.details:  # it fitted for a few steps
        largest = None
    if largest is not None and batch_size <= largest:
        return Fit(plan=plan, fits=True, evidence_batch_size=largest)
    if smallest_oom is not None and batch_size >= smallest_oom:
        return Fit(plan=plan, fits=False, evidence_batch_size=smallest_oom)
    return Fit(plan=plan, fits=None, evidence_batch_size=None)


def best_answers(plans: Iterable[Plan], batch_size: int) -> list[Fit]:
    """The best evidence for each (GPU type, capacity, work, variant), in that order.

    A measurement beats a prediction, an answer beats none, and then the first of ``plans`` (the newest) wins.
    """
    best: dict[tuple[str, int, str, tuple[str, ...]], Fit] = {}
    for plan in plans:
        if plan.status is not PlanStatus.PLANNED:
            continue
        fit = judge(plan, batch_size)
        key = (plan.gpu, plan.capacity_bytes, plan.spec_hash, tuple(plan.variant.as_dict().values()))
        if key not in best or _rank(fit) > _rank(best[key]):
            best[key] = fit
    return [best[key] for key in sorted(best)]


def gpus_that_fit(answers: Iterable[Fit]) -> Iterator[str]:
    """GPU types with an answer that fits, each once, sorted."""
    yield from sorted({fit.plan.gpu for fit in answers if fit.fits})


def _rank(fit: Fit) -> tuple[bool, bool, bool]:
    return fit.fits is not None, fit.plan.source is Source.MEASURED, fit.plan.certified
