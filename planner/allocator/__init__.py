"""PyTorch's CUDA caching allocator as an exact model: what a sequence of allocations and frees makes it reserve.

``replay(Events(order, sizes), parse_conf(text), capacity_bytes)`` gives peaks, retries and where memory ran out.
"""

from planner.allocator.caching import CachingAllocator, OutOfMemory
from planner.allocator.config import (
    AllocatorConfig,
    conf_from_environment,
    fraction_limit_bytes,
    normalised_conf,
    parse_conf,
)
from planner.allocator.export import memory_snapshot
from planner.allocator.moments import Moment, moments
from planner.allocator.replay import Events, OomEvent, Plans, ReplayResult, replay
from planner.allocator.snapshot import BlockInfo, SegmentInfo, snapshot

__all__ = [
    "AllocatorConfig",
    "BlockInfo",
    "CachingAllocator",
    "Events",
    "Moment",
    "OomEvent",
    "OutOfMemory",
    "Plans",
    "ReplayResult",
    "SegmentInfo",
    "conf_from_environment",
    "fraction_limit_bytes",
    "memory_snapshot",
    "moments",
    "normalised_conf",
    "parse_conf",
    "replay",
    "snapshot",
]
