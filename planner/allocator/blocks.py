"""Blocks of device memory and the pools of cached ones."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.allocator.expandable import ExpandableSegment

ADDRESS_BITS = 56
"""More than addresses have: a batch size that fits nowhere may take more than 2^48 bytes."""

FREE, USED, PENDING, UNMAPPED = range(4)
"""A block is cached in its pool, held by a tensor, freed but still in use on another stream, or has no memory behind it
(in an expandable segment)."""


class Block:
    """A piece of one segment; ``previous`` and ``next`` are its neighbours there (``None`` at the segment's ends)."""

    __slots__ = ("address", "age_base", "next", "pool", "previous", "requested", "segment", "size", "state")

    def __init__(self, address: int, size: int, pool: Pool, previous: Block | None, next_: Block | None) -> None:
        self.address = address
        self.size = size
        """Bytes, rounding included."""
        self.pool = pool
        self.previous = previous
        self.next = next_
        self.state = FREE
        self.requested = 0
        """Bytes that were asked for, while used."""
        self.segment: ExpandableSegment | None = None
        self.age_base = 0
        """The pool's count of searches when the block was last cached; only kept for garbage collection."""

    @property
    def is_split(self) -> bool:
        return self.previous is not None or self.next is not None


class Pool:
    """The cached blocks of one stream and kind: small (requests up to 1 MiB) or large.

    ``keys`` is sorted: a block's size above its address, so that the first key not below ``size << ADDRESS_BITS`` is
    the best fit, ties going to the lowest address (BlockComparatorSize).
    """

    __slots__ = ("blocks", "keys", "small", "stream", "unmapped")

    def __init__(self, *, stream: int, small: bool) -> None:
        self.stream = stream
        self.small = small
        self.keys: list[int] = []
        self.blocks: dict[int, Block] = {}
        self.unmapped: list[Block] = []
        """Blocks without memory of the expandable segments, by address."""

    def add(self, block: Block) -> None:
        key = block.size << ADDRESS_BITS | block.address
        insort(self.keys, key)
        self.blocks[key] = block

    def remove(self, block: Block) -> None:
        key = block.size << ADDRESS_BITS | block.address
        del self.keys[bisect_left(self.keys, key)]
        del self.blocks[key]

    def first_at_least(self, size: int) -> int:
        """Index in ``keys`` of the best fit for ``size`` bytes; ``len(keys)`` where none is large enough."""
        return bisect_left(self.keys, size << ADDRESS_BITS)

    def at(self, index: int) -> Block:
        return self.blocks[self.keys[index]]

    def cached(self) -> list[Block]:
        """The cached blocks, smallest first."""
        return [self.blocks[key] for key in self.keys]


def absorb(block: Block, neighbour: Block | None) -> bool:
    """Merge ``neighbour`` into ``block`` where both are in the same state (try_merge_blocks); tells whether it did.

    ``block`` itself must not be listed in its pool: its size and address change.
    """
    if neighbour is None or neighbour.state != block.state:
        return False
    if neighbour is block.previous:
        block.address = neighbour.address
        block.previous = neighbour.previous
        if block.previous is not None:
            block.previous.next = block
    else:
        block.next = neighbour.next
        if block.next is not None:
            block.next.previous = block
    if neighbour.state == FREE:
        block.pool.remove(neighbour)
    else:
        block.pool.unmapped.remove(neighbour)
    block.size += neighbour.size
    return True
