"""Replays of a prediction: beside the trace that checks it, and ahead of the sizes that are asked for next."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest

from planner.allocator import AllocatorConfig, Events
from planner.allocator.caching import OutOfMemory
from planner.allocator.driver import AddressSpace
from planner.allocator.replay import OomEvent, ReplayResult
from planner.units import GIB, MIB
from planner.virtual.prediction import predict_trial
from planner.virtual.replays import KeptReplays, Replays
from planner.virtual.scaling import TraceFamily
from planner.virtual.trace import Trace

CONFIG = AllocatorConfig()
CAPACITY = 3500 * MIB


def _trace(batch_size: int) -> Trace:
    """Two steps that leave gaps behind, so that the least capacity lies below what is reserved without a limit."""
    trace = Trace()
    for step in (1, 2):
        trace.mark(f"step {step}")
        blocks = [trace.allocate((30 + 7 * number) * batch_size * MIB, "activation") for number in range(6)]
        for block in blocks[::2]:
            trace.free(block)
        larger = trace.allocate(61 * batch_size * MIB, "activation")
        for block in (*blocks[1::2], larger):
            trace.free(block)
    trace.mark("end")
    return trace


class _Waiting:
    """The check of a size ends when it was asked so many times whether it has."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def is_done(self, batch_size: int) -> bool:
        self.patience -= 1
        return self.patience < 0


def _predict(family: TraceFamily, kept: KeptReplays, batch_size: int, ahead: list[int]) -> dict[str, object]:
    return predict_trial(
        family, batch_size, fresh=batch_size != 8, ahead=ahead, kept=kept, config=CONFIG, capacity_bytes=CAPACITY,
        device_total_bytes=80 * GIB, compute_capability=(9, 0),
    )  # fmt: skip


def _search(patience: int, ahead: list[int]) -> list[dict[str, object]]:
    waiting = _Waiting(patience)
    family, kept = TraceFamily(_trace, lambda sizes: None, waiting.is_done), KeptReplays()
    return [_predict(family, kept, size, ahead if size == 10 else []) for size in (8, 10, 11, 12)]


def test_what_was_replayed_ahead_gives_the_same_answers() -> None:
    plain, part, whole = (_search(patience, [11, 12]) for patience in (0, 7, 1000))
    for answers in (plain, part, whole):
        for answer in answers:
            timings = answer.pop("timings")
            assert isinstance(timings, dict)
            assert timings["replay_s"] >= 0
    assert plain == part == whole
    assert [answer["fits"] for answer in plain] == [True, True, False, False]


def test_sizes_ahead_are_replayed_only_while_a_trace_is_waited_for() -> None:
    def replayed(patience: int) -> list[int]:
        waiting = _Waiting(patience)
        family, kept = TraceFamily(_trace, lambda sizes: None, waiting.is_done), KeptReplays()
        _predict(family, kept, 8, [])
        _predict(family, kept, 10, [11, 12])
        return [kept.of(family.scaled(size).events, CONFIG, CAPACITY, 80 * GIB).number for size in (11, 12)]

    assert replayed(0) == [0, 0]
    some = replayed(4)
    assert some[0] > 0 == some[1]
    assert min(replayed(1000)) > sum(some)


def test_replays_are_kept_for_equal_events_and_settings_alone() -> None:
    kept = KeptReplays()
    family = TraceFamily(_trace)
    first = kept.of(family.scaled(8).events, CONFIG, GIB, 80 * GIB)
    assert kept.of(family.scaled(8).events, CONFIG, GIB, 80 * GIB) is first
    others = [
        kept.of(family.scaled(9).events, CONFIG, GIB, 80 * GIB),
        kept.of(family.scaled(8).events, CONFIG, 2 * GIB, 80 * GIB),
        kept.of(family.scaled(8).events, AllocatorConfig(expandable_segments=True), GIB, 80 * GIB),
    ]
    assert first not in others
    assert len(set(others)) == 3


