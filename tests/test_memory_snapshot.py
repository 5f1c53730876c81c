"""The export for PyTorch's memory viewer: its own functions read it, and so does the planner."""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.cuda import _memory_viz

from planner.allocator import AllocatorConfig, Events, Plans, memory_snapshot, replay
from planner.allocator.recorded import replayable, snapshot_events
from planner.units import GIB, MIB
from planner.virtual.scaling import Scaled, events_of
from planner.virtual.snapshot import snapshot_file
from planner.virtual.trace import Phase, Purpose, Trace
from tests.virtual_child import Process

ROOT = Path(__file__).parent.parent

# What ``unpickle`` of torch/utils/viz/MemoryViz.js knows, by the names of pickletools.
OPCODES = set(
    """APPEND APPENDS BINGET BININT BININT1 BININT2 EMPTY_DICT EMPTY_LIST FRAME LONG1 LONG_BINGET MARK MEMOIZE PROTO
    SETITEMS SHORT_BINUNICODE STOP TUPLE2 BINPUT BINUNICODE EMPTY_TUPLE NEWTRUE NEWFALSE NONE BINFLOAT TUPLE TUPLE1
    TUPLE3 LONG_BINPUT LIST DICT SETITEM""".split()
)
# Keys of a segment, a block and an event in a real snapshot: torch/csrc/cuda/memory_snapshot.cpp.
SEGMENT = set(
    """device address total_size allocated_size active_size requested_size stream segment_type segment_pool_id
    is_expandable frames blocks""".split()
)
BLOCK = {"address", "size", "requested_size", "state", "frames"}
EVENT = {"action", "addr", "size", "stream", "time_us", "frames"}
ACTIONS = {"alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap"}


def _check(document: dict[str, Any]) -> None:
    """The structure that both viewers rely on."""
    (trace,) = document["device_traces"]
    for event in trace:
        assert event.keys() - {"category"} == EVENT
        assert event["action"] in ACTIONS
        assert event["frames"]
        assert all(frame.keys() == {"filename", "line", "name"} for frame in event["frames"])
    assert "unknown" in {event["category"] for event in trace}, "else the viewer raises"
    for segment in document["segments"]:
        assert segment.keys() == SEGMENT
        assert all(block.keys() == BLOCK for block in segment["blocks"])
        assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"]
    assert "reserved" in _memory_viz.segsum(document)  # raises where bytes do not add up
    assert f"{len(trace)} entries" in _memory_viz.trace(document)
    for plot in (_memory_viz.trace_plot, _memory_viz.segment_plot):
        assert "snapshot.pickle" in plot(document)
    assert _memory_viz.memory(document, format_flamegraph=str).count("\n") >= len(document["segments"])


def _check_history(document: dict[str, Any]) -> None:
    """What happened leads to what is there at the end: the viewer walks back from there (``simulate_memory``)."""
    taken: dict[int, int] = {}
    live: dict[int, int] = {}
    for event in document["device_traces"][0]:
        address, size = event["addr"], event["size"]
        if event["action"] in ("segment_alloc", "segment_map"):
            taken[address] = size
        elif event["action"] in ("segment_free", "segment_unmap"):
            assert taken.pop(address) == size
        elif event["action"] == "alloc":
            assert any(start <= address < start + length for start, length in taken.items())
            live[address] = size
        elif event["action"] == "free_completed":
            assert live.pop(address) == size
    assert sum(taken.values()) == sum(segment["total_size"] for segment in document["segments"])
    blocks = [block for segment in document["segments"] for block in segment["blocks"]]
    assert live == {block["address"]: block["requested_size"] for block in blocks if block["requested_size"]}


def _trace() -> Trace:
    trace = Trace()
    trace.owners += [("net.0", "weight"), ("net.0", "")]
    trace.mark("step 1")
    trace.phases.append((0, Phase.FORWARD))
    trace.allocate(30 * MIB, "aten::_to_copy", 1, Purpose.PARAMETER)
    result = trace.allocate(3 * MIB + 5, "aten::mm", 2)
    trace.convolutions[trace.allocate(900 * MIB, "aten::convolution", 2, Purpose.WORKSPACE)] = 0
    trace.free(2)
    trace.phases.append((len(trace.events), Phase.BACKWARD))
    trace.allocate(40 * MIB, "aten::mm_backward", 2)
    trace.free(result)
    return trace


