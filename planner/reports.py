"""Plans, trials, verdicts and GPU types as the contract's JSON, and the sentences that sum a sweep up.

One place writes them for the command line, the service and its pages. Everything here is JSON data: strings, numbers,
lists and dictionaries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

from planner.advice import Advice
from planner.gpus import Gpu, default_capacity_bytes
from planner.specs.model import Headroom
from planner.specs.variants import Checkpointing
from planner.trials import Environment, Interval, Peaks, Plan, PlanStatus, Source, Trial
from planner.units import format_bytes
from planner.verdicts import VariantVerdict, Verdict

ANSWERS = (
    "unconstrained", "headroom", "fastest", "knee", "thrashing", "largest_without_thrashing", "leak", "accumulation",
    "not_monotone", "extra_trials",
)  # fmt: skip
"""What a plan's details may answer beside the largest batch size (``planner.choices``); ``null`` where there is
nothing to say."""

FIT_WORDS: Mapping[bool | None, str] = {True: "fits", False: "does not fit", None: "is not known to fit"}
"""What a plan for one batch size says of it, by its ``fits``; a note says of which leak where it is ``None``."""

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


def why_explained(batch_size: int | None, explanation: Mapping[str, Any]) -> str | None:
    """Why a size that does not fit is explained; ``None`` for one that fits. ``batch_size``: as in ``Plan``."""
    if explanation["fits"]:
        return None
    return "does not fit" if batch_size is not None else "the smallest that was asked about, and does not fit"


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


def summary(plans: Sequence[Plan]) -> list[str]:
    """One sentence each: the largest, what constraints cost, the fastest, how a global batch size is reached, and what
    checkpointing costs and saves. Only what is known."""
    answered = [plan for plan in plans if plan.status is PlanStatus.PLANNED and _size(plan)]
    leaking = [plan for plan in plans if _is_unknown(plan)]
    if not answered and leaking:
        return [*_leaking(leaking)]
    if not answered:
        tried = [plan for plan in plans if plan.status is PlanStatus.PLANNED]
        nothing = "Nothing fits: no variant runs even at the smallest batch size that was asked about."
        return [nothing, *_constrained(tried), *_evaluated(tried)] if tried else []
    return [
        *_largest(answered), *_leaking(leaking), *_constrained(answered), *_fastest(answered), *_accumulated(answered),
        *_checkpointing(plans),
    ]  # fmt: skip


def further_answers(plan: Plan) -> list[str]:
    """What one plan says beside its batch size: the fastest where it is a smaller one, what constraints cost, how a
    global batch size is reached."""
    if plan.status is not PlanStatus.PLANNED or not _size(plan):
        return []
    timed = _speed(plan)
    fastest = _fastest([plan]) if timed and timed[0] != _size(plan) else ()
    return [*_constrained([plan]), *fastest, *_accumulated([plan])]


def _size(plan: Plan) -> int:
    """The batch size that the plan's figures are of; 0 = nothing fits."""
    if plan.batch_size is not None:
        return plan.batch_size if plan.fits else 0
    return plan.max_batch_size or 0


def _largest(plans: Sequence[Plan]) -> Iterator[str]:
    if plans[0].batch_size is not None:
        labels = ", ".join(plan.variant.label() for plan in plans)
        yield f"Batch size {plans[0].batch_size} fits with {labels} ({_word(plans)})."
        return
    most = max(map(_size, plans))
    best = [plan for plan in plans if _size(plan) == most]
    labels = " and ".join(plan.variant.label() for plan in best)
    yield f"Largest batch size: {most} with {labels} ({_word(best)})."
    for plan in best:
        if calm := plan.details.get("largest_without_thrashing"):
            yield f"Without thrashing: {calm['batch_size']} with {plan.variant.label()} ({calm['source']})."
        if "leak" in plan.details:
            yield f"{_leak(plan)}."


def _is_unknown(plan: Plan) -> bool:
    """Whether the one batch size that was asked about fitted for a few steps only."""
    return plan.status is PlanStatus.PLANNED and plan.batch_size is not None and plan.fits is None


def _leaking(plans: Sequence[Plan]) -> Iterator[str]:
    for plan in plans:
        yield f"Batch size {plan.batch_size} {FIT_WORDS[None]}: {_leak(plan)} ({plan.source})."


def _leak(plan: Plan) -> str:
    leak = plan.details["leak"]
    label, size = plan.variant.label(), format_bytes(leak["bytes_per_step"])
    return f"{label} leaks {size} a step: memory runs out after about {leak['steps_left']} more steps"


def _constrained(plans: Sequence[Plan]) -> Iterator[str]:
    """What the spec's search section costs, in samples."""
    costs = []
    for plan in plans:
        free = plan.details.get("unconstrained")
        if free and free["max_batch_size"] != plan.max_batch_size:
            label, most = plan.variant.label(), free["max_batch_size"]
            costs.append(f"{plan.max_batch_size} in place of {most} ({free['source']}) with {label}")
    if costs:
        yield f"With {_constraints(plans[0].question)}: {', '.join(costs)}."


def _evaluated(plans: Sequence[Plan]) -> Iterator[str]:
    """Where it is the evaluation, whose batch size the search does not change, that takes the most and does not fit."""
    found = [
        plan.variant.label()
        for plan in plans
        if (explained := plan.details.get("explanation"))
        and not explained["fits"]
        and explained["peaks"]["allocated"]["when"].startswith("evaluation,")
    ]
    if found:
        yield f"The evaluation takes the most memory with {', '.join(found)}: see train.evaluation.batch_size."


def _constraints(question: Mapping[str, Any]) -> str:
    words = []
    if "multiple_of" in question:
        words.append(f"multiples of {question['multiple_of']}")
    if "max_batch_size" in question:
        words.append(f"at most {question['max_batch_size']}")
    if "headroom" in question:
        words.append(f"a headroom of {Headroom(**question['headroom'])}")
    return " and ".join(words)


