"""What a plan says beyond the largest batch size, and the few further trials that it takes on a real GPU: the fastest
size and the knee, the largest that does not thrash, the micro-batch that reaches a global batch size.

Whatever runs the trials is passed in. Nothing is answered with a size that did not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

from planner.endurance import leak_of, needs_comparison, thrashing
from planner.throughput import MAX_TIMED, Accumulation, fastest, knee, next_to_time, speeds
from planner.trials import Outcome, Plan, Trial

Run = Callable[[int, bool, int], Trial]
"""Runs one trial: of its batch size, whether in a fresh process, and how many trials may still come, it included."""

RunWay = Callable[[Accumulation, int], Trial]
"""Runs one trial of a micro-batch that accumulates; how many may still come, it included."""

MAX_SUSPECTS = 2
"""Sizes that are tried because they are predicted to contradict a monotone result."""
MAX_THRASHING = 8
"""Trials spent on the largest size that does not thrash."""
MAX_ACCUMULATIONS = 3
"""Micro-batches that are timed for a global batch size."""
TIMED_STEPS = 4
"""Accumulation steps that such a trial takes at most: the optimizer's share of a step is small from there on."""
_CLEARLY_SLOWER = 0.97


def bytes_per_sample(predicted: Plan | None) -> float | None:
    """By how much the prediction's allocated bytes grow with the batch size near its answer."""
    fits = sorted(
        (trial.batch_size, trial.peaks.allocated_bytes) for trial in (predicted.trials if predicted else ())
        if trial.fits and trial.peaks is not None
    )  # fmt: skip
    if not fits:
        return None
    top, most = fits[-1]
    below = [pair for pair in fits if 1.1 * pair[0] <= top]
    return (most - below[-1][1]) / (top - below[-1][0]) if below else None


def suspects(predicted: Plan | None, began_at: int | None = None) -> tuple[int, ...]:
    """Sizes that a search may pass over, worth a trial each: those below the predicted answer that are predicted to run
    out of memory, and the answer itself where one of them lies above the size that the search ``began_at``."""
    if predicted is None or not predicted.max_batch_size:
        return ()
    largest = predicted.max_batch_size
    below = sorted({trial.batch_size for trial in predicted.trials if trial.batch_size < largest and not trial.fits})
    is_behind = began_at is not None and any(size > began_at for size in below)
    return (*below[-MAX_SUSPECTS:], *([largest] if is_behind else []))


def beyond_largest(
    run: Run, trials: Sequence[Trial], best: Trial, *, capacity_bytes: int, multiple_of: int, speed: bool
) -> tuple[dict[str, Any], list[str]]:
    """What there is to say of a measured search that ended with ``best``, as JSON data, and sentences that must be read
    beside its figures. ``trials`` holds what ran, and grows; with ``speed`` some smaller sizes are timed."""
    before = len(trials)
    if speed:
        time_sizes(run, trials, best.batch_size, multiple_of)
    else:
        compare_if_needed(run, trials, best, multiple_of)
    details, notes = leak_details(best, capacity_bytes)
    rough = thrashing(best, trials)
    if rough is not None:
        calm = without_thrashing(run, trials, best, multiple_of)
        details |= {"thrashing": rough.as_dict(), "largest_without_thrashing": calm}
        notes.append(f"{rough.sentence()}; {calm['batch_size']} ran without" if calm else rough.sentence())
    details |= speed_details(trials)
    if extra := trials[before:]:
        details["extra_trials"] = {"num_trials": len(extra), "duration_s": sum(trial.duration_s for trial in extra)}
    return details, notes


def leak_details(trial: Trial, capacity_bytes: int) -> tuple[dict[str, Any], list[str]]:
    """``leak`` as JSON data, and its sentence, where ``trial`` shows one."""
    leak = leak_of(trial, capacity_bytes)
    return ({}, []) if leak is None else ({"leak": leak.as_dict()}, [leak.sentence()])


def time_sizes(run: Run, trials: Sequence[Trial], largest: int, multiple_of: int = 1) -> None:
    """Time the sizes below ``largest`` that tell most about speed; ``trials`` holds what ran, and grows."""
    for left in range(MAX_TIMED, 0, -1):
        size = next_to_time(speeds(trials), largest, multiple_of)
        if size is None or not run(size, False, left).fits:
            return