def test_a_capacity_is_replayed_once() -> None:
    events = Events([0, ~0, 1, 2, ~1, 3], [300 * MIB, 100 * MIB, 90 * MIB, 95 * MIB])
    replays = Replays(events, CONFIG, GIB, 80 * GIB)
    needed, spread = replays.needed_bytes, replays.spread
    number = replays.number
    replays.make_all()
    assert (replays.needed_bytes, replays.spread, replays.number) == (needed, spread, number)


def test_two_processes_replay_what_one_does() -> None:
    """In a process of its own: a fork that ends has every other child of its process killed."""
    code = """
from tests.test_virtual_replays import CAPACITY, CONFIG, GIB, TraceFamily, Replays, _trace
events = TraceFamily(_trace).scaled(11).events
one, two, part = (Replays(events, CONFIG, CAPACITY, 80 * GIB) for _ in range(3))
one.make_all()
part.make_all(iter([False] * 4 + [True]).__next__)
assert 0 < part.number < one.number
for replays in (two, part):
    replays.make_all_in_two()
    made = replays.number
    assert (replays.needed_bytes, replays.spread, replays.number) == (one.needed_bytes, one.spread, one.number)
    assert replays.number == made
    assert replays._reserved_elsewhere == one._reserved_elsewhere
print("the same")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.stdout == "the same\n", run.stderr


def test_what_fits_under_the_capacity_needs_no_more() -> None:
    """resnet50 at 193 samples ran under 16 GiB on an H200; by the same rules it runs out with 16 MiB more, where other
    cached blocks are given back."""
    path = Path(__file__).parents[1] / "measurements/h200/steps/resnet50-224.fp32.none.16.193.json.xz"
    recorded = json.loads(lzma.decompress(path.read_bytes()))["events"]
    order: list[int] = []
    sizes: list[int] = []
    live: dict[int, int] = {}
    for number, address, size in zip(*(recorded[key] for key in ("action", "addr", "size")), strict=True):
        if recorded["actions"][number] == "alloc":
            live[address] = len(sizes)
            order.append(len(sizes))
            sizes.append(size)
        elif recorded["actions"][number] == "free_requested":
            order.append(~live.pop(address))
    events = Events(order, sizes, first_kernel=323)  # after the batch and the first convolution's result
    replays = Replays(events, CONFIG, 16 * GIB, 140 * GIB)
    assert replays.limited.fits
    assert not Replays(events, CONFIG, 16 * GIB + 16 * MIB, 140 * GIB).limited.fits
    assert replays.needed_bytes <= 16 * GIB


def test_what_runs_out_under_the_capacity_needs_more_though_less_would_do() -> None:
    """Swin with checkpointing at 353 samples runs out of memory under 10 GiB, in its replay as on an H200; in the
    replay it does not under 9.3 GiB."""

    class Holed(Replays):
        def _run(self, capacity_bytes: int | None, addresses: AddressSpace | None = None) -> ReplayResult:
            fits = capacity_bytes is None or 7 * GIB <= capacity_bytes < 7.8 * GIB or capacity_bytes >= 9 * GIB
            refused = {"requested_bytes": 1, "segment_bytes": 1, "allocated_bytes": 1, "reserved_bytes": 1}
            error = OutOfMemory(**refused, limit_bytes=capacity_bytes)
            return ReplayResult(
                peak_allocated_bytes=5 * GIB, peak_reserved_bytes=10 * GIB, num_alloc_retries=1, num_steps=3,
                peak_allocated_index=0, oom=None if fits else OomEvent(index=0, block=0, error=error),
            )  # fmt: skip

    events = TraceFamily(_trace).scaled(11).events
    least, needed = (
        [getattr(Holed(events, CONFIG, capacity, 80 * GIB), name) / GIB for capacity in (6 * GIB, 8 * GIB, 10 * GIB)]
        for name in ("least_bytes", "needed_bytes")
    )
    assert least == pytest.approx([7, 7, 7], rel=1 / 128)
    assert needed == pytest.approx([7, 9, 7], rel=1 / 128)
