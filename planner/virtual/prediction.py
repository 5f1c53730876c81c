"""From scaled events to a trial: the replay under a capacity, and how far to trust it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.allocator import AllocatorConfig, Events
from planner.allocator.config import MIN_BLOCK_BYTES
from planner.units import MIB, format_bytes
from planner.virtual.replays import KeptReplays, Replays
from planner.virtual.scaling import Scaled, TraceFamily


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How far predictions were from measurements, on the cases of ``docs/prediction.md``."""

    relative: float
    """Half the interval's width, as a share of the bytes needed."""
    absolute_bytes: int
    basis: str


MEASURED_ACCURACY = Accuracy(
    relative=0.02,
    absolute_bytes=64 * MIB,
    basis="2% and 64 MiB either side: all but a few measured figures lay inside (docs/prediction.md)",
)

RULES_ONLY = Accuracy(
    relative=0.05,
    absolute_bytes=128 * MIB,
    basis="5% and 128 MiB either side: this architecture was never measured, only sm_90 was (docs/prediction.md)",
)
MEASURED_ARCHITECTURE = (9, 0)


def predict_trial(
    family: TraceFamily,
    batch_size: int,
    *,
    fresh: bool,
    config: AllocatorConfig,
    capacity_bytes: int,
    device_total_bytes: int,
    compute_capability: tuple[int, int],
    ahead: Sequence[int] = (),
    kept: KeptReplays | None = None,
    may_fork: bool = False,
) -> dict[str, Any]:
    """The outcome and peaks of ``batch_size`` under ``capacity_bytes``, as JSON data: of as many steps as a trial on a
    GPU would take.

    A ``fresh`` trial is one to rely on: its events are checked (``TraceFamily.checked``), and it says what is
    ``needed``, the smallest capacity under which the step runs, between its peak of allocated bytes and what it would
    reserve with no limit, with the interval that the true figure is expected in. Any other only narrows a search.

    While a trace is waited for, the sizes ``ahead`` are replayed, which may be asked for next; ``kept`` keeps them.
    What is left then is replayed in two processes where this one ``may_fork``.
    """
    start = time.perf_counter()
    kept = kept or KeptReplays()
    seconds_before: dict[Replays, float] = {}

    def replays_of(events: Events) -> Replays:
        found = kept.of(events, config, capacity_bytes, device_total_bytes)
        seconds_before.setdefault(found, found.seconds)
        return found

    used: set[Replays] = set()

    def beside(foretold: Scaled) -> None:
        replays = replays_of(foretold.events)
        used.add(replays)
        replays.make_all()
        for size in ahead:
            if family.is_traced(batch_size):
                break
            replays_of(family.scaled(size).events).make_all(lambda: family.is_traced(batch_size))

    # What is foretold is replayed beside the trace that checks it: most traces show just that.
    scaled = family.checked(batch_size, beside) if fresh else family.scaled(batch_size)
    replays = replays_of(scaled.events)
    used.add(replays)
    if fresh and may_fork:
        replays.make_all_in_two()
    limited, free = replays.limited, replays.free
    # Where memory ran out the peaks are those of a run with no limit: what the batch would take.
    peaks = limited if limited.fits else free
    reply: dict[str, Any] = {
        "fits": limited.fits,
        "peak_allocated_bytes": peaks.peak_allocated_bytes,
        "peak_reserved_bytes": peaks.peak_reserved_bytes,
        "num_alloc_retries": limited.num_alloc_retries,
        "num_steps": peaks.num_steps,
        "needed": None,
        "traced": scaled.exact,
        "traced_batch_sizes": list(family.traced_sizes),
        "unmodelled": sorted(operator for operator, _, modelled in scaled.doubts if not modelled),
        "notes": [*scaled.trace.notes, *([_SURPRISE] if scaled.surprising else [])],
    }
    if fresh:
        reply["allocated_after_step_bytes"] = allocated_after_steps(scaled)
        reply["in_cycles"] = scaled.trace.in_cycles
        without_update = needed_without_update(scaled, config, capacity_bytes, device_total_bytes)
        reply["needed"] = _interval(replays, scaled, compute_capability, without_update_bytes=without_update)
    if limited.oom is not None:
        reply["error"] = str(limited.oom.error)
    reply["num_events"], reply["num_replays"] = len(scaled.events), sum(each.number for each in used)
    replaying_s = sum(each.seconds - before_s for each, before_s in seconds_before.items())
    tracing_s = time.perf_counter() - start - replaying_s
    replay_s = sum(each.seconds for each in used)  # some of it beside an earlier trace
    reply["timings"] = {"tracing_s": round(tracing_s, 4), "replay_s": round(replay_s, 4)}
    return reply


def allocated_after_steps(scaled: Scaled) -> list[int]:
    """Allocated bytes at the end of each traced step, each block rounded up as the allocator does."""
    ends = {end for _, end in scaled.events.steps}
    found, live = [], 0
    for index, event in enumerate(scaled.events.order, start=1):
        size = -(-scaled.events.sizes[event if event >= 0 else ~event] // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
        live += size if event >= 0 else -size
        if index in ends:
            found.append(live)
    return found


def needed_without_update(
    scaled: Scaled, config: AllocatorConfig, capacity_bytes: int, device_total_bytes: int
) -> int | None:
    """The smallest capacity for a run whose every step is skipped by the gradient scaler; ``None`` where none skips a
    step.

    Whether gradients overflow follows from values, which are not here. *Measured* (``steps`` of fp16-amp in
    ``measurements/h200/unseen-4.json.gz`` and ``unseen-5.json.gz``): of 53 runs of three steps 17 skipped some, mostly
    the first ones and at batch sizes of a few samples.
    """
    index = scaled.trace.skippable_update
    if index is None:
        return None
    (start, _), *_ = scaled.events.steps
    first = replace(
        scaled.events,
        order=scaled.events.order[:index],
        steps=[(start, index)],
        successors=None,
        library_bytes={at: taken for at, taken in scaled.events.library_bytes.items() if at < index},
        driver_bytes={at: taken for at, taken in scaled.events.driver_bytes.items() if at < index},
    )
    return Replays(first, config, capacity_bytes, device_total_bytes).least_bytes


_SURPRISE = "traced size by size: memory events are not those that smaller batch sizes foretold"


def _interval(
    replays: Replays, scaled: Scaled, compute_capability: tuple[int, int], *, without_update_bytes: int | None
) -> dict[str, Any]:
    needed, least = replays.needed_bytes, replays.least_bytes
    accuracy = MEASURED_ACCURACY if compute_capability == MEASURED_ARCHITECTURE else RULES_ONLY
    doubt = int(needed * accuracy.relative) + accuracy.absolute_bytes
    basis = accuracy.basis
    for operator, size, modelled in scaled.doubts:
        doubt += size
        why = "its workspace is chosen by cuDNN" if modelled else "its temporary memory is not modelled"
        basis += f"; {operator}: {format_bytes(size)} either side, {why}"
    if least < needed:
        basis += f"; {format_bytes(least)} would suffice too, though not all between"
    less, more = replays.spread
    if less or more:
        basis += f"; {format_bytes(less)} less and {format_bytes(more)} more by where the driver places segments"
    if without_update_bytes is not None and without_update_bytes < least:
        least = without_update_bytes
        basis += f"; down to {format_bytes(least)} while gradients overflow, so that no step updates the weights"
    low, high = max(0, least - doubt - less), needed + doubt + more
    return {"bytes": needed, "low_bytes": low, "high_bytes": high, "basis": basis}
