"""A training step that leaves the device as it found it repeats: the steps after it follow without being traced."""

from __future__ import annotations

from planner.virtual.trace import Trace


def repeat_last_step(trace: Trace) -> bool:
    """Append the last step of ``trace`` once more, with its own blocks; ``False``, and nothing appended, where it may
    go otherwise.

    The trace ends with that step, the second one at least (the first one makes the optimizer's state). The step repeats
    if whatever it freed of earlier steps' blocks (gradients, the last loss) is replaced, one for one and in the order
    of allocation, by blocks of the same size and from the same operators that it left alive.
    """
    start, name = trace.marks[-1]
    last = trace.events[start:]
    own = {event for event in last if event >= 0}
    freed = {~event for event in last if event < 0}
    replaced = sorted(freed - own)
    left = sorted(own - freed)
    if [_kind(trace, block) for block in replaced] != [_kind(trace, block) for block in left]:
        return False
    again = len(trace.events) - start
    trace.phases += [(index + again, phase) for index, phase in trace.phases if index >= start]
    trace.mark(f"step {int(name.removeprefix('step ')) + 1}")
    # What the step did to a block of an earlier step, its copy does to the block that replaced it.
    copies = dict(zip(replaced, left, strict=True))
    for event in last:
        if event >= 0:
            copies[event] = trace.allocate_again(event)
        else:
            trace.free(copies[~event])
    return True


def _kind(trace: Trace, block: int) -> tuple[int, str]:
    return trace.sizes[block], trace.operators[block]
