"""Plans, trials, verdicts and GPU types as the contract's JSON.

One place writes them for the command line, the service and its pages. Everything here is JSON data: strings, numbers,
lists and dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from planner.advice import Advice
from planner.gpus import Gpu, default_capacity_bytes
from planner.trials import Environment, Interval, Peaks, Plan, Trial
from planner.verdicts import VariantVerdict, Verdict

ANSWERS = (
    "unconstrained", "headroom", "fastest", "knee", "thrashing", "largest_without_thrashing", "leak", "accumulation",
    "not_monotone", "extra_trials",
)  # fmt: skip
"""What a plan's details may answer beside the largest batch size (``planner.choices``); ``null`` where there is
nothing to say."""

KIND_NAMES: Mapping[str, str] = {
    "activations": "activations",
    "recomputed_activations": "recomputed activations",
    "gradients_in_flight": "gradients in flight",
    "temporaries": "temporaries",
    "parameters": "parameters",
    "cast_parameters": "parameters cast by autocast",
    "averaged_parameters": "averaged parameters",
    "buffers": "buffers",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "inputs": "inputs",
    "workspaces": "workspaces",
    "kept": "kept by the model",
}
"""The kinds of memory of an explanation (``planner.virtual.explanation.Kind``), for people, in the order of a table
where two are equal."""

SUM_NAMES: Mapping[str, str] = {
    "rounding_bytes": "rounding",
    "allocated_bytes": "= allocated",
    "cached_bytes": "cached, not in use",
    "reserved_bytes": "= reserved",
    "outside_bytes": "context and libraries",
    "device_bytes": "= device",
}
"""What the kinds of an explanation sum up to on the way to the device's bytes, and what comes on top, in order."""


def plan_dict(plan: Plan) -> dict[str, Any]:
    """A plan as ``probe`` and ``predict`` print it (contract, "JSON of probe and predict")."""
    if plan.batch_size is None:
        answer: dict[str, Any] = {
            "max_batch_size": plan.max_batch_size, "first_oom_batch_size": plan.first_oom_batch_size,
            "predicted_max_batch_size": plan.predicted_max_batch_size,
        }  # fmt: skip
    else:
        answer = {"batch_size": plan.batch_size, "fits": plan.fits}
    return {
        "variant": plan.variant.as_dict(),
        "gpu": plan.gpu,
        "capacity_bytes": plan.capacity_bytes,
        "source": str(plan.source),
        "measured_under_limit": plan.is_under_limit,
        "stands_for": plan.stands_for,
        "status": str(plan.status),
        **answer,
        "certified": plan.certified,
        **_peaks_dict(plan.peaks),
        "reserved_interval": _interval_dict(plan.reserved_interval),
        "num_alloc_retries": plan.num_alloc_retries,
        "step_time_s": plan.step_time_s,
        "samples_per_second": plan.samples_per_second,
        "num_trials": len(plan.trials),
        "trials": [trial_dict(trial) for trial in plan.trials],
        "explanation": plan.details.get("explanation"),
        "question": dict(plan.question),
        **{name: plan.details.get(name) for name in ANSWERS},
        "notes": list(plan.notes),
        "error": None if plan.error is None else dict(plan.error),
        "stored": plan.stored,
        "id": plan.id,
        "model": plan.model,
        "spec_name": plan.spec_name,
        "spec_hash": plan.spec_hash,
        "environment": environment_dict(plan.environment),
        "worker": plan.worker,
        "created_at": _time(plan.created_at),
    }


def trial_dict(trial: Trial) -> dict[str, Any]:
    return {
        "batch_size": trial.batch_size,
        "outcome": str(trial.outcome),
        "source": str(trial.source),
        **_peaks_dict(trial.peaks),
        "reserved_interval": _interval_dict(trial.reserved_interval),
        "num_alloc_retries": trial.num_alloc_retries,
        "step_times_s": list(trial.step_times_s),
        "fresh_process": trial.fresh_process,
        "error": trial.error,
        "details": dict(trial.details),
        "duration_s": trial.duration_s,
        "started_at": _time(trial.started_at),
    }


def environment_dict(environment: Environment) -> dict[str, Any]:
    data = asdict(environment)
    return {**data, "source": str(environment.source), "library_versions": dict(environment.library_versions)}


def verdict_dict(verdict: Verdict) -> dict[str, Any]:
    """A verdict as ``preflight --json`` prints it. ``fits`` is ``null`` where the evidence does not suffice."""
    return {
        "verdict": str(verdict.kind),
        "fits": _FITS[verdict.kind],
        "gpu": verdict.gpu,
        "batch_size": verdict.batch_size,
        "capacity_bytes": verdict.capacity_bytes,
        "model": verdict.model,
        "spec_name": verdict.spec_name,
        "spec_hash": verdict.spec_hash,
        "variants": [_variant_verdict_dict(variant) for variant in verdict.variants],
        "notes": list(verdict.notes),
    }


_FITS = {"fits": True, "does_not_fit": False, "unknown": None}


def _variant_verdict_dict(verdict: VariantVerdict) -> dict[str, Any]:
    return {
        "variant": verdict.variant.as_dict(),
        "verdict": str(verdict.kind),
        "fits": _FITS[verdict.kind],
        "reason": verdict.reason,
        "source": None if verdict.source is None else str(verdict.source),
        "stored": verdict.stored,
        "evidence_batch_size": verdict.evidence_batch_size,
        **_peaks_dict(verdict.peaks),
        "reserved_interval": _interval_dict(verdict.reserved_interval),
        "notes": list(verdict.notes),
    }


def gpu_dict(gpu: Gpu) -> dict[str, Any]:
    """A GPU type of the catalogue; ``measured`` names the byte counts that are not estimates."""
    return {
        "name": gpu.name,
        "driver_names": list(gpu.driver_names),
        "aliases": list(gpu.aliases),
        "compute_capability": list(gpu.compute_capability),
        "num_sms": gpu.num_sms,
        "total_bytes": gpu.total_bytes,
        "context_bytes": gpu.context_bytes,
        "library_bytes": gpu.library_bytes,
        "default_capacity_bytes": default_capacity_bytes(gpu),
        "measured": sorted(gpu.measured),
    }


def advice_dict(advice: Advice) -> dict[str, Any]:
    """What single changes are predicted to gain, the largest gain first."""
    return {
        "source": "predicted",
        "max_batch_size": advice.base.max_batch_size,
        "changes": [
            {
                "change": gain.change.label,
                "axis": gain.change.axis,
                "value": gain.change.value,
                "max_batch_size": gain.plan.max_batch_size,
                "gained_samples": gain.samples,
                "effect": gain.change.effect,
                "plan_id": gain.plan.id,
            }
            for gain in advice.gains
        ],
        "left_out": [{"change": change, "reason": reason} for change, reason in advice.left_out],
    }


def _peaks_dict(peaks: Peaks | None) -> dict[str, int | None]:
    return {
        "peak_allocated_bytes": peaks.allocated_bytes if peaks else None,
        "peak_reserved_bytes": peaks.reserved_bytes if peaks else None,
        "peak_device_bytes": peaks.device_bytes if peaks else None,
    }


def _interval_dict(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else asdict(interval)


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
