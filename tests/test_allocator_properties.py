"""What must hold of any sequence of requests under any settings."""

import sys
from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from planner.allocator import AllocatorConfig, CachingAllocator, OutOfMemory, snapshot
from planner.allocator.blocks import FREE, UNMAPPED, USED
from planner.allocator.driver import TopDownAddresses
from planner.units import GIB, KIB, MIB

SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(1, MIB),
    st.integers(MIB, 12 * MIB),
    st.integers(10 * MIB, 150 * MIB),
    st.sampled_from([512, MIB, MIB + 1, 2 * MIB, 10 * MIB, 20 * MIB, 64 * MIB, 84 * MIB]),
)
CONFIGS = st.builds(
    AllocatorConfig,
    max_split_bytes=st.sampled_from([None, None, 20 * MIB, 64 * MIB]),
    garbage_collection_threshold=st.sampled_from([0.0, 0.3, 0.8]),
    expandable_segments=st.booleans(),
    roundup_power2_divisions=st.sampled_from([(0,) * 16, (4,) * 16, (1, 2, 4, 8) * 4]),
)
# A request and its stream; which of the live blocks to free (now, later, or at last); the cache emptied.
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("malloc"), SIZES, st.integers(0, 2)),
        st.tuples(st.just("malloc"), SIZES, st.integers(0, 2)),
        st.tuples(st.just("free"), st.integers(0, 1 << 16), st.just(0)),
        st.tuples(st.just("free_later"), st.integers(0, 1 << 16), st.just(0)),
        st.tuples(st.just("complete"), st.integers(0, 1 << 16), st.just(0)),
        st.tuples(st.just("empty_cache"), st.just(0), st.just(0)),
    ),
    min_size=1,
    max_size=80,
)


class Run:
    """An allocator and what the test knows of it on its own account."""

    def __init__(self, config: AllocatorConfig, capacity: int | None) -> None:
        self.allocator = CachingAllocator(config, capacity, device_total_bytes=4 * GIB, log_driver_calls=True)
        self.live: dict[int, int] = {}
        self.waiting: list[int] = []
        self.outcomes: list[int | str] = []

    def step(self, name: str, number: int, stream: int) -> None:
        allocator = self.allocator
        if name == "malloc":
            try:
                address = allocator.malloc(number, stream)
            except OutOfMemory as error:
                self.outcomes.append(str(error))
                self.waiting.clear()  # the retry waited for them
            else:
                assert address not in self.live
                self.live[address] = number
                self.outcomes.append(address)
        elif name in ("free", "free_later") and self.live:
            address = list(self.live)[number % len(self.live)]
            del self.live[address]
            if name == "free":
                allocator.free(address)
            else:
                allocator.free_later(address)
                self.waiting.append(address)
        elif name == "complete" and self.waiting:
            allocator.complete_free(self.waiting.pop(number % len(self.waiting)))
        elif name == "empty_cache":
            allocator.empty_cache()
            self.waiting.clear()

    def check(self) -> None:
        allocator = self.allocator
        blocks = sorted(allocator.blocks(), key=lambda block: block.address)
        for before, after in pairwise(blocks):
            assert before.address + before.size <= after.address, "blocks overlap"
        for block in blocks:
            assert block.size > 0
            assert block.size % 512 == 0
            if block.next is not None:
                assert block.next.previous is block
                assert block.address + block.size == block.next.address, "a segment has a gap"
                assert not (block.state == block.next.state and block.state in (FREE, UNMAPPED)), "free, and not merged"
        used = {block.address: block.requested for block in blocks if block.state == USED}
        assert used == self.live
        assert allocator.requested_bytes == sum(self.live.values())
        assert allocator.allocated_bytes == sum(block.size for block in blocks if block.state == USED)
        assert allocator.reserved_bytes == sum(block.size for block in blocks if block.state != UNMAPPED)
        assert allocator.reserved_bytes == sum(segment.size_bytes for segment in snapshot(allocator))
        assert allocator.allocated_bytes <= allocator.reserved_bytes <= allocator.peak_reserved_bytes
        assert sum(self.live.values()) <= allocator.allocated_bytes <= allocator.peak_allocated_bytes
        pools = {id(block.pool): block.pool for block in blocks}
        for pool in pools.values():
            assert pool.keys == sorted(pool.blocks), "the sorted keys and the cached blocks differ"
            free = [block for block in blocks if block.pool is pool and block.state == FREE]
            assert {id(block) for block in free} == {id(block) for block in pool.blocks.values()}


def run(config: AllocatorConfig, capacity: int | None, operations: list[tuple[str, int, int]]) -> Run:
    state = Run(config, capacity)
    for operation in operations:
        state.step(*operation)
        state.check()
    return state


@settings(max_examples=150, deadline=None)
@given(CONFIGS, st.sampled_from([None, 60 * MIB, 200 * MIB, 500 * MIB]), OPERATIONS)
def test_no_overlap_no_lost_byte_and_everything_merges_back(config, capacity, operations):
    state = run(config, capacity, operations)
    allocator = state.allocator
    if capacity is not None and not config.expandable_segments:  # those may pass it by what a page is larger
        assert allocator.peak_reserved_bytes <= capacity
    for address in list(state.live):
        allocator.free(address)
    for address in state.waiting:
        allocator.complete_free(address)
    state.live.clear()
    state.check()
    assert allocator.allocated_bytes == 0
    assert all(len(segment.blocks) == 1 for segment in snapshot(allocator)), "a segment is not one whole free block"
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    assert allocator.blocks() == []
    calls = allocator.driver.calls or []
    taken = sum(size for action, _, size in calls if action in ("segment_alloc", "segment_map"))
    given_back = sum(size for action, _, size in calls if action in ("segment_free", "segment_unmap"))
    assert taken == given_back


@settings(max_examples=40, deadline=None)
@given(CONFIGS, st.sampled_from([None, 200 * MIB]), OPERATIONS)
def test_equal_requests_have_equal_outcomes(config, capacity, operations):
    first, second = run(config, capacity, operations), run(config, capacity, operations)
    assert first.outcomes == second.outcomes
    assert first.allocator.driver.calls == second.allocator.driver.calls


@settings(max_examples=60, deadline=None)
@given(CONFIGS, OPERATIONS)
def test_the_peak_of_a_run_is_limit_enough_for_it(config, operations):
    """A limit at the peak that was reached without one changes nothing.

    Unless garbage is collected below it, or a request is refused that an expandable segment's pages would have held.
    """
    config = replace(config, garbage_collection_threshold=0.0, expandable_segments=False)
    free = run(config, None, operations)
    limited = run(config, max(free.allocator.peak_reserved_bytes, 512), operations)
    assert limited.outcomes == free.outcomes
    assert limited.allocator.num_alloc_retries == 0


class Searching(TopDownAddresses):
    """Looks through every range each time."""

    def reserve(self, size: int) -> int:
        self._no_room_for = sys.maxsize
        return super().reserve(size)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 50), st.integers(0, 1 << 16)), max_size=80))
def test_what_no_range_has_room_for_is_known_without_a_search(operations):
    quick, thorough, live = TopDownAddresses(), Searching(), []
    for releases, pages, index in operations:
        if releases and live:
            address, size = live.pop(index % len(live))
            quick.release(address, size)
            thorough.release(address, size)
        else:
            size = pages * 2 * MIB
            live.append((quick.reserve(size), size))
            assert thorough.reserve(size) == live[-1][0]
