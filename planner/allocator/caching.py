"""PyTorch's CUDA caching allocator, as an exact model in pure Python.

Source: class DeviceCachingAllocator in c10/cuda/CUDACachingAllocator.cpp of torch 2.11, without the private pools of
CUDA graphs and without user-made memory pools. Each method names the function that it models. Replaying a recorded
trace on the recorded segment addresses gives the same address for every block.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from planner.allocator.blocks import ADDRESS_BITS, FREE, PENDING, UNMAPPED, USED, Block, Pool, absorb
from planner.allocator.config import MIN_BLOCK_BYTES, SMALL_BYTES, SMALL_SEGMENT_BYTES, AllocatorConfig
from planner.allocator.driver import AddressSpace, Driver, TopDownAddresses
from planner.allocator.expandable import ExpandableSegments
from planner.units import TIB, format_bytes


class OutOfMemory(Exception):
    """A request was refused after every cached segment was given back: ``torch.OutOfMemoryError`` as data, in bytes.

    Not an error of the planner: callers turn it into ``Outcome.OOM``.
    """

    def __init__(
        self,
        *,
        requested_bytes: int,
        segment_bytes: int,
        allocated_bytes: int,
        reserved_bytes: int,
        limit_bytes: int | None,
    ) -> None:
        super().__init__(requested_bytes, segment_bytes, allocated_bytes, reserved_bytes, limit_bytes)
        self.requested_bytes = requested_bytes
        """What the tensor needed."""
        self.segment_bytes = segment_bytes
        """What the allocator asked for on its behalf: "Tried to allocate" in PyTorch's message."""
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.limit_bytes = limit_bytes
        """The limit on reserved bytes; ``None`` where the device itself was full."""

    def __str__(self) -> str:
        allowed = "" if self.limit_bytes is None else f"{format_bytes(self.limit_bytes)} allowed; "
        return (
            f"CUDA out of memory. Tried to allocate {format_bytes(self.segment_bytes)}. {allowed}"
            f"{format_bytes(self.allocated_bytes)} is allocated by PyTorch, and "
            f"{format_bytes(self.reserved_bytes - self.allocated_bytes)} is reserved by PyTorch but unallocated."
        )