def compare_if_needed(run: Run, trials: Sequence[Trial], best: Trial, multiple_of: int = 1) -> None:
    """Time one smaller size where the largest had retries, and none tells yet whether they cost time."""
    if needs_comparison(best) and not any(speed.batch_size < best.batch_size for speed in speeds(trials)):
        size = next_to_time(speeds(trials), best.batch_size, multiple_of)
        if size is not None:
            run(size, False, 1)


def without_thrashing(run: Run, trials: Sequence[Trial], largest: Trial, multiple_of: int = 1) -> dict[str, Any] | None:
    """The largest size that ran and does not thrash, as JSON data; ``None`` where ``largest`` does not thrash itself.

    ``first_thrashing_batch_size`` is the smallest size found above it that thrashes: the next one, where the trials
    sufficed to halve the distance down to that. The answer runs in a fresh process too.
    """
    if thrashing(largest, trials) is None:
        return None
    calm = [trial for trial in trials if _is_calm(trial, trials) and trial.batch_size < largest.batch_size]
    if not calm:
        return None
    low, high = max(calm, key=_size), largest.batch_size
    for left in range(MAX_THRASHING, 0, -1):
        gap = (high - low.batch_size) // multiple_of
        if gap <= 1:
            break
        trial = run(low.batch_size + gap // 2 * multiple_of, gap <= 2, left)
        if trial.outcome is Outcome.FAILED:
            break
        if _is_calm(trial, trials):
            low = trial
        else:
            high = trial.batch_size
    if not low.fresh_process:
        again = run(low.batch_size, True, 1)
        if _is_calm(again, trials):
            low = again
        else:
            high = low.batch_size
            low = max((trial for trial in calm if trial.batch_size < high), key=_size, default=low)
    return {
        "batch_size": low.batch_size,
        "first_thrashing_batch_size": high,
        "step_time_s": low.step_time_s,
        "samples_per_second": low.samples_per_second,
        "fresh_process": low.fresh_process,
        "source": str(low.source),
    }


def _size(trial: Trial) -> int:
    return trial.batch_size


def _is_calm(trial: Trial, trials: Iterable[Trial]) -> bool:
    return trial.fits and thrashing(trial, trials) is None


def speed_details(trials: Sequence[Trial]) -> dict[str, Any]:
    """``fastest`` and ``knee`` of the sizes that were timed, as JSON data; empty where none was."""
    timed = speeds(trials)
    best, enough = fastest(timed), knee(timed)
    if best is None or enough is None:
        return {}
    return {
        "fastest": {**best.as_dict(), "num_sizes_timed": len(timed)},
        "knee": {**enough.as_dict(), "share": enough.samples_per_second / best.samples_per_second},
    }


def accumulate(run: RunWay, ways: Iterable[Accumulation], *, is_measured: bool) -> list[tuple[Accumulation, Trial]]:
    """Trials of the micro-batches of ``ways``, the largest first, that fit: until some were timed, or one was clearly
    slower than the best; predicted: until one fits, since no speed is known that would choose between them."""
    found: list[tuple[Accumulation, Trial]] = []
    for way in islice(ways, 2 * MAX_ACCUMULATIONS):
        trial = run(way, MAX_ACCUMULATIONS - len(found))
        if not trial.fits:
            continue
        best = max((other.samples_per_second or 0.0 for _, other in found), default=0.0)
        found.append((way, trial))
        is_slower = (trial.samples_per_second or 0.0) < _CLEARLY_SLOWER * best
        if not is_measured or len(found) == MAX_ACCUMULATIONS or is_slower:
            break
    return found


def accumulation_details(global_batch_size: int, found: Sequence[tuple[Accumulation, Trial]]) -> dict[str, Any]:
    """The answer to ``train.global_batch_size`` as JSON data: the fastest way where speed was measured, else the one
    with the largest micro-batch; ``micro_batch_size`` is ``None`` where no way fits."""
    if not found:
        return {"global_batch_size": global_batch_size, "micro_batch_size": None}
    way, trial = max(found, key=lambda pair: (pair[1].samples_per_second or 0.0, pair[0].micro_batch_size))
    return {
        "global_batch_size": global_batch_size,
        "micro_batch_size": way.micro_batch_size,
        "accumulation_steps": way.accumulation_steps,
        "gpus": way.gpus,
        "samples_per_second": trial.samples_per_second,
        "timed_accumulation_steps": trial.samples_per_step // (trial.batch_size * way.gpus),
        "source": str(trial.source),
        "candidates": [
            {
                "micro_batch_size": each.micro_batch_size,
                "accumulation_steps": each.accumulation_steps,
                "samples_per_second": ran.samples_per_second,
            }
            for each, ran in found
        ],
    }
