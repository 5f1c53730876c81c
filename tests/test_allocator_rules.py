"""Each rule of the caching allocator, with figures worked out from PyTorch's source."""

from itertools import pairwise

import pytest

from planner.allocator import AllocatorConfig, CachingAllocator, Events, OutOfMemory, replay, snapshot
from planner.allocator.driver import ScatteredAddresses, TopDownAddresses
from planner.units import GIB, KIB, MIB

BASE = 1 << 40


class Ascending:
    """Segments one after the other."""

    def __init__(self) -> None:
        self.next = BASE
        self.released: list[tuple[int, int]] = []

    def reserve(self, size: int) -> int:
        self.next += size
        return self.next - size

    def release(self, address: int, size: int) -> None:
        self.released.append((address, size))

    def load_kernels(self) -> None:
        """Changes nothing."""

    def load_library(self, size: int) -> None:
        self.reserve(size)


def allocator(capacity: int | None = None, **settings) -> CachingAllocator:
    device = {name: settings.pop(name) for name in ("device_bytes", "device_total_bytes") if name in settings}
    return CachingAllocator(AllocatorConfig(**settings), capacity, addresses=Ascending(), **device)


def test_small_requests_share_a_segment_in_steps_of_512_bytes():
    a = allocator()
    assert [a.malloc(4) - BASE, a.malloc(513) - BASE, a.malloc(512) - BASE] == [0, 512, 1536]
    assert (a.allocated_bytes, a.requested_bytes, a.reserved_bytes) == (2048, 1029, 2 * MIB)


def test_small_and_large_pools_are_apart():
    a = allocator()
    small, large = a.malloc(MIB), a.malloc(MIB + 1)
    assert a.reserved_bytes == 22 * MIB
    a.free(large)
    a.free(small)
    a.malloc(MIB)
    assert a.reserved_bytes == 22 * MIB  # the small segment served it, though the large one was free too
    assert [segment.small for segment in snapshot(a)] == [True, False]


def test_requests_up_to_10_mib_are_packed_into_20_mib():
    a = allocator()
    addresses = [a.malloc(9 * MIB), a.malloc(9 * MIB)]
    assert [address - BASE for address in addresses] == [0, 9 * MIB]
    assert a.reserved_bytes == 20 * MIB


@pytest.mark.parametrize(("rest", "allocated"), [(MIB, 20 * MIB), (MIB + 512, 19 * MIB - 512)])
def test_a_large_block_is_split_only_if_more_than_1_mib_is_left(rest: int, allocated: int):
    """The slack of an unsplit block counts as allocated."""
    a = allocator()
    a.free(a.malloc(20 * MIB))
    a.malloc(20 * MIB - rest)
    assert (a.allocated_bytes, a.reserved_bytes) == (allocated, 20 * MIB)


def test_best_fit_takes_the_smallest_and_ties_go_to_the_lowest_address():
    a = allocator()
    blocks = [a.malloc(size * MIB) for size in (30, 24, 24, 26)]
    for address in (blocks[2], blocks[0], blocks[3], blocks[1]):
        a.free(address)
    assert a.malloc(24 * MIB) == blocks[1]
    assert a.malloc(23 * MIB + 1) == blocks[2]
    assert a.malloc(25 * MIB) == blocks[3]
    assert a.malloc(25 * MIB) == blocks[0]


def test_freed_blocks_merge_with_free_neighbours_of_their_segment_only():
    a = allocator()
    first, second, third = (a.malloc(4 * MIB) for _ in range(3))
    other = a.malloc(20 * MIB)  # its segment follows at once, in the address space
    a.free(other)
    a.free(first)
    a.free(third)
    a.free(second)
    assert [segment.blocks[0].size_bytes for segment in snapshot(a)] == [20 * MIB, 20 * MIB]


def test_a_stream_does_not_reuse_the_blocks_of_another():
    a = allocator()
    a.free(a.malloc(MIB, stream=1))
    a.malloc(MIB, stream=0)
    assert a.reserved_bytes == 4 * MIB
    a.malloc(MIB, stream=1)
    assert a.reserved_bytes == 4 * MIB