class CachingAllocator:
    """The caching allocator of one device.

    ``capacity_bytes`` is the limit on reserved bytes that ``torch.cuda.set_per_process_memory_fraction`` sets; ``None``
    takes the one in ``config`` if there is one. ``device_bytes`` is the memory that the driver can give this process at
    all, ``device_total_bytes`` the whole card's (the address space of an expandable segment, and what a fraction in
    ``config`` is of). All three in bytes; ``None``: not limited.
    """

    def __init__(
        self,
        config: AllocatorConfig | None = None,
        capacity_bytes: int | None = None,
        *,
        device_bytes: int | None = None,
        device_total_bytes: int | None = None,
        addresses: AddressSpace | None = None,
        log_driver_calls: bool = False,
    ) -> None:
        config = config or AllocatorConfig()
        total = device_total_bytes or device_bytes
        if capacity_bytes is None and total is not None:
            capacity_bytes = config.limit_bytes(total)
        self.config = config
        self.capacity_bytes = capacity_bytes
        self.driver = Driver(addresses or TopDownAddresses(), device_bytes, log=log_driver_calls)
        self.allocated_bytes = 0
        """Bytes in blocks that tensors hold."""
        self.peak_allocated_bytes = 0
        self.num_alloc_retries = 0
        self.num_ooms = 0
        self._expandable = config.expandable_segments
        self._segments = ExpandableSegments(
            self.driver,
            small_page=SMALL_SEGMENT_BYTES,
            large_page=config.large_segment_bytes,
            device_total_bytes=total or TIB,
        )
        self._max_split = config.max_split_bytes
        self._rounds_to_power2 = max(config.roundup_power2_divisions) > 1
        self._collects_garbage = capacity_bytes is not None and config.garbage_collection_threshold > 0
        self._num_searches = {True: 0, False: 0}  # per kind of pool (small or not), over all streams
        self._pools: dict[bool, dict[int, Pool]] = {True: {}, False: {}}
        self._small, self._large = self._pools[True], self._pools[False]
        self._used: dict[int, Block] = {}
        self._pending: dict[int, Block] = {}
        self._searches_plainly = not (self._expandable or self._max_split is not None or self._collects_garbage)

    @property
    def reserved_bytes(self) -> int:
        """Bytes that the allocator holds from the driver."""
        return self.driver.reserved_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        return self.driver.peak_reserved_bytes

    @property
    def requested_bytes(self) -> int:
        """Bytes that the live tensors asked for; the rest of ``allocated_bytes`` is rounding."""
        return sum(block.requested for block in self._used.values())

    def blocks(self) -> list[Block]:
        """Every block, in no order: used, waiting for another stream, cached, or without memory behind it."""
        pools = [pool for kind in self._pools.values() for pool in kind.values()]
        cached = [block for pool in pools for block in (*pool.blocks.values(), *pool.unmapped)]
        return [*self._used.values(), *self._pending.values(), *cached]

    def malloc(self, size: int, stream: int = 0) -> int:
        """Address of a block for ``size`` bytes (more than 0) on ``stream``. Raises ``OutOfMemory``."""
        rounded = self.config.round_size(size) if self._rounds_to_power2 else (size + 511) & -512
        pools = self._small if rounded <= SMALL_BYTES else self._large
        pool = pools.get(stream)
        if pool is None:
            pool = pools[stream] = Pool(stream=stream, small=rounded <= SMALL_BYTES)
        keys = pool.keys
        block: Block | None
        if self._searches_plainly:
            index = bisect_left(keys, rounded << ADDRESS_BITS)
            block = pool.blocks.pop(keys.pop(index)) if index < len(keys) else None
        else:
            block = self._best_fit(pool, rounded)
        if block is None:
            block = self._from_driver(pool, rounded, size)
        rest = block.size - rounded
        if rest and (
            rest >= MIN_BLOCK_BYTES
            if pool.small or self._expandable
            else rest > SMALL_BYTES and (self._max_split is None or rounded < self._max_split)
        ):
            following = block.next
            remaining = Block(block.address + rounded, rest, pool, block, following)
            remaining.segment = block.segment
            if following is not None:
                following.previous = remaining
            block.next = remaining
            block.size = rounded
            key = rest << ADDRESS_BITS | remaining.address
            insort(keys, key)
            pool.blocks[key] = remaining
            if self._collects_garbage:
                remaining.age_base = self._num_searches[pool.small]
        block.state = USED
        block.requested = size
        self._used[block.address] = block
        allocated = self.allocated_bytes + block.size
        self.allocated_bytes = allocated
        if allocated > self.peak_allocated_bytes:
            self.peak_allocated_bytes = allocated
        return block.address

    def free(self, address: int) -> None:
        """Give back the block at ``address``. Raises ``KeyError`` where no used block starts."""
        block = self._used.pop(address)
        self.allocated_bytes -= block.size
        self._cache(block)

    def free_later(self, address: int) -> None:
        """Give back a block that another stream still uses: it is cached only after ``complete_free`` or a retry."""
        block = self._used.pop(address)
        self.allocated_bytes -= block.size
        block.state = PENDING
        self._pending[address] = block

    def complete_free(self, address: int) -> None:
        """The other streams are done with the block; nothing happens if a retry waited for them already."""
        block = self._pending.pop(address, None)
        if block is not None:
            self._cache(block)

    def empty_cache(self) -> None:
        """Return every wholly free segment, and every wholly free page of an expandable one, to the driver."""
        for block in self._pending.values():  # release_cached_blocks first waits for all streams
            self._cache(block)
        self._pending.clear()
        for small in (False, True):
            blocks = [block for _, pool in sorted(self._pools[small].items()) for block in pool.cached()]
            for block in blocks:
                if block.segment is None and not block.is_split:
                    self._release(block)
            for block in blocks:
                if block.segment is not None:
                    self._segments.shrink(block)

    def _cache(self, block: Block) -> None:
        """free_block: merge with the free neighbours and list in the pool."""
        block.state = FREE
        previous = block.previous
        if previous is not None and previous.state == FREE:
            absorb(block, previous)
        following = block.next
        if following is not None and following.state == FREE:
            absorb(block, following)
        pool = block.pool
        key = block.size << ADDRESS_BITS | block.address
        insort(pool.keys, key)
        pool.blocks[key] = block
        if self._collects_garbage:
            block.age_base = self._num_searches[pool.small]

    def _best_fit(self, pool: Pool, rounded: int) -> Block | None:
        """get_free_block: the smallest cached block that may serve, taken from its pool; ``None``: there is none."""
        if self._collects_garbage:
            self._num_searches[pool.small] += 1
        index = pool.first_at_least(rounded)
        if index == len(pool.keys):
            return None
        block = pool.at(index)
        if self._expandable:
            # The block at the growing end counts with the addresses that it can still grow into.
            for following in range(index + 1, len(pool.keys)):
                candidate = pool.at(following)
                if _size_when_grown(candidate) >= _size_when_grown(block):
                    break
                block = candidate
        if self._max_split is not None:
            if rounded < self._max_split <= block.size:
                return None
            if rounded >= self._max_split and block.size >= rounded + self.config.max_non_split_rounding_bytes:
                return None
        pool.remove(block)
        return block

    def _from_driver(self, pool: Pool, rounded: int, size: int) -> Block:
        """The part of malloc after a miss: new memory, if need be after cached memory was given back."""
        if self._collects_garbage:
            self._collect_garbage()
        block = self._new_memory(pool, rounded)
        if block is None and self._release_oversize(pool, rounded):
            block = self._new_memory(pool, rounded)
        if block is None:
            self.empty_cache()
            self.num_alloc_retries += 1
            block = self._new_memory(pool, rounded)
        if block is None:
            self.num_ooms += 1
            segment_bytes = self.config.segment_size(rounded)
            over = self.capacity_bytes is not None and self.reserved_bytes + segment_bytes > self.capacity_bytes
            raise OutOfMemory(
                requested_bytes=size,
                segment_bytes=segment_bytes,
                allocated_bytes=self.allocated_bytes,
                reserved_bytes=self.reserved_bytes,
                limit_bytes=self.capacity_bytes if over else None,
            )
        return block

    def _new_memory(self, pool: Pool, rounded: int) -> Block | None:
        """alloc_block: a free block of at least ``rounded`` bytes in no pool; ``None`` past the limit or the device.

        The limit is held against the segment even where an expandable segment maps whole pages, and so takes more.
        """
        segment_bytes = self.config.segment_size(rounded)
        if self.capacity_bytes is not None and self.reserved_bytes + segment_bytes > self.capacity_bytes:
            return None
        if self._expandable:
            return self._segments.grow(pool, rounded)
        address = self.driver.allocate(segment_bytes)
        return None if address is None else Block(address, segment_bytes, pool, None, None)

    def _release_oversize(self, pool: Pool, rounded: int) -> bool:
        """release_available_cached_blocks: free oversize segments of the request's pool, only as many as it needs."""
        if self._max_split is None:
            return False
        needed = max(rounded, self._max_split)
        index = pool.first_at_least(needed)
        if index < len(pool.keys) and pool.at(index).segment is None:
            self._release(pool.at(index))
            return True
        released = 0
        for block in [pool.at(i) for i in range(index - 1, -1, -1)]:
            if released >= needed or block.size < self._max_split:
                break
            if block.segment is None:
                released += block.size
                self._release(block)
        return released >= needed

    def _collect_garbage(self) -> None:
        """garbage_collect_cached_blocks: above the threshold, free whole large segments, the longest unused first."""
        assert self.capacity_bytes is not None
        threshold = int(self.config.garbage_collection_threshold * self.capacity_bytes)
        target = self.reserved_bytes - threshold
        searches = self._num_searches[False]
        blocks = [block for _, pool in sorted(self._large.items()) for block in pool.cached() if not block.is_split]
        total_age = sum(searches - block.age_base for block in blocks)
        reclaimed, freed = 0, True
        while reclaimed < target and freed and blocks:
            age_threshold = total_age / len(blocks)
            freed, kept = False, []
            for block in blocks:
                age = searches - block.age_base
                if block.segment is None and age >= age_threshold:
                    freed = True
                    reclaimed += block.size
                    total_age -= age
                    self._release(block)
                else:
                    kept.append(block)
            blocks = kept

    def _release(self, block: Block) -> None:
        """release_block: a cached block that is a whole segment goes back to the driver."""
        block.pool.remove(block)
        self.driver.free(block.address, block.size)


def _size_when_grown(block: Block) -> int:
    """expandable_size: with the unmapped addresses behind the block."""
    following = block.next
    return block.size + (following.size if following is not None and following.state == UNMAPPED else 0)
