"""What the allocator holds at chosen moments of a replay, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from planner.allocator.caching import CachingAllocator, OutOfMemory
from planner.allocator.config import AllocatorConfig
from planner.allocator.replay import Events, Workspaces


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The state after one event; bytes."""

    index: int
    """Of the event in ``Events.order``."""
    allocated_bytes: int
    reserved_bytes: int
    blocks: Mapping[int, int]
    """Bytes that the allocator gave each live block of the events, rounding included: they sum to
    ``allocated_bytes``."""


def moments(
    events: Events,
    indices: Iterable[int],
    config: AllocatorConfig | None = None,
    capacity_bytes: int | None = None,
    *,
    device_total_bytes: int | None = None,
) -> dict[int, Moment]:
    """The moments after the events ``indices``, from one replay (parameters as of ``replay``), by index.

    Moments after an OOM are left out.
    """
    allocator = CachingAllocator(config, capacity_bytes, device_total_bytes=device_total_bytes)
    wanted = set(indices)
    last = max(wanted, default=-1)
    addresses: dict[int, int] = {}
    sizes: dict[int, int] = {}
    found: dict[int, Moment] = {}
    workspaces = Workspaces(events)
    for index, event in enumerate(events.order[: last + 1]):
        events.prepare(index, allocator.driver.addresses)
        if event < 0:
            if ~event in addresses:
                allocator.free(addresses.pop(~event))
                del sizes[~event]
        elif events.sizes[event]:
            before = allocator.allocated_bytes
            try:
                if event in events.plans:
                    address = workspaces.allocate(event, allocator.malloc)
                else:
                    stream = 0 if events.streams is None else events.streams[event]
                    address = allocator.malloc(events.sizes[event], stream)
            except OutOfMemory:
                break
            if address:
                addresses[event] = address
                sizes[event] = allocator.allocated_bytes - before
        if index in wanted:
            found[index] = Moment(
                index=index,
                allocated_bytes=allocator.allocated_bytes,
                reserved_bytes=allocator.reserved_bytes,
                blocks=dict(sizes),
            )
    return found
