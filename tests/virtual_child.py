"""The tests' side of the virtual GPU: a process in which torch may be changed, answering what a test asks it to run."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
import unittest.mock
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from planner.allocator import AllocatorConfig, Events, replay
from planner.errors import ModelError
from planner.processes import Child, serve
from planner.specs.document import parse_spec
from planner.specs.variants import Variant
from planner.virtual import steady, tracing
from planner.virtual.architecture import Architecture
from planner.virtual.explanation import explain
from planner.virtual.kernels import Kernels
from planner.virtual.recorder import Recorder
from planner.virtual.scaling import Scaled, TraceFamily
from planner.virtual.snapshot import snapshot_file
from planner.virtual.trace import Trace
from planner.virtual.tracing import prepare, trace_steps

TIMEOUT_S = 300.0
H200 = Architecture(compute_capability=(9, 0), num_sms=132, torch_version=(2, 11))
"""What the measurements were taken with."""
H200_BYTES = 150_109_880_320


class Process:
    """The parent's side; a context manager."""

    def __init__(self) -> None:
        self._child = Child.start("tests.virtual_child")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()

    def do(self, what: str, **arguments: Any) -> Any:
        """What the handler of that name below answers; raises what it raised, if it is the planner's error."""
        return self._child.request({"do": what, **arguments}, TIMEOUT_S)["value"]

    def run(self, code: str) -> Any:
        """Run ``code`` on the virtual device; the value of its variable ``result``."""
        return self.do("run", code=code)


def _variant(names: Mapping[str, str]) -> Variant:
    return Variant.from_dict(names)


_families: dict[str, TraceFamily] = {}


def _family(spec: Mapping[str, Any], variant: Mapping[str, str]) -> TraceFamily:
    key = repr((spec, variant))
    if key not in _families:
        parsed, chosen = parse_spec(spec), _variant(variant)
        _families[key] = TraceFamily(lambda size: trace_steps(parsed, chosen, size, H200))
    return _families[key]


def traced(*, spec: Any, variant: Any, batch_size: int, num_steps: int = 2) -> dict[str, Any]:
    """The trace of some steps: requested sizes, order, operators, marks, and what is not modelled."""
    trace = trace_steps(parse_spec(spec), _variant(variant), batch_size, H200, num_steps=num_steps)
    starts = {name: index for index, name in trace.marks}
    return {
        "value": {
            "sizes": list(trace.sizes),
            "events": list(trace.events),
            "operators": list(trace.operators),
            "born_before_step_1": sum(event >= 0 for event in trace.events[: starts["step 1"]]),
            "notes": list(trace.notes),
            "marks": [name for _, name in trace.marks],
            "unmodelled": sorted({doubt.operator for doubt in trace.doubts if not doubt.modelled}),
        }
    }


def copied_and_run(*, spec: Any, variant: Any, batch_size: int) -> dict[str, Any]:
    """Whether the third step was copied, and whether a trace with all three steps run is the same."""
    copied: list[bool] = []

    def watched(trace: Trace) -> bool:
        copied.append(steady.repeat_last_step(trace))
        return copied[-1]

    def refused(_: Trace) -> bool:
        return False

    found = []
    for repeat in (watched, refused):
        with unittest.mock.patch.object(tracing, "repeat_last_step", repeat):
            found.append(trace_steps(parse_spec(spec), _variant(variant), batch_size, H200))
    one, two = ([each.events, each.sizes, each.operators, each.convolutions, each.marks] for each in found)
    return {"value": {"copied": copied, "same": one == two}}


def peaks(*, spec: Any, variant: Any, batch_sizes: list[int]) -> dict[str, Any]:
    """``[allocated, reserved]`` bytes at each batch size, with no limit; traced as a prediction traces."""
    family = _family(spec, variant)
    found = []
    for size in batch_sizes:
        result = _replayed(family.scaled(size), None)
        found.append([result.peak_allocated_bytes, result.peak_reserved_bytes])
    return {"value": {"peaks": found, "traced": list(family.traced_sizes)}}


def fits(*, spec: Any, variant: Any, batch_sizes: list[int], capacity_bytes: int) -> dict[str, Any]:
    family = _family(spec, variant)
    return {"value": [_replayed(family.scaled(size), capacity_bytes).fits for size in batch_sizes]}


def scaled_and_traced(*, spec: Any, variant: Any, batch_sizes: list[int]) -> dict[str, Any]:
    """For each batch size: whether it was scaled, and how many block sizes differ from those of a trace of its own."""
    family = _family(spec, variant)
    found = []
    for size in batch_sizes:
        scaled = family.scaled(size)
        own = trace_steps(parse_spec(spec), _variant(variant), size, H200)
        same = list(scaled.events.order) == own.events and len(own.sizes) == len(scaled.events.sizes)
        differing = sum(a != b for a, b in zip(scaled.events.sizes, own.sizes, strict=same))
        found.append({"exact": scaled.exact, "same_order": same, "differing": differing})
    return {"value": found}


