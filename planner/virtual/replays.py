"""The replays that a prediction is made of: under the capacity, under none, under less, and at other addresses.

All but the last take as many steps as a trial on a GPU would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import chain

from planner.allocator import AllocatorConfig, Events, ReplayResult, replay
from planner.allocator.driver import AddressSpace, ScatteredAddresses, TopDownAddresses
from planner.endurance import wants_another_step
from planner.forks import Fork
from planner.units import MIB


class Replays:
    """Of one batch size's events, each replay made when it is first asked for."""

    def __init__(
        self, events: Events, config: AllocatorConfig, capacity_bytes: int | None, device_total_bytes: int
    ) -> None:
        self.events, self.config, self.capacity_bytes = events, config, capacity_bytes
        self._device_total_bytes = device_total_bytes
        self._made: dict[int | None, ReplayResult] = {}
        self._reserved_elsewhere: list[int] = []
        self.number = 0
        """Made so far."""
        self.seconds = 0.0
        """What they took."""

    @property
    def limited(self) -> ReplayResult:
        """Under the capacity."""
        return self._under(self.capacity_bytes)

    @cached_property
    def free(self) -> ReplayResult:
        """Under no limit."""
        limited = self.limited
        # A limit that was never met changes nothing, unless the garbage collector goes by it.
        unmet = limited.fits and not limited.num_alloc_retries and not self.config.garbage_collection_threshold
        return limited if unmet else self._under(None)

    @property
    def least_bytes(self) -> int:
        """The smallest capacity that suffices, by bisection, to 1/256 of what is needed. It may be less than the
        capacity and this not suffice: cached blocks are given back elsewhere."""
        return list(self._narrowing())[-1]

    @property
    def needed_bytes(self) -> int:
        """The same among those that are not less than the capacity, where this does not suffice."""
        return [self.least_bytes, *self._narrowing_beyond()][-1]

    @property
    def spread(self) -> tuple[int, int]:
        """Bytes less and more that the step reserves where the driver places its segments elsewhere."""
        here = self.free.peak_reserved_bytes
        reserved = [here, *self._elsewhere()]
        return here - min(reserved), max(reserved) - here

    def make_all(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Make them now, up to the one after which there are ``enough``."""
        for _ in chain(self._narrowing(), self._narrowing_beyond(), self._elsewhere()):
            if enough():
                break

    def make_all_in_two(self) -> None:
        """Make them now, most of the other placements in a fork of this process (``planner.forks``), the rest here."""
        left = range(len(self._reserved_elsewhere), _PLACEMENTS)
        others, own = left[: 2 * len(left) // 3], left[2 * len(left) // 3 :]  # the bisection takes as long as a third
        if not others:
            return
        fork = Fork.start(lambda _: {"reserved": [self._placed(index) for index in others]})
        fork.send({"do": "replay"})
        list(chain(self._narrowing(), self._narrowing_beyond()))
        reserved = [self._placed(index) for index in own]
        start = time.perf_counter()
        reply = fork.receive()
        fork.kill()  # it has answered or died
        if reply is not None:
            self._reserved_elsewhere += [*reply["reserved"], *reserved]
            self.number += len(others)
        self.seconds += time.perf_counter() - start

    def _narrowing(self) -> Iterator[int]:
        """The capacity that is known to suffice, after each replay of the bisection."""
        low, high = self.free.peak_allocated_bytes, self.free.peak_reserved_bytes
        if self.capacity_bytes is not None and self.limited.fits:  # though it may run out under some that are larger
            high = min(high, self.capacity_bytes)
        yield from self._bisected(low, high)

    def _narrowing_beyond(self) -> Iterator[int]:
        """Likewise of those above the capacity, where one below was found to suffice and this does not."""
        capacity, high = self.capacity_bytes, self.free.peak_reserved_bytes
        if capacity is not None and not self.limited.fits and self.least_bytes <= capacity:
            yield from self._bisected(capacity, max(high, capacity + 1))

    def _bisected(self, low: int, high: int) -> Iterator[int]:
        yield high
        while high - low > max(2 * MIB, int(high * _NEEDED_PRECISION)):
            middle = (low + high) // 2
            if self._under(middle).fits:
                high = middle
            else:
                low = middle
            yield high

    def _elsewhere(self) -> Iterator[int]:
        """Bytes reserved at each other placement of segments."""
        made = self._reserved_elsewhere
        yield from made
        while len(made) < _PLACEMENTS:
            made.append(self._placed(len(made)))
            yield made[-1]

    def _placed(self, index: int) -> int:
        """Bytes reserved at one other placement."""
        return self._run(None, _other_addresses(index)).peak_reserved_bytes

    def _under(self, capacity_bytes: int | None) -> ReplayResult:
        if capacity_bytes not in self._made:
            self._made[capacity_bytes] = self._run(capacity_bytes)
        return self._made[capacity_bytes]

    def _run(self, capacity_bytes: int | None, addresses: AddressSpace | None = None) -> ReplayResult:
        start = time.perf_counter()
        result = replay(
            self.events, self.config, capacity_bytes, device_total_bytes=self._device_total_bytes, addresses=addresses,
            goes_on=wants_another_step if addresses is None else None,
        )  # fmt: skip
        self.number += 1
        self.seconds += time.perf_counter() - start
        return result


class KeptReplays:
    """The replays of a variant's last few batch sizes: one that was replayed ahead is not replayed again."""

    def __init__(self) -> None:
        self._kept: list[Replays] = []

    def of(
        self, events: Events, config: AllocatorConfig, capacity_bytes: int | None, device_total_bytes: int
    ) -> Replays:
        for known in self._kept:
            if (known.config, known.capacity_bytes) == (config, capacity_bytes) and known.events == events:
                return known
        self._kept = [*self._kept[1 - _MOST_KEPT :], Replays(events, config, capacity_bytes, device_total_bytes)]
        return self._kept[-1]


_NEEDED_PRECISION = 1 / 256


_MOST_KEPT = 5
"""Of a size that is checked, of the three above it and of one more."""
_SEEDS = 4
_REGIONS = (3, 64)
_PLACEMENTS = 1 + _SEEDS * len(_REGIONS)


def _other_addresses(index: int) -> AddressSpace:
    """Where the driver may place segments otherwise: it decides which of two free blocks of one size is reused.

    In a process that ran a kernel before the weights came (*measured*: 6.6% more reserved for gpt2 with checkpointing),
    and where other memory of the process leaves gaps.
    """
    if index:
        return ScatteredAddresses(index % _SEEDS, _REGIONS[(index - 1) // _SEEDS])
    warm = TopDownAddresses()
    warm.load_kernels()
    return warm
