"""Expandable segments: one growing range of addresses for each stream and pool, with memory mapped in page by page.

Source: struct ExpandableSegment, find_expandable_block, try_allocate_expandable_block, map_block and unmap_block in
c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from planner.allocator.blocks import FREE, UNMAPPED, Block, Pool, absorb
from planner.allocator.driver import Driver


@dataclass(slots=True, eq=False)
class ExpandableSegment:
    address: int
    size: int
    """Bytes of address space, a multiple of ``page``."""
    page: int
    """Bytes that are mapped at once: 2 MiB in the small pool, 20 MiB in the large one."""


class ExpandableSegments:
    """Grows and shrinks the expandable segments of one allocator.

    ``address_space_bytes`` is what each segment can grow to: 9/8 of the device's memory.
    """

    def __init__(self, driver: Driver, *, small_page: int, large_page: int, device_total_bytes: int) -> None:
        self._driver = driver
        self._pages = {True: small_page, False: large_page}
        self._address_space_bytes = device_total_bytes + device_total_bytes // 8

    def grow(self, pool: Pool, size: int) -> Block | None:
        """A free block of at least ``size`` bytes, no longer listed in ``pool``; ``None`` when the device is full.

        Pages that were mapped before the device proved full stay mapped, as in PyTorch.
        """
        block = self._lowest_with_room(pool, size)
        if block.state == UNMAPPED and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            rest = block.next
            assert rest is not None
            if not self._map(rest, min(size - block.size, rest.size)):
                return None
            block = rest  # which has absorbed the block before it
        pool.remove(block)
        return block

    def shrink(self, block: Block) -> None:
        """Give back the pages that lie wholly inside the cached ``block``."""
        segment, pool = block.segment, block.pool
        assert segment is not None
        start = -(-(block.address - segment.address) // segment.page) * segment.page + segment.address
        end = (block.address + block.size - segment.address) // segment.page * segment.page + segment.address
        if start >= end:
            return
        pool.remove(block)
        before, after = start - block.address, block.address + block.size - end
        block.address, block.size, block.state = start, end - start, UNMAPPED
        if before:
            self._cut(block, start - before, before, FREE, block.previous, block)
        if after:
            self._cut(block, end, after, FREE, block, block.next)
        absorb(block, block.previous)
        absorb(block, block.next)
        insort(pool.unmapped, block, key=_address)
        self._driver.unmap(start, end - start)
        if not block.is_split:
            pool.unmapped.remove(block)
            self._driver.addresses.release(segment.address, segment.size)

    def _lowest_with_room(self, pool: Pool, size: int) -> Block:
        for block in pool.unmapped:
            first = block
            if block.previous is not None and block.previous.state == FREE:
                first = block.previous
            room, following = 0, first
            while room < size and following is not None and following.state in (FREE, UNMAPPED):
                room += following.size
                following = following.next  # type: ignore[assignment]
            if room >= size:
                return first
        page = self._pages[pool.small]
        space = -(-self._address_space_bytes // page) * page
        segment = ExpandableSegment(self._driver.addresses.reserve(space), space, page)
        block = Block(segment.address, space, pool, None, None)
        block.segment = segment
        block.state = UNMAPPED
        insort(pool.unmapped, block, key=_address)
        return block

    def _map(self, block: Block, size: int) -> bool:
        """Back the first ``size`` bytes of an unmapped block with pages and merge it with its free neighbours."""
        segment, pool = block.segment, block.pool
        assert segment is not None
        mapped = -(-size // segment.page) * segment.page
        if not self._driver.map(block.address, mapped):
            return False
        pool.unmapped.remove(block)
        block.state = FREE
        if mapped < block.size:
            self._cut(block, block.address + mapped, block.size - mapped, UNMAPPED, block, block.next)
            block.size = mapped
        absorb(block, block.previous)
        absorb(block, block.next)
        pool.add(block)
        return True

    @staticmethod
    def _cut(of: Block, address: int, size: int, state: int, previous: Block | None, next_: Block | None) -> None:
        """Make a block of a part of ``of``, link it between its new neighbours and list it in the pool."""
        part = Block(address, size, of.pool, previous, next_)
        part.segment = of.segment
        part.state = state
        if previous is not None:
            previous.next = part
        if next_ is not None:
            next_.previous = part
        if state == FREE:
            of.pool.add(part)
        else:
            insort(of.pool.unmapped, part, key=_address)


def _address(block: Block) -> int:
    return block.address