def explained(*, spec: Any, variant: Any, batch_size: int) -> dict[str, Any]:
    """The explanation of one batch size, and the peaks that it must be of."""
    scaled = _family(spec, variant).scaled(batch_size)
    explanation = explain(
        scaled,
        batch_size,
        config=AllocatorConfig(),
        capacity_bytes=H200_BYTES,
        device_total_bytes=H200_BYTES,
        outside_bytes=0,
    )
    result = _replayed(scaled, H200_BYTES)
    peaks = {"allocated": result.peak_allocated_bytes, "reserved": result.peak_reserved_bytes}
    return {"value": {"explanation": explanation, "peaks": peaks}}


def snapshot(*, spec: Any, variant: Any, batch_size: int, path: str) -> dict[str, Any]:
    """Write a snapshot of one batch size to ``path``; the peaks that it must be of."""
    scaled = _family(spec, variant).scaled(batch_size)
    sizes = {"capacity_bytes": H200_BYTES, "device_total_bytes": H200_BYTES}
    Path(path).write_bytes(snapshot_file(scaled, batch_size, config=AllocatorConfig(), **sizes))
    result = _replayed(scaled, H200_BYTES)
    return {"value": [result.peak_allocated_bytes, result.peak_reserved_bytes]}


def _replayed(scaled: Scaled, capacity_bytes: int | None) -> Any:
    return replay(scaled.events, AllocatorConfig(), capacity_bytes, device_total_bytes=H200_BYTES)


def run(*, code: str) -> dict[str, Any]:
    """Run ``code`` with ``torch``, ``device``, ``trace`` and more in scope; the value of its variable ``result``."""
    device = prepare(H200)
    recorder = Recorder(Kernels(H200))
    scope: dict[str, Any] = {
        "torch": torch,
        "device": device,
        "trace": recorder.trace,
        "peak": _peak,
        "architecture": H200,
    }
    with FakeTensorMode(allow_non_fake_inputs=True), recorder:
        exec(code, scope)
    return {"value": scope["result"]}


def recorded_calls(*, path: str, calls: str, wanted: str, every: int, always: list[str]) -> dict[str, Any]:
    """One in ``every`` call of ``measurements/h200/kernels.json.gz`` in the group ``wanted``, and all that are named in
    ``always``, made here: for each its name, what the GPU allocated and freed, and what the virtual one does; sizes
    rounded to 512 bytes, frees by number."""
    spec = importlib.util.spec_from_file_location("kernel_calls", calls)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.CUDA = "vgpu"
    prepare(H200)
    rows = json.loads(gzip.decompress(Path(path).read_bytes()))["calls"]
    found = []
    recorded = (row for row in rows if row["group"] == wanted)
    for number, (row, (name, _, make)) in enumerate(zip(recorded, module.GROUPS[wanted](), strict=True)):
        if "events" in row and (number % every == 0 or name in always):
            found.append([name, _rounded(row["events"]), _rounded(_events_of(make))])
    return {"value": found}


def _events_of(make: Any) -> list[int]:
    """As ``benchmarks/measure_kernels.py`` records them; empty where the call needs values that are not known."""
    kernels = Kernels(H200)
    for thread in ("forward", "backward"):  # as after a first call
        list(kernels.of_handles(torch.ops.aten.addmm, thread))
    recorder = Recorder(kernels)
    trace = recorder.trace
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), recorder:
            call = make()
            start = len(trace.events)
            kept = call()
            end = len(trace.events)
    except ModelError:
        return []
    del kept, call
    numbers: dict[int, int] = {}
    events = []
    for event in trace.events[start:end]:
        block = event if event >= 0 else ~event
        if trace.sizes[block] and event >= 0:
            numbers[block] = len(numbers)
            events.append(trace.sizes[block])
        elif block in numbers:
            events.append(-numbers[block] - 1)
    return events


def _rounded(events: list[int]) -> list[int]:
    return [max(512, (event + 511) // 512 * 512) if event >= 0 else event for event in events]


def _peak(trace: Trace) -> int:
    return replay(Events(trace.events, trace.sizes)).peak_allocated_bytes


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.setrecursionlimit(10_000)
    handlers = (traced, copied_and_run, peaks, fits, scaled_and_traced, explained, snapshot, recorded_calls, run)
    serve({handler.__name__: handler for handler in handlers})
