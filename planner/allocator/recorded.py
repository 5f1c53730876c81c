"""Allocator traces that PyTorch recorded on a GPU: read them, and check the model against them address by address."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.allocator.caching import CachingAllocator, OutOfMemory
from planner.allocator.config import AllocatorConfig, parse_conf
from planner.allocator.driver import AddressSpace
from planner.allocator.replay import Events
from planner.errors import InvalidArgument

RecordedEvent = tuple[str, int, int, int]
"""``(action, address, bytes, stream)`` with the actions of PyTorch's memory history. The bytes of ``alloc`` and of the
frees are those asked for; of ``segment_*`` those taken from or given to the driver; of ``oom`` the rounded request."""

_TAKING_CALLS = ("segment_alloc", "segment_map")
_DRIVER_CALLS = ("segment_alloc", "segment_free", "segment_map", "segment_unmap")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """One process's allocator history, with the settings that it ran under and PyTorch's own figures at its end."""

    name: str
    events: Sequence[RecordedEvent]
    config: AllocatorConfig
    capacity_bytes: int | None
    device_total_bytes: int | None
    """``None``: not recorded; it only matters to expandable segments."""
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    num_alloc_retries: int
    num_ooms: int

    def compare(self) -> Comparison:
        """The model's behaviour under the recorded settings, step by step (see ``compare``)."""
        return compare(self.events, self.config, self.capacity_bytes, device_total_bytes=self.device_total_bytes)


def read_runs(path: Path) -> list[RecordedRun]:
    """The runs in a trace file (gzipped JSON): one, or those of ``benchmarks/record_traces.py``.

    Raises ``InvalidArgument`` where the file cannot be read or is none.
    """
    try:
        trace: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
        if "runs" in trace:
            return [_run_under_settings(f"{trace['setting']}/{run['workload']}", run) for run in trace["runs"]]
        return [_run_by_default(trace)]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise InvalidArgument(f"{path} is not a trace: {error!r}", field="trace") from None


def _run_by_default(trace: Mapping[str, Any]) -> RecordedRun:
    return RecordedRun(
        name=trace["case"],
        events=_events(trace["events"]),
        config=AllocatorConfig(),
        capacity_bytes=None,
        device_total_bytes=None,
        peak_allocated_bytes=trace["peak"]["alloc"],
        peak_reserved_bytes=trace["peak"]["reserved"],
        num_alloc_retries=0,
        num_ooms=0,
    )


def _run_under_settings(name: str, run: Mapping[str, Any]) -> RecordedRun:
    return RecordedRun(
        name=name,
        events=_events(run["events"]),
        config=parse_conf(run["conf"]),
        capacity_bytes=run["allowed_bytes"],
        device_total_bytes=run["total_memory_bytes"],
        peak_allocated_bytes=run["stats"]["allocated_bytes.all.peak"],
        peak_reserved_bytes=run["stats"]["reserved_bytes.all.peak"],
        num_alloc_retries=run["stats"]["num_alloc_retries"],
        num_ooms=run["stats"]["num_ooms"],
    )


def _events(entries: Iterable[Sequence[Any]]) -> list[RecordedEvent]:
    return [(str(action), int(address), int(size), int(stream)) for action, address, size, stream in entries]


def snapshot_events(snapshot: Mapping[str, Any], device: int = 0) -> list[RecordedEvent]:
    """The history in ``torch.cuda.memory._snapshot()``, recorded from the process's first allocation on."""
    return [
        (entry["action"], int(entry.get("addr", 0)), int(entry.get("size", 0)), int(entry.get("stream", 0)))
        for entry in snapshot["device_traces"][device]
    ]


