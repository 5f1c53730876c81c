"""A replay in the form of ``torch.cuda.memory._snapshot()``, for PyTorch's own memory viewer.

The dictionary is the one of ``_memory_snapshot`` in torch/csrc/cuda/memory_snapshot.cpp: what the allocator holds
at the end, segment by segment, and every request, free and call of the driver before it. Viewers:
torch/cuda/_memory_viz.py and torch/utils/viz/MemoryViz.js (https://docs.pytorch.org/memory_viz).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from planner.allocator.caching import CachingAllocator, OutOfMemory
from planner.allocator.config import AllocatorConfig
from planner.allocator.replay import Events, Workspaces
from planner.allocator.snapshot import SegmentInfo, snapshot

Frame = dict[str, Any]
"""``{"filename": str, "line": int, "name": str}``; a stack lists the innermost first."""

_UNKNOWN = "unknown"
"""The viewer fails on a snapshot that has categories but not this one (``annotate_snapshot``)."""


def memory_snapshot(
    events: Events,
    config: AllocatorConfig | None = None,
    capacity_bytes: int | None = None,
    *,
    device_total_bytes: int | None = None,
    stack: Callable[[int], Sequence[Frame]],
    category: Callable[[int], str],
) -> dict[str, Any]:
    """Replay ``events`` (parameters as of ``replay``), up to an OOM if there is one, with one device and no clock.

    ``stack`` and ``category`` say of a block what the viewer shows and colors it by; an event's ``time_us`` is its
    number.
    """
    config = config or AllocatorConfig()
    allocator = CachingAllocator(config, capacity_bytes, device_total_bytes=device_total_bytes, log_driver_calls=True)
    calls = allocator.driver.calls
    assert calls is not None
    trace: list[dict[str, Any]] = []
    workspaces = Workspaces(events)
    addresses: dict[int, int] = {}
    segment_stacks: dict[int, Sequence[Frame]] = {}

    def refuse(entry: dict[str, Any], error: OutOfMemory) -> None:
        _add_driver_calls(trace, calls, entry, segment_stacks)
        trace.append({**entry, "action": "oom", "device_free": 0, "size": error.segment_bytes})

    for index, event in enumerate(events.order):
        events.prepare(index, allocator.driver.addresses)
        block = event if event >= 0 else ~event
        stream = 0 if events.streams is None else events.streams[block]
        size, frames = events.sizes[block], stack(block)
        entry = {"size": size, "stream": stream, "time_us": index, "frames": frames, "category": category(block)}
        if event >= 0 and size:
            try:
                if block in events.plans:
                    address = workspaces.allocate(block, allocator.malloc, partial(refuse, entry))
                else:
                    address = allocator.malloc(size, stream)
            except OutOfMemory as error:
                if block not in events.plans:
                    refuse(entry, error)
                break
            if address:
                addresses[block] = address
                _add_driver_calls(trace, calls, entry, segment_stacks)
                trace.append({**entry, "action": "alloc", "addr": address})
        elif event < 0 and block in addresses:
            address = addresses.pop(block)
            allocator.free(address)
            trace += [{**entry, "action": action, "addr": address} for action in ("free_requested", "free_completed")]
    live = {address: block for block, address in addresses.items()}
    stacks = {address: stack(block) for address, block in live.items()}
    return {
        "segments": [_segment(segment, stacks, segment_stacks) for segment in snapshot(allocator)],
        "device_traces": [trace],
        "allocator_settings": _settings(config),
        "external_annotations": [],
    }


def _add_driver_calls(
    trace: list[dict[str, Any]],
    calls: list[tuple[str, int, int]],
    request: dict[str, Any],
    stacks: dict[int, Sequence[Frame]],
) -> None:
    """What the request made the allocator ask of the driver, emptying ``calls``."""
    for action, address, size in calls:
        trace.append({**request, "action": action, "addr": address, "size": size, "category": _UNKNOWN})
        stacks[address] = request["frames"]
    calls.clear()


def _segment(
    segment: SegmentInfo, stacks: dict[int, Sequence[Frame]], segment_stacks: dict[int, Sequence[Frame]]
) -> dict[str, Any]:
    active = [block for block in segment.blocks if block.state != "inactive"]
    used = [block for block in active if block.state == "active_allocated"]
    return {
        "device": 0,
        "address": segment.address,
        "total_size": segment.size_bytes,
        "allocated_size": sum(block.size_bytes for block in used),
        "active_size": sum(block.size_bytes for block in active),
        "requested_size": sum(block.requested_bytes for block in active),
        "stream": segment.stream,
        "segment_type": "small" if segment.small else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": segment.expandable,
        "frames": segment_stacks.get(segment.address, []),
        "blocks": [
            {
                "address": block.address,
                "size": block.size_bytes,
                "requested_size": block.requested_bytes,
                "state": block.state,
                "frames": stacks.get(block.address, []),
            }
            for block in segment.blocks
        ],
    }


def _settings(config: AllocatorConfig) -> dict[str, Any]:
    """As in a real snapshot, with PyTorch's defaults for what decides no device memory."""
    return {
        "PYTORCH_CUDA_ALLOC_CONF": "",
        "max_split_size": -1 if config.max_split_bytes is None else config.max_split_bytes,
        "garbage_collection_threshold": config.garbage_collection_threshold,
        "expandable_segments": config.expandable_segments,
        "pinned_num_register_threads": 1,
        "release_lock_on_cudamalloc": False,
        "pinned_use_cuda_host_register": False,
        "roundup_power2_divisions": {
            str(1 << number): divisions for number, divisions in enumerate(config.roundup_power2_divisions)
        },
    }
