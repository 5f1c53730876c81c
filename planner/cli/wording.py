"""How the CLI writes quantities and plans for people. JSON output never passes through here.

A plan is JSON data here (``planner.reports.plan_dict``), so that one read from a service reads like a local one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.reports import KIND_NAMES
from planner.summaries import FIT_WORDS, why_explained
from planner.trials import Outcome, Source, Trial
from planner.units import GIB, format_bytes


def gib(count: int | None) -> str:
    """Bytes as a bare number of GiB for a column headed GiB: ``16703815680`` -> ``"15.56"``; ``None`` -> ``"-"``."""
    return "-" if count is None else f"{count / GIB:.2f}"


def seconds(value: float | None) -> str:
    """A duration with the unit that reads best: ``0.0123`` -> ``"12.3 ms"``, ``75`` -> ``"1 min 15 s"``."""
    if value is None:
        return "-"
    if value < 0.9995:
        return f"{value * 1000:.1f} ms" if value < 0.09995 else f"{value * 1000:.0f} ms"
    if value < 59.5:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def whole_seconds(value: float) -> str:
    """An estimate or a running time: ``12.4`` -> ``"12 s"``."""
    return f"{value:.0f} s" if value < 59.5 else seconds(value)


def rate(value: float | None) -> str:
    """Samples per second, to the digits that matter."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def counted(number: int, noun: str) -> str:
    """``(1, "trial")`` -> ``"1 trial"``; ``(2, "trial")`` -> ``"2 trials"``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def status(plan: Mapping[str, Any]) -> str:
    return str(plan.get("status", "planned"))


def evidence(plan: Mapping[str, Any]) -> str:
    """``certified``, ``measured`` or ``predicted`` (never one for another); ``stored`` where it was read back."""
    if status(plan) != "planned":
        return status(plan)
    word = "certified" if plan.get("certified") else str(plan["source"])
    return f"{word}, stored" if plan.get("stored") else word


def trial_line(trial: Trial) -> str:
    """One finished trial: ``batch 8 fits: 12.40 GiB reserved (1.2 s)``; a prediction says that it is one."""
    parts = []
    if trial.peaks is not None and trial.fits:
        parts.append(f"{format_bytes(trial.peaks.reserved_bytes)} reserved")
    if trial.error and trial.outcome is Outcome.FAILED:
        parts.append(trial.error.strip().splitlines()[-1])
    word = _OUTCOMES[trial.source][trial.outcome]
    took = f" ({seconds(trial.duration_s)})" if trial.duration_s else ""
    return f"batch {trial.batch_size} {word}" + (f": {', '.join(parts)}" if parts else "") + took


_OUTCOMES = {
    Source.MEASURED: {Outcome.FITS: "fits", Outcome.OOM: "runs out of memory", Outcome.FAILED: "failed"},
    Source.PREDICTED: {
        Outcome.FITS: "is predicted to fit",
        Outcome.OOM: "is predicted to run out of memory",
        Outcome.FAILED: "could not be predicted",
    },
}


def sizes_line(plan: Mapping[str, Any]) -> str:
    """A plan's answer: ``largest batch size 9, 10 runs out of memory``."""
    if status(plan) != "planned":
        return f"{status(plan)}: {(plan.get('error') or {}).get('message', 'no reason was given')}"
    if plan.get("batch_size") is not None:
        return f"batch size {plan['batch_size']} {FIT_WORDS[plan.get('fits')]}"
    if not plan.get("max_batch_size"):
        return "not even one sample fits"
    first_oom = plan.get("first_oom_batch_size")
    return f"largest batch size {plan['max_batch_size']}" + (f", {first_oom} runs out of memory" if first_oom else "")


def answer_line(plan: Mapping[str, Any]) -> str:
    """The same with what stands behind it: ``... (certified, 2 trials)``."""
    if status(plan) != "planned":
        return sizes_line(plan)
    return f"{sizes_line(plan)} ({evidence(plan)}, {counted(plan.get('num_trials') or 0, 'trial')})"


def shares(plan: Mapping[str, Any]) -> str | None:
    """What takes most of the memory: ``batch size 9: activations 62%, gradients in flight 25%, optimizer state 7%``."""
    explanation = plan.get("explanation")
    if not explanation:
        return None
    peak = explanation["peaks"]["allocated"]
    ranked = sorted(peak["kinds"].items(), key=lambda item: -item[1])
    parts = [(KIND_NAMES[kind], round(100 * count / peak["allocated_bytes"])) for kind, count in ranked]
    named = ", ".join(f"{kind} {share}%" for kind, share in parts[:4] if share)
    why = why_explained(plan.get("batch_size"), explanation)
    return f"batch size {explanation['batch_size']}{f' ({why})' if why else ''}: {named}"
