"""Predictions against what an H200 did: peaks, largest batch sizes and single allocations."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner.allocator import Events, replay
from planner.allocator.recorded import read_runs, replayable
from planner.units import GIB
from tests.virtual_child import Process

ROOT = Path(__file__).parent.parent
TRUTH = ROOT / "measurements/h200/truth"
RECORDED = ROOT / "tests/golden/traces"


def _spec(case: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / f"examples/{case}.yaml").read_text())
    return document


def _measured(case: str, variant: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((TRUTH / f"{case}.json").read_text())["variants"][variant]
    return found


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with Process() as process:
        yield process


@pytest.mark.parametrize("precision", ["fp32", "bf16-amp"])
def test_peaks_of_bert_large_at_every_measured_batch_size(process: Process, precision: str) -> None:
    measured = _measured("bert-large-s512", precision)["peaks"]
    sizes = [int(size) for size in measured]
    assert len(sizes) >= 4
    variant = {"precision": precision}
    found = process.do("peaks", spec=_spec("bert-large-s512"), variant=variant, batch_sizes=sizes)
    for size, (allocated, reserved) in zip(sizes, found["peaks"], strict=True):
        assert allocated == pytest.approx(measured[str(size)]["alloc"], rel=0.005), size
        assert reserved == pytest.approx(measured[str(size)]["reserved"], rel=0.02), size
    assert not {8, 24} & set(found["traced"]), "the larger sizes follow from two small traces"


def test_a_tie_between_free_blocks_is_decided_as_on_a_gpu(process: Process) -> None:
    """gpt2 with checkpointing reserves 2,992 MiB, or 3,170 or 3,190 where segments lie otherwise."""
    measured = _measured("gpt2-s1024", "bf16-amp+ckpt")["peaks"]["1"]
    variant = {"precision": "bf16-amp", "checkpointing": "full"}
    found = process.do("peaks", spec=_spec("gpt2-s1024"), variant=variant, batch_sizes=[1])
    assert found["peaks"] == [[measured["alloc"], measured["reserved"]]]


def test_a_gap_that_lasts_until_cublas_is_loaded_decides_too(process: Process) -> None:
    """gpt2 at batch size 1 was 0.16% low, at 4 0.02% high, while the gap was taken for a hole."""
    measured = _measured("gpt2-s1024", "bf16-amp")["peaks"]
    sizes = ["1", "4", "8", "24"]
    variant = {"precision": "bf16-amp"}
    found = process.do("peaks", spec=_spec("gpt2-s1024"), variant=variant, batch_sizes=[int(size) for size in sizes])
    assert found["peaks"] == [[measured[size]["alloc"], measured[size]["reserved"]] for size in sizes]


def test_largest_batch_sizes_of_gpt2_are_exact(process: Process) -> None:
    measured = _measured("gpt2-s1024", "bf16-amp")["max_batch"]
    for limit, largest in (("16", 9), ("40", 27)):
        assert (measured[limit]["max"], measured[limit]["first_oom"]) == (largest, largest + 1)
        fits = process.do(
            "fits",
            spec=_spec("gpt2-s1024"),
            variant={"precision": "bf16-amp"},
            batch_sizes=[largest, largest + 1],
            capacity_bytes=int(limit) * GIB,
        )
        assert fits == [True, False], f"under {limit} GiB"


def test_each_allocation_of_gpt2_is_the_recorded_one(process: Process) -> None:
    """The recorded steps on an H200, block by block: nothing is fitted to them but the rules of kernels."""
    path = RECORDED / "gpt2-s1024.trace.json.gz"
    (run,) = read_runs(path)
    recorded = replayable(run.events)
    header = json.loads(gzip.decompress(path.read_bytes()))
    variant = {"precision": header["variant"]}
    traced = process.do(
        "traced",
        spec=_spec("gpt2-s1024"),
        variant=variant,
        batch_size=header["batch"],
        num_steps=header["steps"],
    )
    mine = Events(traced["events"], traced["sizes"])
    assert replay(mine).peak_allocated_bytes == run.peak_allocated_bytes
    assert replay(mine).peak_reserved_bytes == run.peak_reserved_bytes
    taken = [size for size in traced["sizes"] if size]
    same = (Counter(taken) & Counter(recorded.sizes)).total()
    assert same >= 0.95 * max(len(taken), len(recorded.sizes))


def _convolutional(case: str, precision: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Spec and measurements of one of ``measurements/specs``."""
    document = json.loads(gzip.decompress((ROOT / "measurements/h200/peaks.json.gz").read_bytes()))
    wanted = (case, precision, "none")
    (measured,) = (
        each
        for each in document["cases"]
        if (each["case"], each["variant"]["precision"], each["variant"]["checkpointing"]) == wanted
    )
    return yaml.safe_load((ROOT / f"measurements/specs/{case}.yaml").read_text()), measured


@pytest.mark.parametrize(("case", "precision"), [("convnext-tiny-timm", "fp32"), ("resnext50-timm", "fp32")])
def test_each_event_of_a_convolutional_net_is_the_recorded_one(process: Process, case: str, precision: str) -> None:
    """Two steps at batch size 4: every birth and death, in order, in the allocator's multiples of 512 bytes."""
    spec, measured = _convolutional(case, precision)
    recorded = [
        (action == "alloc", -(-size // 512))
        for action, _, size, _ in measured["trace_at_4"]["events"]
        if action in ("alloc", "free_requested")
    ]
    assert len(recorded) > 1500
    traced = process.do("traced", spec=spec, variant={"precision": precision}, batch_size=4, num_steps=2)
    sizes = traced["sizes"]
    mine = [(event >= 0, -(-sizes[max(event, ~event)] // 512)) for event in traced["events"]]
    assert [event for event in mine if event[1]][: len(recorded)] == recorded


def test_peaks_of_convnext_at_measured_batch_sizes(process: Process) -> None:
    spec, measured = _convolutional("convnext-tiny-timm", "fp32")
    sizes = [2, 4, 8, 16, 32, 64]
    found = process.do("peaks", spec=spec, variant={"precision": "fp32"}, batch_sizes=sizes)
    for size, (allocated, reserved) in zip(sizes, found["peaks"], strict=True):
        assert allocated == pytest.approx(measured["peaks"][str(size)]["alloc"], rel=0.0005), size
        assert reserved == pytest.approx(measured["peaks"][str(size)]["reserved"], rel=0.02), size
