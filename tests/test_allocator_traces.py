"""The model against what a real GPU did: every recorded block at its recorded address, every peak to the byte."""

import gzip
import json
from pathlib import Path

import pytest

from planner.allocator import AllocatorConfig, parse_conf, replay
from planner.allocator.recorded import compare, read_runs, replayable, snapshot_events
from planner.errors import InvalidArgument
from planner.units import MIB

FOLDER = Path(__file__).parent / "golden" / "traces"
RUNS = {run.name: run for path in sorted(FOLDER.glob("*.trace.json.gz")) for run in read_runs(path)}
TRAINING_STEPS = ("bert-large-s512", "gpt2-s1024", "resnet50-224", "vit-large-224")


@pytest.mark.parametrize("name", RUNS)
def test_every_block_gets_its_recorded_address(name):
    run = RUNS[name]
    compared = run.compare()
    assert compared.first_difference is None
    assert compared.exact
    assert compared.num_allocs == compared.num_same_address == sum(event[0] == "alloc" for event in run.events)
    assert compared.num_driver_calls == compared.num_same_driver_calls > 0
    assert compared.num_ooms == compared.num_same_ooms == run.num_ooms
    assert compared.num_alloc_retries == run.num_alloc_retries
    assert compared.peak_allocated_bytes == run.peak_allocated_bytes
    assert compared.peak_reserved_bytes == run.peak_reserved_bytes


@pytest.mark.parametrize("name", TRAINING_STEPS)
def test_a_blind_replay_reaches_the_recorded_peaks(name):
    """Without the recorded addresses: what a prediction does."""
    result = replay(replayable(RUNS[name].events))
    assert result.peak_allocated_bytes == RUNS[name].peak_allocated_bytes
    assert result.peak_reserved_bytes == RUNS[name].peak_reserved_bytes


@pytest.mark.parametrize("name", TRAINING_STEPS)
def test_a_limit_at_the_peak_fits_and_one_below_the_allocated_bytes_does_not(name):
    run = RUNS[name]
    events = replayable(run.events)
    at_the_peak = replay(events, capacity_bytes=run.peak_reserved_bytes)
    assert at_the_peak.fits
    assert at_the_peak.num_alloc_retries == 0
    limit = run.peak_allocated_bytes - 2 * MIB
    below = replay(events, capacity_bytes=limit)
    assert below.oom is not None
    assert below.peak_reserved_bytes <= limit


def test_a_wrong_setting_is_noticed():
    compared = compare(RUNS["resnet50-224"].events, parse_conf("roundup_power2_divisions:2"))
    assert not compared.exact
    assert compared.num_same_address < compared.num_allocs
    assert "by the model" in (compared.first_difference or "")


def test_an_oom_that_was_not_recorded_is_noticed():
    compared = compare(RUNS["resnet50-224"].events, AllocatorConfig(), 100 * MIB)
    assert compared.num_ooms > 0
    assert compared.num_same_ooms == 0
    assert not compared.exact


def test_a_recorded_retry_and_oom_are_followed():
    """A limit of 60 MiB: 20 cached MiB are given back for 40, then 30 more are refused."""
    recorded = [
        ("segment_alloc", 0x1000000, 20 * MIB, 0),
        ("alloc", 0x1000000, 20 * MIB, 0),
        ("free_requested", 0x1000000, 20 * MIB, 0),
        ("free_completed", 0x1000000, 20 * MIB, 0),
        ("segment_alloc", 0x9000000, 30 * MIB, 0),
        ("alloc", 0x9000000, 30 * MIB, 0),
        ("segment_free", 0x1000000, 20 * MIB, 0),
        ("segment_alloc", 0x1000000, 26 * MIB, 0),
        ("alloc", 0x1000000, 26 * MIB, 0),
        ("oom", 0, 30 * MIB, 0),
    ]
    compared = compare(recorded, capacity_bytes=60 * MIB)
    assert compared.first_difference is None
    assert (compared.num_alloc_retries, compared.num_ooms, compared.num_same_ooms) == (2, 1, 1)


def test_a_free_that_waits_for_a_stream_is_followed():
    recorded = [
        ("segment_alloc", 0x1000000, 20 * MIB, 0),
        ("alloc", 0x1000000, 20 * MIB, 0),
        ("free_requested", 0x1000000, 20 * MIB, 0),
        ("segment_alloc", 0x3000000, 20 * MIB, 0),
        ("alloc", 0x3000000, 20 * MIB, 0),
        ("free_completed", 0x1000000, 20 * MIB, 0),
        ("alloc", 0x1000000, 20 * MIB, 0),
    ]
    compared = compare(recorded)
    assert compared.exact
    assert (compared.peak_allocated_bytes, compared.peak_reserved_bytes) == (40 * MIB, 40 * MIB)


def test_a_snapshot_of_pytorch_is_read():
    history = [
        {"action": "segment_alloc", "addr": 4096, "size": 2 * MIB, "stream": 0, "time_us": 1},
        {"action": "alloc", "addr": 4096, "size": 100, "stream": 7, "time_us": 2},
        {"action": "free_requested", "addr": 4096, "size": 100, "stream": 7, "time_us": 3},
        {"action": "free_completed", "addr": 4096, "size": 100, "stream": 7, "time_us": 3},
        {"action": "oom", "device_free": 5, "size": 512, "stream": 0, "time_us": 4},
    ]
    recorded = snapshot_events({"device_traces": [[], history]}, device=1)
    assert recorded[1] == ("alloc", 4096, 100, 7)
    events = replayable(recorded)
    assert (list(events.order), list(events.sizes), list(events.streams or ())) == ([0, ~0], [100], [7])


def test_a_trace_that_began_too_late_is_refused():
    with pytest.raises(InvalidArgument, match="record from the first allocation"):
        replayable([("free_completed", 4096, 512, 0)])


def test_an_unreadable_trace_is_refused(tmp_path):
    path = tmp_path / "x.trace.json.gz"
    with pytest.raises(InvalidArgument, match=r"x\.trace\.json\.gz"):
        read_runs(path)
    path.write_bytes(b"not gzip")
    with pytest.raises(InvalidArgument, match="not a trace"):
        read_runs(path)
    path.write_bytes(gzip.compress(b'{"events": []}'))
    with pytest.raises(InvalidArgument, match="not a trace"):
        read_runs(path)


def test_runs_of_the_recording_script_are_read(tmp_path):
    """The format of benchmarks/record_traces.py."""
    run = {
        "workload": "synthetic",
        "conf": "max_split_size_mb:64",
        "fraction": 0.5,
        "total_memory_bytes": 80 * MIB,
        "allowed_bytes": 40 * MIB,
        "stats": {
            "allocated_bytes.all.peak": 512,
            "reserved_bytes.all.peak": 2 * MIB,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        },
        "events": [["segment_alloc", 4096, 2 * MIB, 0], ["alloc", 4096, 7, 0], ["snapshot", 0, 512, 0]],
    }
    path = tmp_path / "limit.trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"setting": "limit", "runs": [run]}).encode()))
    (read,) = read_runs(path)
    assert (read.name, read.capacity_bytes) == ("limit/synthetic", 40 * MIB)
    assert read.config == AllocatorConfig(max_split_bytes=64 * MIB)
    compared = read.compare()
    assert compared.exact
    assert (compared.peak_allocated_bytes, compared.peak_reserved_bytes) == (512, 2 * MIB)