def test_a_block_in_use_on_another_stream_is_not_allocated_but_not_free_either():
    a = allocator()
    block = a.malloc(20 * MIB)
    a.free_later(block)
    assert a.allocated_bytes == 0
    a.malloc(20 * MIB)
    assert a.reserved_bytes == 40 * MIB
    a.complete_free(block)
    assert a.malloc(20 * MIB) == block


def test_the_limit_itself_may_be_reserved():
    a = allocator(capacity=40 * MIB)
    a.malloc(20 * MIB)
    a.malloc(20 * MIB)
    assert (a.reserved_bytes, a.num_alloc_retries) == (40 * MIB, 0)


def test_past_the_limit_cached_segments_are_released_and_the_request_retried_once():
    a = allocator(capacity=60 * MIB)
    kept = a.malloc(20 * MIB)
    a.free(a.malloc(30 * MIB))
    a.free(a.malloc(100 * KIB))  # a small segment, released as well
    a.malloc(40 * MIB)
    assert (a.reserved_bytes, a.peak_reserved_bytes, a.num_alloc_retries) == (60 * MIB, 60 * MIB, 1)
    a.free(kept)


def test_blocks_that_wait_for_a_stream_are_released_too():
    a = allocator(capacity=40 * MIB)
    waiting = a.malloc(40 * MIB)
    a.free_later(waiting)
    a.malloc(30 * MIB)
    assert (a.reserved_bytes, a.num_alloc_retries) == (30 * MIB, 1)
    a.complete_free(waiting)  # the event that was waited for anyway: nothing left to do
    assert a.reserved_bytes == 30 * MIB


def test_out_of_memory_carries_the_figures_and_leaves_the_allocator_usable():
    a = allocator(capacity=80 * MIB)
    held = a.malloc(9 * MIB)
    a.free(a.malloc(30 * MIB))
    with pytest.raises(OutOfMemory) as caught:
        a.malloc(60 * MIB + 1)
    error = caught.value
    assert (error.requested_bytes, error.segment_bytes) == (60 * MIB + 1, 62 * MIB)
    assert (error.allocated_bytes, error.reserved_bytes, error.limit_bytes) == (9 * MIB, 20 * MIB, 80 * MIB)
    assert str(error) == (
        "CUDA out of memory. Tried to allocate 62.0 MiB. 80.0 MiB allowed; "
        "9.0 MiB is allocated by PyTorch, and 11.0 MiB is reserved by PyTorch but unallocated."
    )
    assert (a.num_alloc_retries, a.num_ooms) == (1, 1)
    a.free(held)
    a.malloc(60 * MIB + 1)
    assert a.num_alloc_retries == 2


def test_a_partly_used_segment_cannot_be_released():
    """Fragmentation: 15 of 20 MiB are free, and yet 10 MiB more do not fit."""
    a = allocator(capacity=25 * MIB)
    blocks = [a.malloc(5 * MIB) for _ in range(4)]
    for index in (0, 2, 3):
        a.free(blocks[index])
    a.malloc(10 * MIB)  # the last two, merged
    with pytest.raises(OutOfMemory):
        a.malloc(6 * MIB)
    assert a.allocated_bytes == 15 * MIB


def test_a_full_device_refuses_like_a_limit():
    a = allocator(device_bytes=30 * MIB)
    a.free(a.malloc(20 * MIB))
    a.malloc(24 * MIB)
    assert a.num_alloc_retries == 1
    with pytest.raises(OutOfMemory) as caught:
        a.malloc(10 * MIB)
    assert caught.value.limit_bytes is None


def test_a_fraction_in_the_settings_is_a_limit():
    a = allocator(per_process_memory_fraction=0.5, device_total_bytes=80 * MIB)
    a.malloc(40 * MIB)
    with pytest.raises(OutOfMemory):
        a.malloc(1)


def test_empty_cache_returns_whole_segments():
    a = allocator()
    kept, freed = a.malloc(4 * MIB), a.malloc(4 * MIB)
    a.free(freed)
    a.free(a.malloc(30 * MIB))
    a.empty_cache()
    assert a.reserved_bytes == 20 * MIB
    a.free(kept)
    a.empty_cache()
    assert (a.reserved_bytes, snapshot(a)) == (0, [])


# max_split_size


