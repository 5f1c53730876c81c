"""A step's memory events at any batch size, from traces at a few.

Almost every tensor's size is affine in the batch size, and the order of events does not depend on it; so the events
between two traced sizes, and beyond them, follow from the two. Peaks are *not* affine (blocks are reused, sizes
rounded), which is why the events are scaled and replayed rather than the peaks. Where two traces differ in their order
(a kernel takes another path above some size), the nearest trace with the same order as the next one up is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from planner.allocator import Events, Plans
from planner.virtual.trace import Trace


@dataclass(frozen=True, slots=True)
class Scaled:
    """The events at one batch size and where they come from."""

    events: Events
    trace: Trace
    """The trace whose order of events they have."""
    exact: bool
    """Traced at this very batch size, not scaled."""
    doubts: tuple[tuple[str, int, bool], ...]
    """``(operator, bytes that it may be off by, modelled)`` at this batch size, the largest of each operator."""
    surprising: bool = False
    """Traced at this very batch size, and not what smaller ones had foretold."""


class TraceFamily:
    """The traces of one variant, taken when they are needed: ``trace(batch_size)`` runs the step on the virtual
    device; ``start(batch_sizes)`` is told beforehand which of them come next, and ``is_done(batch_size)`` tells whether
    one that was started has ended."""

    def __init__(
        self,
        trace: Callable[[int], Trace],
        start: Callable[[Iterable[int]], None] = lambda batch_sizes: None,
        is_done: Callable[[int], bool] = lambda batch_size: True,
    ) -> None:
        self._trace = trace
        self._start = start
        self._is_done = is_done
        self._traces: dict[int, Trace] = {}
        self._checked = 0
        """The largest size at which a trace was what others had foretold; 0: none yet, or the last one was not."""

    @property
    def traced_sizes(self) -> tuple[int, ...]:
        return tuple(sorted(self._traces))

    def is_traced(self, batch_size: int) -> bool:
        """Whether ``traced`` need not wait."""
        return batch_size in self._traces or self._is_done(batch_size)

    def traced(self, batch_size: int) -> Scaled:
        """The events at ``batch_size`` from a trace of its own."""
        trace = self._traces.get(batch_size)
        if trace is None:
            trace = self._traces[batch_size] = self._trace(batch_size)
        doubts = _largest((doubt.operator, doubt.error.size(), doubt.modelled) for doubt in trace.doubts)
        return Scaled(events_of(trace, trace.sizes), trace, True, doubts)

    def scaled(self, batch_size: int) -> Scaled:
        """The events at ``batch_size``, scaled from the two nearest traces that agree, traced where there are none."""
        if batch_size in self._traces or batch_size < _FIRST[0]:
            return self.traced(batch_size)
        missing = [size for size in _FIRST if size not in self._traces]
        self._start(missing)
        for size in missing:
            self.traced(size)
        if batch_size in _FIRST:
            return self.traced(batch_size)
        pair = self._nearest_pair(batch_size)
        if pair is None:
            return self.traced(batch_size)
        low, high = pair
        first, second = self._traces[low], self._traces[high]
        sizes = [
            a if a == b else max(0, a + (b - a) * (batch_size - low) // (high - low))
            for a, b in zip(first.sizes, second.sizes, strict=True)
        ]
        found: dict[tuple[int, int], int] = {}  # calls that repeat share their formula
        for block, formula in first.formulas.items():
            other = second.formulas[block]
            key = id(formula), id(other)
            if key not in found:
                found[key] = formula.between(other, low, high, batch_size)
            sizes[block] = found[key]
        doubts = _largest(
            (doubt.operator, doubt.error.between(other.error, low, high, batch_size), doubt.modelled)
            for doubt, other in zip(first.doubts, second.doubts, strict=True)
        )
        return Scaled(events_of(second, sizes), second, False, doubts)

    def checked(self, batch_size: int, meanwhile: Callable[[Scaled], None] = lambda foretold: None) -> Scaled:
        """The events at ``batch_size`` as a trace has shown them: one at this size, or, where one that was taken to
        check how sizes scale was as foretold, scaled. That one speaks for the sizes below it and a few above: further
        up a kernel may take another path, so that another trace is taken. Between two traces of which one took another
        path than the other, no check speaks for any size.

        The only size that is asked for is traced alone. ``meanwhile`` is called with what was foretold once the trace
        that checks it has been started.
        """
        if not self._traces:
            return self.traced(batch_size)
        near = batch_size <= self._checked + max(_NEAR, self._checked // _NEAR)
        if self._checked and near and self._is_between_equals(batch_size):
            return self.scaled(batch_size)
        scaled = self.scaled(batch_size)
        if scaled.exact:
            return scaled
        self._start([batch_size])
        meanwhile(scaled)
        traced = self.traced(batch_size)
        agree = scaled.events.order == traced.events.order and list(scaled.events.sizes) == list(traced.events.sizes)
        self._checked = max(self._checked, batch_size) if agree else 0
        return traced if agree else replace(traced, surprising=True)

    def _is_between_equals(self, batch_size: int) -> bool:
        """Whether the traces next to ``batch_size`` have the same events."""
        below = max((size for size in self._traces if size <= batch_size), default=None)
        above = min((size for size in self._traces if size >= batch_size), default=None)
        return below is None or above is None or self._traces[below].events == self._traces[above].events

    def _nearest_pair(self, batch_size: int) -> tuple[int, int] | None:
        """Two traced sizes with the same events: around ``batch_size`` if possible, else the nearest below or above
        it, by their ratio to it."""
        by_distance = sorted(self._traces, key=lambda size: abs(math.log(size / batch_size)))
        for position, nearest in enumerate(by_distance):
            for other in by_distance[position + 1 :]:
                if self._traces[nearest].events == self._traces[other].events:
                    return min(nearest, other), max(nearest, other)
        return None


_FIRST = (2, 5)
"""Where a family is traced first. Not 1: dimensions of size 1 make tensors contiguous that otherwise are not."""

_NEAR = 8
"""A check speaks for so many samples above it, and for one in so many of its own: a search ends within five."""


def events_of(trace: Trace, sizes: list[int]) -> Events:
    """``trace``'s events with other sizes. A convolution whose workspace is refused goes on without one.

    Of 57,080 lists of plans that an H200 gave, each ended with such a one, mostly second to the sizes like the first.
    """
    plans = {block: Plans(number, (sizes[block], 0)) for block, number in trace.convolutions.items()}
    return Events(
        trace.events,
        sizes,
        plans=plans,
        steps=trace.steps,
        successors=trace.successors,
        library_bytes=trace.library_bytes,
        driver_bytes=trace.driver_bytes,
        first_kernel=trace.first_kernel,
    )


def _largest(doubts: Iterable[tuple[str, int, bool]]) -> tuple[tuple[str, int, bool], ...]:
    worst: dict[str, tuple[str, int, bool]] = {}
    for doubt in doubts:
        if doubt[1] > worst.get(doubt[0], ("", 0, True))[1]:
            worst[doubt[0]] = doubt
    return tuple(worst.values())
