"""What an allocator holds, segment by segment: for explanations, exports and checks."""

from __future__ import annotations

from dataclasses import dataclass

from planner.allocator.blocks import PENDING, UNMAPPED, USED, Block
from planner.allocator.caching import CachingAllocator


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInfo:
    address: int
    size_bytes: int
    requested_bytes: int
    """Bytes that the tensor asked for; 0 for a cached block."""
    state: str
    """By PyTorch's names: ``active_allocated``, ``active_awaiting_free`` or ``inactive``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentInfo:
    """A segment, or a contiguous mapped range of an expandable one."""

    address: int
    stream: int
    small: bool
    expandable: bool
    blocks: tuple[BlockInfo, ...]

    @property
    def size_bytes(self) -> int:
        return sum(block.size_bytes for block in self.blocks)


def snapshot(allocator: CachingAllocator) -> list[SegmentInfo]:
    """All that ``allocator`` holds from the driver, by address."""
    segments = [
        _segment(block)
        for block in allocator.blocks()
        if block.state != UNMAPPED and (block.previous is None or block.previous.state == UNMAPPED)
    ]
    return sorted(segments, key=lambda segment: segment.address)


def _segment(first: Block) -> SegmentInfo:
    blocks: list[BlockInfo] = []
    block: Block | None = first
    while block is not None and block.state != UNMAPPED:
        active = block.state in (USED, PENDING)
        info = BlockInfo(
            address=block.address,
            size_bytes=block.size,
            requested_bytes=block.requested if active else 0,
            state={USED: "active_allocated", PENDING: "active_awaiting_free"}.get(block.state, "inactive"),
        )
        blocks.append(info)
        block = block.next
    return SegmentInfo(
        address=first.address,
        stream=first.pool.stream,
        small=first.pool.small,
        expandable=first.segment is not None,
        blocks=tuple(blocks),
    )