def test_an_oversize_block_serves_no_smaller_request_and_is_not_split():
    a = allocator(max_split_bytes=64 * MIB)
    block = a.malloc(100 * MIB)
    a.free(block)
    a.malloc(50 * MIB)
    assert a.reserved_bytes == 150 * MIB  # below max_split_size: a segment of its own
    a.malloc(80 * MIB)
    assert a.reserved_bytes == 230 * MIB  # 100 MiB is 20 MiB more than asked: too much
    assert a.malloc(80 * MIB + 512) == block  # just less than 20 MiB more
    assert (a.reserved_bytes, a.allocated_bytes) == (230 * MIB, 230 * MIB)


def test_the_rounding_of_oversize_blocks_is_a_setting():
    a = allocator(max_split_bytes=64 * MIB, max_non_split_rounding_bytes=50 * MIB)
    block = a.malloc(100 * MIB)
    a.free(block)
    assert a.malloc(64 * MIB) == block


def test_past_the_limit_one_oversize_block_that_is_large_enough_is_released_first():
    a = allocator(capacity=250 * MIB, max_split_bytes=64 * MIB)
    a.malloc(100 * MIB)
    a.free(a.malloc(120 * MIB))
    a.free(a.malloc(20 * MIB))
    a.malloc(90 * MIB)
    assert (a.reserved_bytes, a.num_alloc_retries) == (210 * MIB, 0)  # the cached 20 MiB were left alone


def test_past_the_limit_several_oversize_blocks_are_released_largest_first():
    a = allocator(capacity=250 * MIB, max_split_bytes=64 * MIB)
    blocks = [a.malloc(size * MIB) for size in (70, 80, 90)]
    for block in blocks:
        a.free(block)
    a.malloc(130 * MIB)
    assert (a.reserved_bytes, a.num_alloc_retries) == (200 * MIB, 0)  # 90 and 80 went, 70 stayed


def test_too_few_oversize_blocks_mean_a_retry():
    a = allocator(capacity=200 * MIB, max_split_bytes=64 * MIB)
    a.malloc(50 * MIB)
    a.free(a.malloc(70 * MIB))
    a.free(a.malloc(50 * MIB))
    a.malloc(140 * MIB)
    assert (a.reserved_bytes, a.num_alloc_retries) == (190 * MIB, 1)


# garbage collection


def test_garbage_collection_frees_the_segments_that_went_unused_the_longest():
    a = allocator(capacity=100 * MIB, garbage_collection_threshold=0.5)
    first, second = a.malloc(20 * MIB), a.malloc(30 * MIB)
    a.free(first)
    a.free(second)
    a.free(a.malloc(40 * MIB))  # 50 MiB reserved is not above the threshold: nothing collected
    assert a.reserved_bytes == 90 * MIB
    a.malloc(60 * MIB)  # ages 2, 2 and 1: those of at least 5/3 go, and 50 MiB are enough
    assert (a.reserved_bytes, a.num_alloc_retries) == (100 * MIB, 0)
    assert [segment.size_bytes for segment in snapshot(a)] == [40 * MIB, 60 * MIB]


def test_garbage_collection_goes_on_to_younger_segments_until_it_has_enough():
    a = allocator(capacity=100 * MIB, garbage_collection_threshold=0.1)
    for size in (11, 13, 15):
        a.free(a.malloc(size * MIB))
    a.malloc(60 * MIB)
    assert (a.reserved_bytes, a.num_alloc_retries) == (60 * MIB, 0)


def test_garbage_collection_needs_a_limit():
    a = allocator(garbage_collection_threshold=0.1)
    a.free(a.malloc(20 * MIB))
    a.malloc(30 * MIB)
    assert a.reserved_bytes == 50 * MIB


# expandable segments


def test_an_expandable_segment_grows_by_pages():
    a = allocator(expandable_segments=True, device_total_bytes=GIB)
    assert a.malloc(5 * MIB) == BASE
    assert a.reserved_bytes == 20 * MIB
    assert a.malloc(18 * MIB) == BASE + 5 * MIB  # 15 MiB are mapped, one more page is needed
    assert a.reserved_bytes == 40 * MIB
    assert a.malloc(17 * MIB - 512) == BASE + 23 * MIB
    small = a.malloc(512)
    assert a.reserved_bytes == 42 * MIB
    assert [segment.size_bytes for segment in snapshot(a)] == [40 * MIB, 2 * MIB]
    assert small != BASE


