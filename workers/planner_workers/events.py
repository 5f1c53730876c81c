"""What a sweep reports, as the entries of its job's event stream."""

from __future__ import annotations

from typing import Any

from planner.progress import (
    Progress,
    SweepFinished,
    SweepStarted,
    TrialFinished,
    TrialStarted,
    VariantFinished,
    VariantStarted,
)
from planner.reports import plan_dict, trial_dict


def event_of(progress: Progress) -> tuple[str, dict[str, Any]] | None:
    """``(kind, data)`` of the event, as JSON data; ``None`` for what the job's own state already says."""
    match progress:
        case SweepStarted(variants=variants):
            return "sweep_started", {"variants": [variant.as_dict() for variant in variants]}
        case VariantStarted(variant=variant, index=index):
            return "variant_started", {"variant": variant.as_dict(), "index": index}
        case TrialStarted():
            return "trial_started", {
                "variant": progress.variant.as_dict(),
                "batch_size": progress.batch_size,
                "low": progress.low,
                "high": progress.high,
                "remaining_trials": progress.remaining_trials,
                "fresh": progress.fresh,
            }
        case TrialFinished(variant=variant, trial=trial):
            return "trial_finished", {"variant": variant.as_dict(), "trial": trial_dict(trial)}
        case VariantFinished(plan=plan, index=index):
            return "variant_finished", {"variant": plan.variant.as_dict(), "index": index, "plan": plan_dict(plan)}
        case SweepFinished():
            return None
