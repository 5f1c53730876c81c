"""Replays of compact event sequences."""

import gzip
import json
from array import array
from pathlib import Path
from typing import Any

import pytest

from planner.allocator import Events, Plans, parse_conf, replay
from planner.units import MIB

REFUSED = Path(__file__).parent / "golden/refused-workspaces.json.gz"

# blocks:        0         1         2
SIZES = [30 * MIB, 20 * MIB, 40 * MIB]
EVENTS = Events(array("q", [0, 1, ~0, 2, ~1, ~2]), SIZES)


def test_peaks_timeline_and_what_was_live_at_the_peak():
    result = replay(EVENTS, timeline=True)
    assert result.fits
    assert (result.peak_allocated_bytes, result.peak_reserved_bytes) == (60 * MIB, 90 * MIB)
    assert list(result.allocated_timeline or ()) == [size * MIB for size in (30, 50, 20, 60, 40, 0)]
    assert list(result.reserved_timeline or ()) == [size * MIB for size in (30, 50, 50, 90, 90, 90)]
    assert result.peak_allocated_index == 3
    assert EVENTS.live_after(result.peak_allocated_index) == [1, 2]
    assert replay(EVENTS).allocated_timeline is None


def test_a_limit_costs_a_retry_before_it_is_too_small():
    assert replay(EVENTS, capacity_bytes=90 * MIB).num_alloc_retries == 0
    tight = replay(EVENTS, capacity_bytes=60 * MIB)
    assert (tight.fits, tight.num_alloc_retries, tight.peak_reserved_bytes) == (True, 1, 60 * MIB)
    too_small = replay(EVENTS, capacity_bytes=58 * MIB)
    assert not too_small.fits
    assert too_small.oom is not None
    assert (too_small.oom.index, too_small.oom.block) == (3, 2)
    assert too_small.oom.error.segment_bytes == 40 * MIB
    assert too_small.oom.error.allocated_bytes == too_small.oom.error.reserved_bytes == 20 * MIB


def test_the_same_order_with_other_sizes():
    larger = replay(Events(EVENTS.order, [2 * size for size in SIZES]))
    assert larger.peak_reserved_bytes == 180 * MIB


def test_blocks_of_no_bytes_never_reach_the_allocator():
    result = replay(Events([0, 1, ~0, ~1], [0, 512]), timeline=True)
    assert list(result.allocated_timeline or ()) == [0, 512, 512, 0]
    assert replay(Events([0, ~0], [0])).peak_reserved_bytes == 0


def test_nothing_at_all():
    result = replay(Events([], []))
    assert (result.peak_allocated_bytes, result.peak_allocated_index, result.fits) == (0, -1, True)


def test_streams_keep_their_blocks_apart():
    order, sizes = [0, ~0, 1, ~1], [20 * MIB, 20 * MIB]
    assert replay(Events(order, sizes)).peak_reserved_bytes == 20 * MIB
    assert replay(Events(order, sizes, [0, 1])).peak_reserved_bytes == 40 * MIB


def test_settings_change_the_outcome():
    """Growing sizes fragment segments of their own; one expandable segment serves them all."""
    order = [event for block in range(8) for event in (block, ~block)]
    events = Events(order, [(20 + 2 * block) * MIB for block in range(8)])
    assert replay(events).peak_reserved_bytes == sum(events.sizes)
    expandable = replay(events, parse_conf("expandable_segments:True"))
    assert expandable.peak_reserved_bytes == 40 * MIB


def _refused() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(gzip.decompress(REFUSED.read_bytes()))["cases"]
    return cases


@pytest.mark.parametrize("case", _refused(), ids=lambda case: f"{case['dtype']}-{case['limit'] >> 20}MiB")
def test_a_refused_workspace_costs_retries_once_and_another_plan_is_kept(case: dict[str, Any]) -> None:
    """What an H200 did: the sizes asked for are the recorded ones, everything else follows."""
    element = 4 if case["dtype"] == "float32" else 2
    image = case["n"] * case["c"] * case["side"] ** 2 * element
    weights = case["c"] * case["k"] * 9 * element
    sizes = [size for action, size in case["events"] if action in ("alloc", "oom")]
    # The first step: the result, the plans that were tried, the result's gradient, the weights', the plans for it.
    second = sizes.index(image, 1)
    forward, backward = sizes[1:second], sizes[second + 2 : sizes.index(image, second + 1)]
    # blocks: 0 input, 1 weights, 2 result, 3 workspace, 4 gradient, 5 weights' gradient, 6 workspace
    step = [2, 3, ~3, ~2, 4, 5, 6, ~6, ~4, ~5]
    events = Events(
        [0, 1, *step, *step],
        [image, weights, image, forward[0], image, weights, backward[0]],
        plans={3: Plans(0, [*forward, 0]), 6: Plans(1, [*backward, 0])},
    )
    result = replay(events, capacity_bytes=case["limit"])
    assert result.fits
    assert result.num_alloc_retries == case["retries"]
    assert result.peak_reserved_bytes == case["reserved"]
    assert result.peak_allocated_bytes == case["alloc"]