def test_an_expandable_block_is_split_down_to_512_bytes():
    a = allocator(expandable_segments=True, device_total_bytes=GIB)
    a.malloc(20 * MIB - 512)
    assert (a.allocated_bytes, a.reserved_bytes) == (20 * MIB - 512, 20 * MIB)


def test_only_whole_free_pages_are_unmapped_and_gaps_are_filled_first():
    addresses = Ascending()
    a = CachingAllocator(AllocatorConfig(expandable_segments=True), addresses=addresses, device_total_bytes=GIB)
    first, second = a.malloc(5 * MIB), a.malloc(40 * MIB)
    third = a.malloc(30 * MIB)
    assert a.reserved_bytes == 80 * MIB
    a.free(second)
    a.empty_cache()
    assert a.reserved_bytes == 60 * MIB  # of the free 5 to 45 MiB, 20 to 40 are a whole page
    assert a.malloc(14 * MIB) == BASE + 5 * MIB  # mapped all the time
    a.free(BASE + 5 * MIB)
    assert a.malloc(38 * MIB) == BASE + 5 * MIB  # the gap, mapped again
    assert a.reserved_bytes == 80 * MIB
    for block in (first, BASE + 5 * MIB, third):
        a.free(block)
    a.empty_cache()
    assert a.reserved_bytes == 0
    assert addresses.released == [(BASE, -(-(GIB + GIB // 8) // (20 * MIB)) * 20 * MIB)]


def test_the_limit_is_held_against_the_request_not_the_pages():
    """22 MiB of 30 are allowed, and map two pages of 20 MiB; 22 more of 60 are not, though one page would hold them."""
    a = allocator(capacity=30 * MIB, expandable_segments=True, device_total_bytes=GIB)
    a.malloc(22 * MIB)
    assert a.reserved_bytes == 40 * MIB
    a = allocator(capacity=60 * MIB, expandable_segments=True, device_total_bytes=GIB)
    a.malloc(22 * MIB)
    with pytest.raises(OutOfMemory):
        a.malloc(22 * MIB)


def test_best_fit_counts_the_growing_end_with_what_it_can_grow_to():
    a = allocator(expandable_segments=True, device_total_bytes=GIB)
    first = a.malloc(12 * MIB)
    a.malloc(2 * MIB)  # 6 MiB are left at the growing end
    a.free(first)
    assert a.malloc(4 * MIB) == first


def test_expandable_segments_retry_and_run_out_like_others():
    a = allocator(capacity=60 * MIB, expandable_segments=True, device_total_bytes=GIB)
    a.free(a.malloc(40 * MIB))
    a.malloc(MIB, stream=1)
    a.malloc(38 * MIB, stream=1)
    assert (a.reserved_bytes, a.num_alloc_retries) == (42 * MIB, 1)
    with pytest.raises(OutOfMemory):
        a.malloc(20 * MIB, stream=2)


def test_pages_mapped_before_the_device_was_full_stay_mapped():
    a = allocator(expandable_segments=True, device_bytes=50 * MIB)
    a.malloc(20 * MIB)
    with pytest.raises(OutOfMemory) as caught:
        a.malloc(40 * MIB)
    assert (a.reserved_bytes, caught.value.limit_bytes) == (20 * MIB, None)
    a.malloc(20 * MIB)
    assert a.reserved_bytes == 40 * MIB


def test_scattered_segments_never_overlap_and_are_the_same_for_a_seed() -> None:
    def placed(seed: int) -> list[tuple[int, int]]:
        addresses = ScatteredAddresses(seed, 3)
        sizes = [20, 148, 2, 12, 198, 32, 20, 20, 74, 12] * 3
        return sorted((addresses.reserve(size << 20), size << 20) for size in sizes)

    found = placed(1)
    assert all(address + size <= following for (address, size), (following, _) in pairwise(found))
    assert found == placed(1) != placed(2)


@pytest.mark.parametrize("addresses", [TopDownAddresses(), ScatteredAddresses(1, 3), ScatteredAddresses(3, 64)])
def test_a_batch_that_fits_nowhere_is_replayed_all_the_same(addresses) -> None:
    a = CachingAllocator(AllocatorConfig(), addresses=addresses)
    blocks = [a.malloc((9 - count % 5) << 40) for count in range(120)]
    assert a.reserved_bytes > 1 << 49
    for block in blocks:
        a.free(block)
    assert a.allocated_bytes == 0


def _mib_from(first: int, addresses: list[int]) -> list[int]:
    return [(address - first) // MIB for address in addresses]


def test_a_range_that_is_free_again_leaves_a_gap_whose_top_the_next_one_gets() -> None:
    """As recorded in golden/traces/gc.trace.json.gz: 0x7f5f840 MiB and below, two ranges of 224 and 256 MiB freed."""
    addresses = TopDownAddresses()
    upper, lower, last = (addresses.reserve(size * MIB) for size in (224, 228, 80))
    assert _mib_from(upper, [lower, last]) == [-256, -352]
    addresses.release(upper, 224 * MIB)
    addresses.release(lower, 228 * MIB)
    assert _mib_from(upper, [addresses.reserve(184 * MIB), addresses.reserve(248 * MIB)]) == [0x20, 0x20 - 256]


def test_a_segment_goes_to_the_newest_range_with_room_for_it() -> None:
    """As recorded for gpt2 (measurements/h200/spread.json.gz): 20 MiB for each of the weights, then 12 MiB each."""
    addresses = TopDownAddresses()
    addresses.reserve(24 * MIB)  # what CUDA's start left
    weights = [addresses.reserve(20 * MIB) for _ in range(4)]
    later = [addresses.reserve(12 * MIB) for _ in range(4)]
    assert [address - 20 * MIB for address in later] == weights[::-1]


def test_loading_the_first_kernel_frees_memory_below_what_the_start_left() -> None:
    """As recorded for vit in fp32 (measurements/h200/peaks.json.gz): 64 MiB of cuBLAS before each workspace of 32."""
    addresses = TopDownAddresses()
    small = addresses.reserve(2 * MIB)
    weights = [addresses.reserve(20 * MIB) for _ in range(2)]
    assert weights[1] < weights[0] > small
    addresses.load_kernels()
    placed = [addresses.reserve(size * MIB) for size in (20, 64, 32, 20, 20, 64, 32, 20)]
    assert _mib_from(small, placed) == [offset - 414 for offset in (0, 20, 84, 116, 136, 156, 220, 252)]
    addresses.load_kernels()
    assert addresses.reserve(20 * MIB) == placed[-1] + 20 * MIB


def test_without_a_segment_in_its_range_that_memory_is_a_gap_until_cublas_has_its_workspace() -> None:
    """As recorded for gpt2 (measurements/h200/spread.json.gz): the first segment makes a range that the small ones go
    to; 544 and 448 MiB above it, then far below."""
    addresses = TopDownAddresses()
    weights = [addresses.reserve(size * MIB) for size in (148, 20, 2)]
    assert _mib_from(weights[0], weights[2:]) == [148]
    addresses.load_kernels()
    first = addresses.reserve(20 * MIB)
    addresses.load_library(64 * MIB)
    workspace, later = (addresses.reserve(size * MIB) for size in (32, 74))
    assert _mib_from(weights[0], [first, workspace]) == [544, 448]
    assert later < weights[0]


def test_a_replay_loads_kernels_at_the_first_step_and_libraries_take_their_share() -> None:
    class Logged(Ascending):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def reserve(self, size: int) -> int:
            self.calls.append(f"{size // MIB}")
            return super().reserve(size)

        def load_kernels(self) -> None:
            self.calls.append("kernels")

        def load_library(self, size: int) -> None:
            self.calls.append(f"library {size // MIB}")

    addresses = Logged()
    sizes = [30 * MIB, 40 * MIB, 32 * MIB]
    events = Events([0, 1, 2, ~1], sizes, steps=[(1, 4)], library_bytes={2: 64 * MIB}, first_kernel=1)
    result = replay(events, addresses=addresses)
    assert addresses.calls == ["30", "kernels", "40", "library 64", "32"]
    assert (result.peak_reserved_bytes, result.num_steps) == (102 * MIB, 1)
    warm = Logged()
    replay(Events([0, 1, 2, ~1], sizes), addresses=warm)
    assert warm.calls == ["kernels", "30", "40", "32"]