def _accumulated(plans: Sequence[Plan]) -> Iterator[str]:
    answers = [(plan, plan.details["accumulation"]) for plan in plans if "accumulation" in plan.details]
    reached = [(plan, answer) for plan, answer in answers if answer["micro_batch_size"]]
    if not answers:
        return
    if not reached:
        yield f"No micro-batch that fits makes exactly {answers[0][1]['global_batch_size']} samples a step."
        return
    plan, answer = max(reached, key=lambda pair: (pair[1]["samples_per_second"] or 0.0, pair[1]["micro_batch_size"]))
    rate = answer["samples_per_second"]
    speed = f"{rate:.1f} samples per second, measured" if rate else "predicted; its speed is not"
    steps = answer["accumulation_steps"]
    gpus = f" on each of {answer['gpus']} GPUs" if answer["gpus"] > 1 else ""
    yield (
        f"{answer['global_batch_size']} samples a step: {steps} micro-batch{'' if steps == 1 else 'es'} of "
        f"{answer['micro_batch_size']}{gpus} with {plan.variant.label()} ({speed})."
    )


def _word(plans: Sequence[Plan]) -> str:
    if all(plan.certified for plan in plans):
        return "certified"
    return " and ".join(sorted({str(plan.source) for plan in plans}))


def _fastest(plans: Sequence[Plan]) -> Iterator[str]:
    timed = [(plan, *speed) for plan in plans if (speed := _speed(plan))]
    if not timed:
        yield "Fastest: not known; speed is not predicted, only measured on a GPU."
        return
    best, size, rate = max(timed, key=lambda entry: entry[2])
    untimed = "" if len(timed) == len(plans) else f", of {len(timed)} variants with measured step times"
    knee = best.details.get("knee")
    near = f"; {knee['batch_size']} has {knee['share']:.0%} of it" if knee and knee["batch_size"] < size else ""
    yield (
        f"Fastest: {rate:.1f} samples per second with {best.variant.label()} at batch size {size} "
        f"(measured{untimed}){near}."
    )


def _speed(plan: Plan) -> tuple[int, float] | None:
    """The fastest batch size that was timed, and its samples per second."""
    if plan.source is not Source.MEASURED:
        return None
    if fastest := plan.details.get("fastest"):
        return fastest["batch_size"], fastest["samples_per_second"]
    return None if plan.samples_per_second is None else (_size(plan), plan.samples_per_second)


def _checkpointing(plans: Sequence[Plan]) -> Iterator[str]:
    """A sentence for each variant with checkpointing that has a twin without."""
    twins = {plan.variant: plan for plan in plans if plan.status is PlanStatus.PLANNED}
    for plan in twins.values():
        variant = plan.variant
        plain = twins.get(replace(variant, checkpointing=Checkpointing.NONE))
        if variant.checkpointing is Checkpointing.NONE or plain is None or _is_unknown(plain) or not _size(plan):
            continue
        what = f"Checkpointing {variant.checkpointing} with {plain.variant.label()}"
        if not _size(plain):
            yield f"{what} is what makes it fit: without it {_not_even(plain)}."
            continue
        yield f"{what} {_saving(plan, plain)}, {_cost(plan, plain)}."


def _not_even(plan: Plan) -> str:
    return "one sample does not fit" if plan.batch_size is None else f"batch size {plan.batch_size} does not fit"


def _saving(plan: Plan, plain: Plan) -> str:
    """Bytes at an equal batch size where both ran one, else allocated bytes per sample at each one's own size.

    An equal size far below what fits would mostly compare the weights.
    """
    sizes = {size for size in _fitting(plan).keys() & _fitting(plain).keys() if 2 * size >= _size(plain)}
    if sizes:
        size = max(sizes)
        with_it, without = _fitting(plan)[size].allocated_bytes, _fitting(plain)[size].allocated_bytes
        text = (
            f"{_saved(with_it, without)} of the allocated bytes at batch size {size} "
            f"({format_bytes(with_it)} in place of {format_bytes(without)})"
        )
    elif plan.peaks and plain.peaks:
        text = (
            f"{_saved(plan.peaks.allocated_bytes / _size(plan), plain.peaks.allocated_bytes / _size(plain))} of the "
            f"allocated bytes per sample, weights included, at batch sizes {_size(plan)} and {_size(plain)}"
        )
    else:
        text = "saves an unknown share of memory"
    if plan.batch_size is None:
        text += f" and allows batch size {_size(plan)} in place of {_size(plain)}"
    return f"{text} ({_word([plan, plain])})"


def _saved(with_it: float, without: float) -> str:
    share = round(100 * (1 - with_it / without)) if without else 0
    return f"saves {share}%" if share >= 0 else f"takes {-share}% more"


def _fitting(plan: Plan) -> dict[int, Peaks]:
    # The first of each: later ones may accumulate.
    found = reversed(plan.trials)
    return {trial.batch_size: trial.peaks for trial in found if trial.fits and trial.peaks is not None}


def _cost(plan: Plan, plain: Plan) -> str:
    if plan.source is not Source.MEASURED or plain.source is not Source.MEASURED:
        return "at a cost in step time that is not predicted, so whether it pays cannot be said"
    if not plan.samples_per_second or not plain.samples_per_second:
        return "at a cost in step time that was not measured"
    added = round(100 * (plain.samples_per_second / plan.samples_per_second - 1))
    if added == 0:
        return "takes the same step time per sample (measured), and pays"
    if added < 0:
        return f"takes {-added}% less step time per sample (measured), and pays"
    return f"adds {added}% step time per sample (measured), and pays only where the larger batch itself is needed"