def replayable(recorded: Iterable[RecordedEvent]) -> Events:
    """What the program asked for, without what the allocator then did: to be replayed under other settings.

    Requests that ran out of memory are left out. Raises ``InvalidArgument`` when a block is freed that was never
    allocated: recording began after the first allocation.
    """
    order: list[int] = []
    sizes: list[int] = []
    streams: list[int] = []
    live: dict[int, int] = {}
    for action, address, size, stream in recorded:
        if action == "alloc":
            live[address] = len(sizes)
            order.append(len(sizes))
            sizes.append(size)
            streams.append(stream)
        elif action == "free_completed":
            if address not in live:
                message = f"the block at {address:#x} was freed but not allocated: record from the first allocation on"
                raise InvalidArgument(message, field="trace")
            order.append(~live.pop(address))
    return Events(order, sizes, streams if any(streams) else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How the model's behaviour on a recorded trace agrees with what was recorded."""

    num_allocs: int
    num_same_address: int
    """Blocks that the model put where the real allocator put them."""
    num_driver_calls: int
    num_same_driver_calls: int
    """Calls of the driver with equal action, address and bytes, in the same request."""
    num_ooms: int
    num_same_ooms: int
    """Requests that ran out of memory in both."""
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    num_alloc_retries: int
    first_difference: str | None

    @property
    def exact(self) -> bool:
        return self.first_difference is None


def compare(
    recorded: Sequence[RecordedEvent],
    config: AllocatorConfig | None = None,
    capacity_bytes: int | None = None,
    *,
    device_total_bytes: int | None = None,
) -> Comparison:
    """Run the model over a recorded trace, on the recorded segment addresses, and compare each step.

    The model goes on from its own state after a difference, so the counts tell how far apart the two are.
    """
    addresses = _RecordedAddresses(recorded)
    model = CachingAllocator(
        config, capacity_bytes, device_total_bytes=device_total_bytes, addresses=addresses, log_driver_calls=True
    )
    calls = model.driver.calls
    assert calls is not None
    addresses.calls = calls
    checked = _Checked()
    where: dict[int, int] = {}  # recorded address of a live block -> the model's
    expected: list[tuple[str, int, int]] = []
    seen_calls = 0
    deferred: set[int] = set()
    for index, (action, address, size, stream) in enumerate(recorded):
        if action in _DRIVER_CALLS:
            expected.append((action, address, size))
        elif action == "free_requested":
            if _is_deferred(recorded, index):
                deferred.add(address)
                if address in where:
                    model.free_later(where[address])
        elif action == "free_completed":
            block = where.pop(address, None)  # None: the model ran out of memory there
            if block is not None:
                (model.complete_free if address in deferred else model.free)(block)
            deferred.discard(address)
        elif action in ("alloc", "oom"):
            try:
                mine = model.malloc(size, stream)
            except OutOfMemory:
                checked.oom(index, expected=action == "oom")
            else:
                checked.alloc(index, address if action == "alloc" else None, mine)
                if action == "alloc":
                    where[address] = mine
                else:
                    model.free(mine)
            checked.driver_calls(index, expected, calls[seen_calls:])
            seen_calls = len(calls)
            expected = []
    return Comparison(
        num_allocs=checked.num_allocs,
        num_same_address=checked.num_same_address,
        num_driver_calls=checked.num_driver_calls,
        num_same_driver_calls=checked.num_same_driver_calls,
        num_ooms=checked.num_ooms,
        num_same_ooms=checked.num_same_ooms,
        peak_allocated_bytes=model.peak_allocated_bytes,
        peak_reserved_bytes=model.peak_reserved_bytes,
        num_alloc_retries=model.num_alloc_retries,
        first_difference=checked.first_difference,
    )


def _is_deferred(recorded: Sequence[RecordedEvent], index: int) -> bool:
    """Whether the block whose free was requested stayed in use on another stream: its completion does not follow."""
    following = recorded[index + 1] if index + 1 < len(recorded) else None
    return following is None or following[:2] != ("free_completed", recorded[index][1])


class _Checked:
    """Tallies of what agreed, and the first thing that did not."""

    def __init__(self) -> None:
        self.num_allocs = self.num_same_address = 0
        self.num_driver_calls = self.num_same_driver_calls = 0
        self.num_ooms = self.num_same_ooms = 0
        self.first_difference: str | None = None

    def alloc(self, index: int, recorded: int | None, mine: int) -> None:
        if recorded is None:
            self.num_ooms += 1
            self._differs(f"event {index}: ran out of memory, but the model found a block")
            return
        self.num_allocs += 1
        if recorded == mine:
            self.num_same_address += 1
        else:
            self._differs(f"event {index}: allocated at {recorded:#x}, by the model at {mine:#x}")

    def oom(self, index: int, *, expected: bool) -> None:
        self.num_ooms += 1
        if expected:
            self.num_same_ooms += 1
        else:
            self.num_allocs += 1
            self._differs(f"event {index}: allocated, but the model ran out of memory")

    def driver_calls(self, index: int, recorded: list[tuple[str, int, int]], mine: list[tuple[str, int, int]]) -> None:
        self.num_driver_calls += len(recorded)
        self.num_same_driver_calls += sum(a == b for a, b in zip(recorded, mine, strict=False))
        if recorded != mine:
            self._differs(f"event {index}: driver calls {recorded}, by the model {mine}")

    def _differs(self, what: str) -> None:
        if self.first_difference is None:
            self.first_difference = what


class _RecordedAddresses(AddressSpace):
    """Gives each new segment of the model the address that the recorded one got, as long as the two agree."""

    def __init__(self, recorded: Iterable[RecordedEvent]) -> None:
        self._recorded = [event[:3] for event in recorded if event[0] in _DRIVER_CALLS]
        self._agreed = 0
        self._beyond = 1 << 40  # for segments that were not recorded; no real address is that low
        self.calls: list[tuple[str, int, int]] = []
        """The calls of the model's driver so far."""

    def reserve(self, size: int) -> int:
        index = len(self.calls)
        if self._agreed >= 0 and self.calls[self._agreed :] == self._recorded[self._agreed : index]:
            self._agreed = index
        else:
            self._agreed = -1
        if self._agreed >= 0 and index < len(self._recorded) and self._recorded[index][0] in _TAKING_CALLS:
            return self._recorded[index][1]
        self._beyond += size
        return self._beyond - size

    def release(self, address: int, size: int) -> None:
        """The recorded addresses are what they are."""

    def load_kernels(self) -> None:
        """Likewise."""

    def load_library(self, size: int) -> None:
        """Likewise."""

    def take(self, size: int) -> None:
        """Likewise."""