def _document(trace: Trace, capacity_bytes: int = GIB, config: AllocatorConfig | None = None) -> dict[str, Any]:
    scaled = Scaled(events_of(trace, trace.sizes), trace, True, ())
    data = snapshot_file(
        scaled, 4, config=config or AllocatorConfig(), capacity_bytes=capacity_bytes, device_total_bytes=2 * GIB
    )
    assert {opcode.name for opcode, _, _ in pickletools.genops(data)} <= OPCODES
    document: dict[str, Any] = pickle.loads(data)
    return document


@pytest.mark.parametrize("config", [AllocatorConfig(), AllocatorConfig(expandable_segments=True)])
def test_pytorchs_own_functions_open_it(config: AllocatorConfig) -> None:
    document = _document(_trace(), config=config)
    _check(document)
    _check_history(document)
    assert document["planner"] == {"source": "predicted", "batch_size": 4, "fits": True}
    assert document["allocator_settings"]["expandable_segments"] is config.expandable_segments
    assert {segment["is_expandable"] for segment in document["segments"]} == {config.expandable_segments}


def test_a_stack_names_the_operator_the_tensor_its_modules_and_the_phase() -> None:
    events = _document(_trace())["device_traces"][0]
    stacks = [event["frames"] for event in events if event["action"] == "alloc"]
    named = [[(frame["filename"], frame["name"]) for frame in stack] for stack in stacks]
    assert named[0] == [
        ("operator", "aten::_to_copy"),
        ("tensor", "weight"),
        ("module", "net.0"),
        ("module", "net"),
        ("phase", "step 1 forward"),
    ]
    assert named[3][0] == ("operator", "aten::mm_backward")
    assert named[3][-1] == ("phase", "step 1 backward")
    categories = [event["category"] for event in events if event["action"] == "alloc"]
    assert categories == ["parameters", "activations", "workspaces", "gradients in flight"]


def test_a_request_that_was_refused_is_an_oom_event() -> None:
    events = Events([0, 1, ~0, 2], [8 * MIB, 64 * MIB, 90 * MIB], plans={1: Plans(0, (64 * MIB, 0))})
    document = memory_snapshot(
        events, capacity_bytes=40 * MIB, stack=lambda block: [], category=lambda block: "anything"
    )
    actions = [(event["action"], event["size"]) for event in document["device_traces"][0]]
    assert actions == [
        ("segment_alloc", 20 * MIB),
        ("alloc", 8 * MIB),
        ("oom", 64 * MIB),
        ("free_requested", 8 * MIB),
        ("free_completed", 8 * MIB),
        ("segment_free", 20 * MIB),
        ("oom", 90 * MIB),
    ]
    assert "OutOfMemoryError" in _memory_viz.trace(document)


def test_what_does_not_fit_is_exported_without_the_limit() -> None:
    document = _document(_trace(), capacity_bytes=32 * MIB)
    assert document["planner"]["fits"] is False
    assert "oom" not in {event["action"] for event in document["device_traces"][0]}


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with Process() as process:
        yield process


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_models_snapshot_replays_to_its_own_peaks(process: Process, tmp_path: Path, checkpointing: str) -> None:
    spec = yaml.safe_load((ROOT / "examples/gpt2-s1024.yaml").read_text())
    variant = {"precision": "bf16-amp", "checkpointing": checkpointing}
    path = tmp_path / "gpt2.pickle"
    peaks = process.do("snapshot", spec=spec, variant=variant, batch_size=6, path=str(path))
    data = path.read_bytes()
    assert {opcode.name for opcode, _, _ in pickletools.genops(data)} <= OPCODES
    assert len(data) < 8 * MIB
    document = pickle.loads(data)
    _check(document)
    _check_history(document)
    result = replay(replayable(snapshot_events(document)))
    assert [result.peak_allocated_bytes, result.peak_reserved_bytes] == peaks
    modules = {frame["name"] for event in document["device_traces"][0] for frame in event["frames"]}
    assert {"transformer.h.11.mlp.act", "transformer.wte", "aten::addmm", "step 2 backward"} <= modules
