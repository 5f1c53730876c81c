"""The replays that a prediction is made of: under the capacity, under none, under less, and at other addresses.

All but the last take as many steps as a trial on a GPU would.
"""

from __future__ import annotations

import time
from functools import cached_property

from planner.allocator import AllocatorConfig, Events, ReplayResult, replay
from planner.allocator.driver import AddressSpace, ScatteredAddresses, TopDownAddresses
from planner.endurance import wants_another_step
from planner.units import MIB


class Replays:
    """Of one batch size's events, each replay made when it is first asked for."""

    def __init__(self, events: Events, config: AllocatorConfig, capacity_bytes: int, device_total_bytes: int) -> None:
        self.events = events
        self._config, self._capacity_bytes, self._device_total_bytes = config, capacity_bytes, device_total_bytes
        self.number = 0
        """Made so far."""
        self.seconds = 0.0
        """What they took."""

    @cached_property
    def limited(self) -> ReplayResult:
        """Under the capacity."""
        return self._run(self._capacity_bytes)

    @cached_property
    def free(self) -> ReplayResult:
        """Under no limit."""
        limited = self.limited
        # A limit that was never met changes nothing, unless the garbage collector goes by it.
        unmet = limited.fits and not limited.num_alloc_retries and not self._config.garbage_collection_threshold
        return limited if unmet else self._run(None)

    @cached_property
    def needed_bytes(self) -> int:
        """The smallest capacity that suffices, by bisection, to 1/256 of what is needed."""
        low, high = self.free.peak_allocated_bytes, self.free.peak_reserved_bytes
        while high - low > max(2 * MIB, int(high * _NEEDED_PRECISION)):
            middle = (low + high) // 2
            if self._run(middle).fits:
                high = middle
            else:
                low = middle
        return high

    @cached_property
    def spread(self) -> tuple[int, int]:
        """Bytes less and more that the step reserves where the driver places its segments elsewhere."""
        here = self.free.peak_reserved_bytes
        reserved = [here, *(self._run(None, addresses).peak_reserved_bytes for addresses in _other_addresses())]
        return here - min(reserved), max(reserved) - here

    def make_all(self) -> None:
        """Make them now."""
        _ = self.needed_bytes, self.spread

    def _run(self, capacity_bytes: int | None, addresses: AddressSpace | None = None) -> ReplayResult:
        start = time.perf_counter()
        result = replay(
            self.events, self._config, capacity_bytes, device_total_bytes=self._device_total_bytes, addresses=addresses,
            goes_on=wants_another_step if addresses is None else None,
        )  # fmt: skip
        self.number += 1
        self.seconds += time.perf_counter() - start
        return result


_NEEDED_PRECISION = 1 / 256


def _other_addresses() -> list[AddressSpace]:
    """Where the driver may place segments otherwise: it decides which of two free blocks of one size is reused.

    In a process that ran a kernel before the weights came (*measured*: 6.6% more reserved for gpt2 with checkpointing),
    and where other memory of the process leaves gaps.
    """
    warm = TopDownAddresses()
    warm.load_kernels()
    return [warm, *(ScatteredAddresses(seed, regions) for regions in (3, 64) for seed in range(_SEEDS))]


_SEEDS = 4
