"""The sentences that sum a sweep up: the largest, the fastest, what constraints and checkpointing cost.

One place writes them for the command line, the service and its pages. Only what is known is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from planner.specs.model import Headroom
from planner.specs.variants import Checkpointing
from planner.trials import Peaks, Plan, PlanStatus, Source
from planner.units import format_bytes

FIT_WORDS: Mapping[bool | None, str] = {True: "fits", False: "does not fit", None: "is not known to fit"}
"""What a plan for one batch size says of it, by its ``fits``; a note says of which leak where it is ``None``."""


def summary(plans: Sequence[Plan]) -> list[str]:
    """One sentence each: the largest, what constraints cost, the fastest, how a global batch size is reached, and what
    checkpointing costs and saves. Only what is known."""
    answered = [plan for plan in plans if plan.status is PlanStatus.PLANNED and _size(plan)]
    leaking = [plan for plan in plans if _is_unknown(plan)]
    if not answered and leaking:
        return [*_leaking(leaking)]
    if not answered:
        tried = [plan for plan in plans if plan.status is PlanStatus.PLANNED]
        asked = next((plan.batch_size for plan in tried), None)
        size = "even at the smallest batch size that was asked about" if asked is None else f"at batch size {asked}"
        nothing = f"Nothing fits: no variant runs {size}."
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
    if leak.get("in_cycles"):
        return f"{label} leaves {size} a step in reference cycles until Python's garbage collector runs"
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


def why_explained(batch_size: int | None, explanation: Mapping[str, Any]) -> str | None:
    """Why a size that does not fit is explained; ``None`` for one that fits. ``batch_size``: as in ``Plan``."""
    if explanation["fits"]:
        return None
    return "does not fit" if batch_size is not None else "the smallest that was asked about, and does not fit"
