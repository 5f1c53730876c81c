"""A training step that leaves the device as it found it repeats: the steps after it follow without being traced."""

from __future__ import annotations

import copy
from dataclasses import replace

from planner.allocator import AllocatorConfig, replay
from planner.endurance import wants_another_step
from planner.virtual.scaling import Scaled, events_of
from planner.virtual.trace import Trace


def successors_of_last_step(trace: Trace) -> dict[int, int] | None:
    """The blocks of earlier steps that the last one frees, and which of its own it leaves in the place of each.

    ``None`` where another step may go otherwise. The last step is the second one at least (the first one makes the
    optimizer's state). It repeats if whatever it freed of earlier steps' blocks (gradients, the last loss) is replaced,
    one for one and in the order of allocation, by blocks of the same size and from the same operators that it left.
    """
    start, end = trace.steps[-1]
    last = trace.events[start:end]
    own = {event for event in last if event >= 0}
    freed = {~event for event in last if event < 0}
    replaced = sorted(freed - own)
    left = sorted(own - freed)
    if [_kind(trace, block) for block in replaced] != [_kind(trace, block) for block in left]:
        return None
    return dict(zip(replaced, left, strict=True))


def grown_in_last_step(trace: Trace) -> int:
    """How many bytes more the last step left than it found."""
    start, end = trace.steps[-1]
    return sum(trace.sizes[event] if event >= 0 else -trace.sizes[~event] for event in trace.events[start:end])


def repeat_last_step(trace: Trace) -> bool:
    """Append the last step of ``trace`` once more, with its own blocks; ``False``, and nothing appended, where it may
    go otherwise."""
    successors = successors_of_last_step(trace)
    if successors is None:
        return False
    start, end = trace.steps[-1]
    last = trace.events[start:end]
    number = len(trace.steps) + 1
    trace.phases += [(index + end - start, phase) for index, phase in trace.phases if index >= start]
    trace.mark(f"step {number}")
    # What the step did to a block of an earlier step, its copy does to the block that replaced it.
    copies = successors
    for event in last:
        if event >= 0:
            copies[event] = trace.allocate_again(event)
        else:
            trace.free(copies[~event])
    return True


def until_steady(
    scaled: Scaled, config: AllocatorConfig, capacity_bytes: int, device_total_bytes: int
) -> tuple[Scaled, bool]:
    """``scaled`` with as many steps as a trial would take, and whether they fit under ``capacity_bytes``.

    Where they do not, as many as a trial without a limit would take. Each step has events of its own, so that its
    blocks can be told from those of the others.
    """
    for limit in (capacity_bytes, None):
        result = replay(scaled.events, config, limit, device_total_bytes=device_total_bytes, goes_on=wants_another_step)
        if result.fits:
            break
    return _with_steps(scaled, result.num_steps), limit is not None


def _with_steps(scaled: Scaled, num_steps: int) -> Scaled:
    if len(scaled.events.steps) >= num_steps:
        return scaled
    trace = copy.deepcopy(scaled.trace)
    trace.sizes, trace.formulas, trace.successors = list(scaled.events.sizes), {}, None
    trace.marks = [mark for mark in trace.marks if mark[1] != "end"]
    while len(trace.steps) < num_steps and repeat_last_step(trace):
        pass
    trace.mark("end")
    return replace(scaled, events=events_of(trace, trace.sizes), trace=trace)


def _kind(trace: Trace, block: int) -> tuple[int, str]:
    return trace.sizes[block], trace.operators[block]
