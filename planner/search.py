"""The largest batch size that fits, from trials of whatever runs them: ask for the next one, tell what came of it.

From a right start two trials settle it: the start fits and the next size does not. Around a wrong one the search
gallops outward in growing steps until it has a bracket, then interpolates between measured peaks, then bisects. Without
a start it begins at 1, where galloping is doubling. With ``n`` the answer it asks at most ``2 * log2(n) + 12`` times,
plus confirmations. Pure: it knows no GPU, no clock and no store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from planner.trials import Outcome, Trial

LIMIT = 1 << 20
"""Where the search gives up to find an out of memory: no training loop has a larger batch."""
_MAX_JUMP = 16
"""How far above the largest size that ran an extrapolation may reach: what a wrong one costs is log2 of it."""
_GUESSES = 4
"""Interpolations allowed per search. More of them than that were not near a straight line: bisect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """The trial that the search wants next, and what it knows so far."""

    batch_size: int
    fresh: bool
    """Whether the trial should run in a process whose GPU was used for nothing else."""
    low: int
    """Largest batch size known to fit; 0 = none yet."""
    high: int | None
    """Smallest batch size above ``low`` known to run out of memory; ``None`` = none yet."""
    remaining_trials: int | None
    """At most so many trials to come, this one included, should none contradict another; ``None`` without ``high``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    max_batch_size: int | None
    """The largest size that ran and fitted; 0: one sample does not fit; ``None``: a failure ended the search."""
    first_oom_batch_size: int | None
    """``max_batch_size + 1`` where it ran out of memory; ``None`` when nothing did up to the limit."""
    certified: bool
    """Both sizes ran in fresh processes (when one sample does not fit: the one that ran out of memory did)."""
    trials: tuple[Trial, ...]
    """All of them, in the order in which they ran."""
    failure: Trial | None = None
    """The trial that ended the search: it failed twice, for a reason other than memory."""
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Trial | None:
        """The trial that decided ``max_batch_size``."""
        same = [trial for trial in self.trials if trial.batch_size == self.max_batch_size and trial.fits]
        return max(same, key=lambda trial: trial.fresh_process, default=None)


class Search:
    """One search, as ask and tell.

    ``start`` is where the answer is expected, ``capacity_bytes`` what interpolation aims at (without it: bisection).
    With ``confirm_fresh`` the two deciding trials are repeated in fresh processes if they ran in warm ones.
    """

    def __init__(
        self,
        *,
        start: int | None = None,
        limit: int = LIMIT,
        confirm_fresh: bool = False,
        capacity_bytes: int | None = None,
    ) -> None:
        self._limit = limit
        self._predicted = start is not None
        self._start = min(max(1 if start is None else start, 1), limit)
        self._confirm_fresh = confirm_fresh
        self._capacity_bytes = capacity_bytes
        self._guesses_left = _GUESSES
        self._trials: list[Trial] = []
        self._evidence: dict[int, Trial] = {}
        self._confirmed: set[int] = set()
        self._asked: Ask | None = None
        self._retry: Ask | None = None
        self._failure: Trial | None = None

    @property
    def low(self) -> int:
        return max((size for size, trial in self._evidence.items() if trial.fits), default=0)

    @property
    def high(self) -> int | None:
        low = self.low
        return min((size for size, trial in self._evidence.items() if size > low and not trial.fits), default=None)

    def ask(self) -> Ask | None:
        """The next trial to run, or ``None`` when the search is over. Asking again without telling asks the same."""
        if self._asked is None and self._failure is None:
            self._asked = self._next()
        return self._asked

    def tell(self, trial: Trial) -> None:
        """What came of the last ``ask``."""
        asked = self._asked
        if asked is None or asked.batch_size != trial.batch_size:
            raise ValueError(f"told of batch size {trial.batch_size}, which was not asked for")
        self._asked = None
        self._trials.append(trial)
        if trial.outcome is Outcome.FAILED:
            # Once may be an accident: the same again, in a fresh process where there is one to be had.
            if asked == self._retry:
                self._failure = trial
            else:
                self._asked = self._retry = replace(asked, fresh=self._confirm_fresh)
            return
        self._retry = None
        self._evidence[trial.batch_size] = trial
        if asked.fresh or trial.fresh_process:
            self._confirmed.add(trial.batch_size)

    def result(self) -> SearchResult:
        """The answer so far; the final one once ``ask`` returns ``None``."""
        low, high = self.low, self.high
        notes = list(self._notes())
        if self._failure is not None:
            notes.append(f"the search stopped at a trial that failed; the largest batch size that fitted is {low}")
            return SearchResult(
                max_batch_size=None, first_oom_batch_size=None, certified=False, trials=tuple(self._trials),
                failure=self._failure, notes=tuple(notes),
            )  # fmt: skip
        first_oom = high if high == low + 1 else None
        deciding = [self._evidence[size] for size in (low, first_oom) if size]
        return SearchResult(
            max_batch_size=low, first_oom_batch_size=first_oom, trials=tuple(self._trials), notes=tuple(notes),
            certified=first_oom is not None and all(trial.fresh_process for trial in deciding),
        )  # fmt: skip

    def _next(self) -> Ask | None:
        low, high = self.low, self.high
        settled = low >= self._limit or high == low + 1
        unconfirmed = [size for size in (low, high) if size and size not in self._confirmed] if settled else []
        if not self._confirm_fresh:
            unconfirmed = []
        if settled and not unconfirmed:
            return None
        size = unconfirmed[0] if unconfirmed else self._choose(low, high)
        likely_last = (high is not None and high - low <= 3) or (
            self._predicted and size in (self._start, self._start + 1)
        )
        return Ask(
            batch_size=size,
            fresh=self._confirm_fresh and (bool(unconfirmed) or likely_last),
            low=low,
            high=high,
            remaining_trials=len(unconfirmed) if unconfirmed else self._remaining(low, high),
        )

    def _choose(self, low: int, high: int | None) -> int:
        """A size strictly between ``low`` and ``high``."""
        if high is None:
            return min(self._above(low), self._limit)
        if low == 0:
            return max(high - self._step(self._start - high), 1)
        guess = self._interpolate()
        if guess is not None and guess < high and self._guesses_left:
            self._guesses_left -= 1
            return max(guess, low + 1)
        return (low + high) // 2

    def _above(self, low: int) -> int:
        """A size above ``low``, when nothing has run out of memory yet."""
        if low == 0:
            return self._start
        gallop = low + self._step(low - self._start)
        if self._predicted and low == self._start:
            return gallop
        guess = self._interpolate()
        if guess is not None and self._guesses_left:
            self._guesses_left -= 1
            return min(max(guess, low + 1), _MAX_JUMP * low)
        return min(max(gallop, self._proportional(low)), _MAX_JUMP * low)

    def _step(self, distance: int) -> int:
        """1 at the start, then as far again as the search has come from it, at least 1% of it."""
        return max(distance + 1, math.ceil(self._start / 100)) if distance > 0 else 1

    def _interpolate(self) -> int | None:
        """Where allocated bytes, affine in the batch size, would meet the capacity: a line through two sizes that ran.

        The allocator reserves more than tensors hold; the share seen at the larger of the two is taken to stay.
        """
        sizes = sorted(size for size, trial in self._evidence.items() if trial.fits and trial.peaks is not None)
        if self._capacity_bytes is None or len(sizes) < 2:
            return None
        top = sizes[-1]
        # Neighbours differ by rounding as much as by a sample: the line needs some length.
        base = next((size for size in reversed(sizes) if size * 1.1 <= top), None)
        peaks = self._evidence[top].peaks
        below = self._evidence[base].peaks if base is not None else None
        if base is None or peaks is None or below is None or peaks.allocated_bytes <= below.allocated_bytes:
            return None
        slope = (peaks.allocated_bytes - below.allocated_bytes) / (top - base)
        usable_bytes = self._capacity_bytes * peaks.allocated_bytes / max(peaks.reserved_bytes, 1)
        return top + int((usable_bytes - peaks.allocated_bytes) / slope)

    def _proportional(self, low: int) -> int:
        """A size that surely seems to fit: as if all of the reserved bytes grew with the batch size."""
        peaks = self._evidence[low].peaks
        if self._capacity_bytes is None or peaks is None or not self._predicted:
            return 0
        return int(low * self._capacity_bytes / max(peaks.reserved_bytes, 1))

    def _remaining(self, low: int, high: int | None) -> int | None:
        if high is None:
            return None
        bisections = math.ceil(math.log2(high - low))
        confirmations = 2 if self._confirm_fresh else 0
        if low == 0:  # galloping down, then back up between the last two steps
            return 2 * bisections + 1 + confirmations
        return bisections + (self._guesses_left if bisections > 1 else 0) + confirmations

    def _notes(self) -> Iterator[str]:
        fits = {trial.batch_size for trial in self._trials if trial.fits}
        ooms = {trial.batch_size for trial in self._trials if trial.outcome is Outcome.OOM}
        for size in sorted(fits & ooms):
            yield f"batch size {size} ran out of memory in one process and fitted in another"
        above = [(oom, fit) for oom in ooms - fits for fit in fits - ooms if oom < fit]
        if above:
            oom, fit = min(above)
            yield f"not monotone: batch size {oom} ran out of memory and {fit} fitted"
        if self.low >= self._limit:
            yield f"did not run out of memory up to batch size {self._limit}, where the search stops"


def search_max_batch(
    probe: Callable[[int, bool], Trial],
    *,
    start: int | None = None,
    limit: int = LIMIT,
    confirm_fresh: bool = False,
    capacity_bytes: int | None = None,
    observer: Callable[[Ask], None] | None = None,
) -> SearchResult:
    """Run a whole ``Search``: ``probe(batch_size, fresh)`` runs one trial, ``observer`` hears of each one before."""
    search = Search(start=start, limit=limit, confirm_fresh=confirm_fresh, capacity_bytes=capacity_bytes)
    while (asked := search.ask()) is not None:
        if observer is not None:
            observer(asked)
        search.tell(probe(asked.batch_size, asked.fresh))
    return search.result()
