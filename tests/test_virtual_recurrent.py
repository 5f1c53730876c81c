"""Recurrent models on the virtual GPU, against what an H200 did with them."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner.units import GIB
from tests.virtual_child import Process

ROOT = Path(__file__).parent.parent
VARIANTS = [
    *(("lstm-lm", precision) for precision in ("fp32", "bf16-amp", "fp16-amp")),
    *(("gru-classifier", precision) for precision in ("fp32", "bf16-amp")),
    *(("lstm-tagger", precision) for precision in ("fp32", "fp16-amp")),
]


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with Process() as process:
        yield process


@cache
def _measured(case: str, precision: str) -> dict[str, Any]:
    document = json.loads(gzip.decompress((ROOT / "measurements/h200/peaks.json.gz").read_bytes()))
    (found,) = (
        item for item in document["cases"] if item["case"] == case and item["variant"]["precision"] == precision
    )
    return dict(found)


def _spec(case: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / f"measurements/specs/{case}.yaml").read_text())
    document["model"]["target"] = "examples." + document["model"]["target"]
    return document


def _blocks(events: Any) -> list[tuple[int, int]]:
    """``(block, bytes)`` for each allocation, ``(~block, bytes)`` for each free; blocks numbered as they come."""
    live: dict[int, int] = {}
    found, count = [], 0
    for action, address, size, _ in events:
        if action == "alloc":
            live[address] = count
            found.append((count, size))
            count += 1
        elif action == "free_completed":
            found.append((~live.pop(address), size))
    return found


@pytest.mark.parametrize(("case", "precision"), VARIANTS)
def test_every_allocation_and_free_is_the_recorded_one(process: Process, case: str, precision: str) -> None:
    """Two training steps from the move on, in order and to the byte."""
    recorded = _blocks(_measured(case, precision)["trace_at_4"]["events"])
    traced = process.do("traced", spec=_spec(case), variant={"precision": precision}, batch_size=4)
    assert traced["unmodelled"] == []
    sizes, names = traced["sizes"], {}
    mine = []
    for event in traced["events"]:
        block = event if event >= 0 else ~event
        if sizes[block]:  # what a rule gives no bytes is not asked of the allocator
            number = names.setdefault(block, len(names))
            mine.append((number if event >= 0 else ~number, sizes[block]))
    assert len(recorded) > 200
    assert mine[: len(recorded)] == recorded


@pytest.mark.parametrize(("case", "precision"), VARIANTS)
def test_peaks_and_largest_batch_sizes_are_exact(process: Process, case: str, precision: str) -> None:
    measured, spec, variant = _measured(case, precision), _spec(case), {"precision": precision}
    peaks = measured["peaks"]
    found = process.do("peaks", spec=spec, variant=variant, batch_sizes=[int(size) for size in peaks])
    for peak, (allocated, reserved) in zip(peaks.values(), found["peaks"], strict=True):
        assert (allocated, reserved) == (peak["alloc"], peak["reserved"])
    bound = measured["max_batch"]["16"]
    sizes = [bound["max"], bound["first_oom"]]
    assert sizes[1] == sizes[0] + 1
    fits = process.do("fits", spec=spec, variant=variant, batch_sizes=sizes, capacity_bytes=16 * GIB)
    assert fits == [True, False]


def test_recorded_passes_of_every_cell_have_the_same_events() -> None:
    """Cells, dtypes, autocast, projections, packed sequences: what ``benchmarks/recurrent.py`` says of 93 passes."""
    command = [sys.executable, "benchmarks/recurrent.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "93 of 93 recorded passes have the same events, block by block" in done.stdout


def test_weights_become_views_of_one_buffer(process: Process) -> None:
    code = """
made = [torch.nn.LSTM(8, 16, 2).to(device), torch.nn.LSTM(8, 16, 2).to(device, torch.bfloat16)]
result = [len({weight.untyped_storage()._cdata for weight in module.parameters()}) for module in made]
"""
    assert process.run(code) == [1, 8]  # PyTorch leaves weights in bfloat16 as they are


def test_the_random_state_of_dropout_is_made_once(process: Process) -> None:
    code = """
module = torch.nn.GRU(8, 16, 2, dropout=0.5).to(device)
for _ in range(3):
    module(torch.randn(5, 2, 8, device=device))
module.eval()(torch.randn(5, 2, 8, device=device))
result = trace.sizes.count(6_488_064)
"""
    assert process.run(code) == 1


def test_known_lengths_are_packed_and_padded_again(process: Process) -> None:
    code = """
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
module = torch.nn.LSTM(8, 16, batch_first=True, bidirectional=True).to(device)
inputs = torch.randn(3, 7, 8, device=device)
lengths = torch.tensor([2, 7, 4])
packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
out, found = pad_packed_sequence(module(packed)[0], batch_first=True)
result = [list(packed.data.shape), list(out.shape), [int(length) for length in found]]
"""
    assert process.run(code) == [[13, 8], [3, 7, 32], [2, 7, 4]]


def test_lengths_that_depend_on_the_weights_are_refused(process: Process) -> None:
    code = """
from torch.nn.utils.rnn import pack_padded_sequence
try:
    inputs = torch.randn(3, 7, 8, device=device)
    pack_padded_sequence(inputs, (inputs.sum(-1) > 0).sum(-1).cpu(), batch_first=True, enforce_sorted=False)
except Exception as error:
    result = f"{type(error).__name__}: {error}"
"""
    assert process.run(code).startswith("ModelError")


def test_inference_keeps_no_reserve(process: Process) -> None:
    code = """
module = torch.nn.LSTM(64, 256).to(device)
inputs = torch.randn(20, 4, 64, device=device)
start = len(trace.sizes)
with torch.inference_mode():
    module.eval()(inputs)
result = [name for name in trace.operators[start:]]
"""
    # States (two zeros), then output, hidden and cell state and the workspace.
    assert process.run(code) == ["aten::zeros"] * 2 + ["aten::_cudnn_rnn"] * 4


def test_a_linear_layer_adds_its_bias_in_place(process: Process) -> None:
    code = """
linear = torch.nn.Linear(32, 48).to(device)
start = len(trace.sizes)
linear(torch.randn(4, 6, 32, device=device).transpose(0, 1))
result = [trace.operators[start:].count("aten::" + name) for name in ("add", "mm", "addmm")]
"""
    assert process.run(code)[0] == 0


@pytest.mark.parametrize("precision", ["fp16-amp", "bf16"])
def test_what_is_scaled_equals_what_is_traced(process: Process, precision: str) -> None:
    """At batch sizes at which PyTorch asks for a persistent algorithm, and at others."""
    spec = _spec("lstm-lm")
    spec["model"]["args"] = {"width": 256, "layers": 1}
    sizes = [3, 7, 8, 24, 61, 136]
    found = process.do("scaled_and_traced", spec=spec, variant={"precision": precision}, batch_sizes=sizes)
    assert found == [{"exact": False, "same_order": True, "differing": 0}] * len(sizes)
