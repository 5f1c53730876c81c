"""The largest batch size that fits, from trials of whatever runs them: ask for the next one, tell what came of it.

From a right start two trials settle it: the start fits and the next size does not. Around a wrong one the search steps
outward, each step twice the last, until it has a bracket. Wherever two sizes that ran give a line through their
allocated bytes, it goes to where that line meets the capacity; once there is a bracket, never at the price of more than
two trials beyond what halving it would take. Without a start it begins at 1, or as told; where it is not to look beyond
the answer, since trials cost seconds, it takes a short step only where it can still end in as many trials as a
bisection (1, 2, 4, ..., then halving). Pure: it knows no GPU, no clock and no store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from planner.trials import Outcome, Source, Trial

LIMIT = 1 << 20
"""Where the search gives up to find an out of memory: no training loop has a larger batch."""
_MAX_JUMP, _MAX_THRIFTY_JUMP = 16, 8
"""How many times the largest size that ran an extrapolation may reach: what a wrong one costs is log2 of it."""
_SPARE = 2
"""Trials that guessing may cost beyond halving the bracket."""


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
    """The largest size that ran and fitted; 0: the smallest does not fit; ``None``: a failure ended the search."""
    first_oom_batch_size: int | None
    """The next size (``max_batch_size`` + ``multiple_of``) where it ran out of memory; ``None`` when nothing did."""
    certified: bool
    """Both sizes ran in fresh processes (when the smallest does not fit: the one that ran out of memory did)."""
    trials: tuple[Trial, ...]
    """All of them, in the order in which they ran."""
    oom_below: tuple[int, ...] = ()
    """Sizes below ``max_batch_size`` that ran out of memory whenever they were tried: the result is not monotone."""
    failure: Trial | None = None
    """The trial that ended the search: it failed twice, for a reason other than memory."""
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Trial | None:
        """The trial that decided ``max_batch_size``."""
        same = [trial for trial in self.trials if trial.batch_size == self.max_batch_size and trial.fits]
        return max(reversed(same), key=lambda trial: trial.fresh_process, default=None)


class Search:
    """One search, as ask and tell.

    ``start`` is where the answer is expected (``first`` where a search begins that expects nothing), ``capacity_bytes``
    what interpolation aims at (without it: bisection) and ``bytes_per_sample`` by how much allocated bytes are expected
    to grow with the batch size. Only multiples of ``multiple_of`` up to ``limit`` are asked for; ``limit_name`` is what
    the limit is called in a note. ``suspects`` are sizes that are expected to contradict a monotone result: each is
    tried once before the search ends, and so are ``look_beyond`` sizes above the first that runs out of memory. With
    ``confirm_fresh`` the two deciding trials are repeated in fresh processes if they ran in warm ones.
    """

    # Inside, sizes are counted in units of ``multiple_of``.

    def __init__(
        self,
        *,
        start: int | None = None,
        first: int = 1,
        limit: int = LIMIT,
        limit_name: str | None = None,
        multiple_of: int = 1,
        suspects: Collection[int] = (),
        look_beyond: int = 0,
        confirm_fresh: bool = False,
        capacity_bytes: int | None = None,
        bytes_per_sample: float | None = None,
    ) -> None:
        if limit < multiple_of:
            raise ValueError(f"no multiple of {multiple_of} is at most {limit}")
        self._unit = multiple_of
        self._limit, self._limit_name = limit // multiple_of, limit_name
        self._predicted = start is not None
        self._start = min(max((first if start is None else start) // multiple_of, 1), self._limit)
        self.expect(suspects=suspects, bytes_per_sample=bytes_per_sample)
        self._look_beyond = look_beyond
        self._confirm_fresh = confirm_fresh
        self._is_thrifty = start is None and not look_beyond
        """Whether nothing is expected and trials are dear: it may not take more of them than a bisection."""
        self._capacity_bytes = capacity_bytes
        self._trials: list[Trial] = []
        self._evidence: dict[int, Trial] = {}
        self._confirmed: set[int] = set()
        self._num_steps = 0
        """Steps outward since the last jump or change of direction."""
        self._allowance: int | None = None
        """Trials that a bracket may still take; ``None`` without one."""
        self._asked: Ask | None = None
        self._retry: Ask | None = None
        self._failure: Trial | None = None

    @property
    def _low(self) -> int:
        return max((size for size, trial in self._evidence.items() if trial.fits), default=0)

    @property
    def _high(self) -> int | None:
        low = self._low
        return min((size for size, trial in self._evidence.items() if size > low and not trial.fits), default=None)

    def expect(self, *, suspects: Collection[int], bytes_per_sample: float | None) -> None:
        """What was found out since the search began; as the arguments of the same names."""
        self._suspects = sorted({size // self._unit for size in suspects if size % self._unit == 0})
        self._slope = None if bytes_per_sample is None else bytes_per_sample * self._unit

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
        size = trial.batch_size // self._unit
        self._evidence[size] = trial
        if asked.fresh or trial.fresh_process:
            self._confirmed.add(size)
        if self._allowance is not None:
            self._allowance -= 1
        if len(self._trials) > 1 and self._trials[-2].outcome is not trial.outcome:
            self._num_steps = 0

    def result(self) -> SearchResult:
        """The answer so far; the final one once ``ask`` returns ``None``."""
        low, high = self._low, self._high
        below = contradictions(self._trials, low * self._unit)
        notes = list(self._notes())
        if self._failure is not None:
            fitted = low * self._unit
            notes.append(f"the search stopped at a trial that failed; the largest batch size that fitted is {fitted}")
            return SearchResult(
                max_batch_size=None, first_oom_batch_size=None, certified=False, trials=tuple(self._trials),
                oom_below=below, failure=self._failure, notes=tuple(notes),
            )  # fmt: skip
        first_oom = high if high == low + 1 else None
        deciding = [self._evidence[size] for size in (low, first_oom) if size]
        return SearchResult(
            max_batch_size=low * self._unit, first_oom_batch_size=first_oom and first_oom * self._unit,
            trials=tuple(self._trials), oom_below=below, notes=tuple(notes),
            certified=first_oom is not None and all(trial.fresh_process for trial in deciding),
        )  # fmt: skip

    def _next(self) -> Ask | None:
        low, high = self._low, self._high
        settled = low >= self._limit or high == low + 1
        unconfirmed = [size for size in (low, high) if size and size not in self._confirmed] if settled else []
        if not self._confirm_fresh:
            unconfirmed = []
        suspects = self._untried_suspects(high)
        waiting = [*unconfirmed, *suspects] if settled else []
        if settled and not waiting:
            return None
        size = waiting[0] if waiting else self._choose(low, high)
        likely_last = (high is not None and high - low <= 3) or (self._predicted and abs(size - self._start) <= 1)
        return Ask(
            batch_size=size * self._unit,
            fresh=self._confirm_fresh and (settled or likely_last),
            low=low * self._unit,
            high=high and high * self._unit,
            remaining_trials=len(waiting) if settled else self._remaining(low, high, len(suspects)),
        )

    def _untried_suspects(self, high: int | None) -> list[int]:
        beyond = [] if high is None else [high + 1 + step for step in range(self._look_beyond)]
        sizes = dict.fromkeys([*self._suspects, *beyond])
        return [size for size in sizes if 0 < size <= self._limit and size not in self._evidence]

    def _choose(self, low: int, high: int | None) -> int:
        """A size strictly between ``low`` and ``high``."""
        if high is None:
            self._allowance = None
            return min(self._above(low), self._limit)
        if low == 0:
            return max(high - self._step(high), 1)
        if self._allowance is None:
            self._allowance = _halvings(high - low) + self._spare(low, high)
        guess = self._aim(low, high)
        if guess is not None and 1 + _halvings(max(guess - low, high - guess)) <= self._allowance:
            return guess
        return (low + high) // 2

    def _above(self, low: int) -> int:
        """A size above ``low``, when nothing has run out of memory yet."""
        if low == 0:
            return self._start
        expected = self._expected()
        just_started = self._predicted and low == self._start
        if expected is None and not self._predicted:
            return 2 * low
        if expected is not None and expected >= low + max(1, low // 10) and not just_started:
            self._num_steps = 0
            reach = _MAX_THRIFTY_JUMP if self._is_thrifty else _MAX_JUMP
            size = min(expected, (reach if low > 2 else 2) * low)  # one and two samples say too little for a jump
        else:
            step = low + self._step(low)
            size = step if expected is None or just_started else max(step, expected)
        return self._as_soon_as_doubling(low, size) if self._is_thrifty else size

    def _as_soon_as_doubling(self, low: int, size: int) -> int:
        """``size``, or the next power of two: short steps may not bring the search there later than doubling from 1
        would, and leave enough to halve what is left."""
        power = 1 << low.bit_length()
        spare = _bisection(low) - len(self._trials) - 2
        is_soon = len(self._trials) + 2 <= power.bit_length() and _halvings(max(power - size, 1)) <= spare
        return size if size >= power or is_soon else power

    def _spare(self, low: int, high: int) -> int:
        """Trials that guessing may cost in this bracket."""
        left = _bisection(low) - len(self._trials) - _halvings(high - low)
        return max(0, min(_SPARE, left)) if self._is_thrifty else _SPARE

    def _aim(self, low: int, high: int) -> int | None:
        """The most telling size in a bracket: where the answer is expected, or else a step inward from the end that
        the expectation is nearest to; ``None`` where there is nothing to go by but the bracket."""
        expected = self._expected()
        if expected is None:
            return None
        if expected <= low:
            return min(low + self._step(low), high - 1)
        if expected < high:
            return expected
        # Wrong, and from far away by much: the middle gives a better line.
        return max(high - self._step(high), low + 1) if 2 * low >= high else None

    def _step(self, at: int) -> int:
        """1, then twice as far each time, from the second on at least 1% of where it starts."""
        self._num_steps += 1
        return 1 if self._num_steps == 1 else max(2, math.ceil(at / 100)) << (self._num_steps - 2)

    def _expected(self) -> int | None:
        """Where allocated bytes, affine in the batch size, would meet the capacity: a line through two sizes that ran,
        or through one with the slope that was expected.

        The allocator reserves more than tensors hold; the share seen at the largest that ran is taken to stay.
        """
        sizes = sorted(size for size, trial in self._evidence.items() if trial.fits and trial.peaks is not None)
        if self._capacity_bytes is None or not sizes:
            return None
        top = sizes[-1]
        peaks = self._evidence[top].peaks
        assert peaks is not None
        slope = self._measured_slope(sizes) or self._slope
        if slope is None:
            return None
        usable_bytes = self._capacity_bytes * peaks.allocated_bytes / max(peaks.reserved_bytes, 1)
        return top + int((usable_bytes - peaks.allocated_bytes) / slope)

    def _measured_slope(self, sizes: list[int]) -> float | None:
        """Bytes per unit between the largest of ``sizes`` and the next that is far enough from it to tell."""
        top = sizes[-1]
        # Neighbours differ by rounding as much as by a sample: the line needs some length.
        base = next((size for size in reversed(sizes) if size * 1.1 <= top), None)
        if base is None:
            return None
        peaks, below = self._evidence[top].peaks, self._evidence[base].peaks
        assert peaks is not None
        assert below is not None
        slope = (peaks.allocated_bytes - below.allocated_bytes) / (top - base)
        return slope if slope > 0 else None

    def _remaining(self, low: int, high: int | None, num_suspects: int) -> int | None:
        if high is None:
            return None
        confirmations = (2 if self._confirm_fresh else 0) + num_suspects
        if low == 0:  # down in growing steps, then a bracket between the last two
            return 2 * _halvings(high) + 1 + _SPARE + confirmations
        spare = _halvings(high - low) + _SPARE if self._allowance is None else self._allowance
        return spare + confirmations

    def _notes(self) -> Iterator[str]:
        fits = {trial.batch_size for trial in self._trials if trial.fits}
        ooms = {trial.batch_size for trial in self._trials if trial.outcome is Outcome.OOM}
        predicted = {trial.batch_size for trial in self._trials if trial.source is Source.PREDICTED}
        for size in sorted((fits & ooms) - predicted):  # predicted: a trace put one that was foretold right
            yield f"batch size {size} ran out of memory in one process and fitted in another"
        if self._low >= self._limit:
            name = f" ({self._limit_name})" if self._limit_name else ""
            yield (
                f"did not run out of memory up to batch size {self._limit * self._unit}, where the search "
                f"stops{name}: not certified as the largest"
            )


def contradictions(trials: Sequence[Trial], largest: int) -> tuple[int, ...]:
    """Batch sizes below ``largest`` that ran out of memory whenever they were tried: fitting is not monotone."""
    fits = {trial.batch_size for trial in trials if trial.fits}
    ooms = {trial.batch_size for trial in trials if trial.outcome is Outcome.OOM}
    return tuple(sorted(size for size in ooms - fits if size < largest))


def contradiction_note(trials: Sequence[Trial], below: Sequence[int]) -> str:
    """What must be said of ``contradictions``."""
    fit = min(trial.batch_size for trial in trials if trial.fits and trial.batch_size > below[-1])
    listed = ", ".join(map(str, below[:_MOST_NAMED])) + (
        f" and {len(below) - _MOST_NAMED} more" if below[_MOST_NAMED:] else ""
    )
    sizes = f"batch size{'s' if below[1:] else ''} {listed}"
    if any(trial.source is Source.PREDICTED for trial in trials):
        return (
            f"not monotone: {sizes} {'are' if below[1:] else 'is'} predicted to run out of memory and {fit} to fit; so "
            "near the capacity fragmentation decides"
        )
    return (
        f"not monotone: {sizes} ran out of memory and {fit} fitted; train with a size that ran, since any other may "
        "run out of memory"
    )


_MOST_NAMED = 8


def _halvings(gap: int) -> int:
    """Trials that bisection needs to close a bracket that is ``gap`` wide."""
    return math.ceil(math.log2(gap))


def _bisection(largest: int) -> int:
    """Trials of 1, 2, 4, ... until one runs out of memory, then of halving that bracket."""
    return 2 * int(math.log2(largest)) + 2


def search_max_batch(
    probe: Callable[[int, bool], Trial],
    *,
    start: int | None = None,
    limit: int = LIMIT,
    multiple_of: int = 1,
    suspects: Collection[int] = (),
    look_beyond: int = 0,
    confirm_fresh: bool = False,
    capacity_bytes: int | None = None,
    bytes_per_sample: float | None = None,
    observer: Callable[[Ask], None] | None = None,
) -> SearchResult:
    """Run a whole ``Search``: ``probe(batch_size, fresh)`` runs one trial, ``observer`` hears of each one before."""
    search = Search(
        start=start, limit=limit, multiple_of=multiple_of, suspects=suspects, look_beyond=look_beyond,
        confirm_fresh=confirm_fresh, capacity_bytes=capacity_bytes, bytes_per_sample=bytes_per_sample,
    )  # fmt: skip
    while (asked := search.ask()) is not None:
        if observer is not None:
            observer(asked)
        search.tell(probe(asked.batch_size, asked.fresh))
    return search.result()
