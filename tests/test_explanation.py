"""What takes the memory: every byte counted once, by hand-made traces and by whole models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner.allocator import AllocatorConfig, Events, moments, replay
from planner.units import GIB, KIB, MIB
from planner.virtual.explanation import NUM_MODULES, NUM_POINTS, explain
from planner.virtual.scaling import Scaled, events_of
from planner.virtual.trace import Phase, Purpose, Trace
from tests.virtual_child import Process

ROOT = Path(__file__).parent.parent


def _explain(trace: Trace, capacity_bytes: int = GIB) -> dict[str, Any]:
    scaled = Scaled(events_of(trace, trace.sizes), trace, True, ())
    return explain(
        scaled, 3, config=AllocatorConfig(), capacity_bytes=capacity_bytes, device_total_bytes=2 * GIB, outside_bytes=7
    )


def _begin(trace: Trace, phase: Phase) -> None:
    trace.phases.append((len(trace.events), phase))


def _step() -> tuple[Trace, dict[str, int]]:
    """One parameter, one layer: its result is saved, a mask is not; a gradient on its way; the parameter's gradient."""
    trace = Trace()
    trace.owners += [("", "ids"), ("layers.0", "weight"), ("layers.0", ""), ("layers.1", "")]
    blocks: dict[str, int] = {}

    def make(name: str, size: int, owner: int, purpose: Purpose = Purpose.TENSOR) -> None:
        blocks[name] = trace.allocate(size, f"aten::{name}", owner, purpose)

    trace.mark("move")
    _begin(trace, Phase.MOVE)
    make("parameter", 4 * MIB, 2, Purpose.PARAMETER)
    trace.mark("step 1")
    _begin(trace, Phase.FORWARD)
    make("ids", 100, 1, Purpose.INPUT)
    make("workspace", 8 * MIB, 3, Purpose.WORKSPACE)
    make("mask", 2 * MIB, 3)
    make("saved", 5 * MIB, 3)
    make("saved too", 3 * MIB, 4)
    trace.free(blocks["mask"])
    _begin(trace, Phase.BACKWARD)
    make("flowing", 6 * MIB, 4)
    make("gradient", 4 * MIB, 2, Purpose.GRADIENT)  # the peak
    for name in ("saved", "saved too", "flowing"):
        trace.free(blocks[name])
    _begin(trace, Phase.UPDATE)
    make("root", 4 * MIB, 0)
    trace.free(blocks["root"])
    trace.mark("end")
    return trace, blocks


def test_kinds_sum_to_the_peak_to_the_byte() -> None:
    found = _explain(_step()[0])
    peak = found["peaks"]["allocated"]
    assert peak["kinds"] == {
        "parameters": 4 * MIB,
        "gradients": 4 * MIB,
        "activations": 8 * MIB,
        "inputs": 100,
        "gradients_in_flight": 6 * MIB,
        "workspaces": 8 * MIB,
    }
    # 100 bytes of input take a block of 512; ``saved`` takes what is left of its segment, which is not split for 1 MiB.
    assert peak["rounding_bytes"] == 412 + MIB
    assert peak["allocated_bytes"] == 31 * MIB + 512
    assert (peak["when"], peak["event"]) == ("step 1, backward", 8)
    for each in found["peaks"].values():
        assert sum(each["kinds"].values()) + each["rounding_bytes"] == each["allocated_bytes"]
        assert each["allocated_bytes"] + each["cached_bytes"] == each["reserved_bytes"]
        assert each["reserved_bytes"] + 7 == each["device_bytes"] == each["reserved_bytes"] + each["outside_bytes"]


def test_the_two_peaks_are_different_moments() -> None:
    trace = Trace()
    trace.mark("step 1")
    _begin(trace, Phase.FORWARD)
    first = [trace.allocate(11 * MIB, "aten::mm") for _ in range(3)]
    for block in first:
        trace.free(block)
    trace.allocate(30 * MIB, "aten::mm")  # fits into none of the three cached segments
    peaks = _explain(trace)["peaks"]
    assert (peaks["allocated"]["event"], peaks["allocated"]["allocated_bytes"]) == (2, 36 * MIB)
    assert peaks["allocated"]["rounding_bytes"] == 3 * MIB, "segments of 12 MiB are not split for 1 MiB"
    assert peaks["reserved"]["event"] == 6
    assert peaks["reserved"]["cached_bytes"] == 36 * MIB
    assert peaks["reserved"]["reserved_bytes"] == 66 * MIB


def test_repeated_layers_are_taken_together() -> None:
    (row,) = _explain(_step()[0])["activations"]
    assert row == {"module": "layers.*", "num_modules": 2, "bytes": 8 * MIB}


def test_what_many_modules_hold_is_summed_up_at_the_end() -> None:
    trace = Trace()
    trace.mark("step 1")
    _begin(trace, Phase.FORWARD)
    blocks = []
    for number in range(NUM_MODULES + 3):
        trace.owners.append((f"part{number}.conv2d", ""))
        blocks.append(trace.allocate((100 - number) * MIB, "aten::mm", number + 1))
    _begin(trace, Phase.BACKWARD)
    for block in blocks:
        trace.free(block)
    rows = _explain(trace, capacity_bytes=8 * GIB)["activations"]
    assert rows[0] == {"module": "part0.conv2d", "num_modules": 1, "bytes": 100 * MIB}, "its digits are no list's"
    assert rows[-1] == {"module": None, "num_modules": 3, "bytes": (84 + 83 + 82) * MIB}


def test_the_largest_tensors_name_their_module_and_operator() -> None:
    rows = _explain(_step()[0])["largest"]
    assert [row["operator"] for row in rows[:3]] == ["workspace", "flowing", "saved"]
    assert rows[2] == {
        "bytes": 5 * MIB,
        "kind": "activations",
        "module": "layers.0",
        "tensor": "",
        "operator": "saved",
        "made": "step 1, forward",
    }
    assert [(row["module"], row["tensor"]) for row in rows if row["kind"] == "gradients"] == [("layers.0", "weight")]
    assert [row["bytes"] for row in rows] == sorted((row["bytes"] for row in rows), reverse=True)


def test_recomputed_activations_and_what_is_kept_between_steps() -> None:
    trace = Trace()
    trace.mark("step 1")
    _begin(trace, Phase.FORWARD)
    cached = trace.allocate(1 * MIB, "aten::arange")
    _begin(trace, Phase.BACKWARD)
    _begin(trace, Phase.RECOMPUTATION)
    again = trace.allocate(2 * MIB, "aten::mm")
    gone = trace.allocate(3 * MIB, "aten::mul")  # the peak
    trace.free(gone)
    _begin(trace, Phase.BACKWARD)
    trace.free(again)
    trace.mark("step 2")
    trace.free(cached)
    kinds = _explain(trace)["peaks"]["allocated"]["kinds"]
    assert kinds == {"kept": MIB, "recomputed_activations": 2 * MIB, "temporaries": 3 * MIB}


def test_the_timeline_keeps_the_peaks_and_marks_the_phases() -> None:
    trace = Trace()
    trace.mark("step 1")
    _begin(trace, Phase.FORWARD)
    for number in range(1000):
        block = trace.allocate((1 + (number == 500) * 8) * MIB, "aten::mm")
        trace.free(block)
    found = _explain(trace)
    line = found["timeline"]
    assert line["num_events"] == 2000
    assert len(line["points"]) == NUM_POINTS
    assert max(point[1] for point in line["points"]) == found["peaks"]["allocated"]["allocated_bytes"] == 9 * MIB
    assert max(point[2] for point in line["points"]) == found["peaks"]["reserved"]["reserved_bytes"]
    assert line["phases"] == [[0, "step 1, forward"]]


def test_what_does_not_fit_is_explained_without_the_limit() -> None:
    trace, _ = _step()
    found = _explain(trace, capacity_bytes=20 * MIB)
    assert (found["fits"], found["capacity_bytes"]) == (False, None)
    assert found["peaks"]["allocated"]["allocated_bytes"] == 31 * MIB + 512
    assert (_explain(trace)["fits"], _explain(trace)["capacity_bytes"]) == (True, GIB)


def test_a_refused_workspace_takes_nothing() -> None:
    trace = Trace()
    trace.mark("step 1")
    _begin(trace, Phase.FORWARD)
    trace.convolutions[trace.allocate(64 * MIB, "aten::convolution", 0, Purpose.WORKSPACE)] = 0
    trace.allocate(12 * MIB, "aten::convolution")
    kinds = _explain(trace, capacity_bytes=32 * MIB)["peaks"]["allocated"]["kinds"]
    assert kinds == {"temporaries": 12 * MIB}


def test_moments_hold_every_block_of_a_replay() -> None:
    trace, blocks = _step()
    events = Events(trace.events, trace.sizes)
    found = moments(events, [3, 8, 100])
    assert set(found) == {3, 8}, "there is no event 100"
    rounded = {blocks["ids"]: 512, blocks["saved"]: 6 * MIB}
    assert found[8].blocks == {block: rounded.get(block, trace.sizes[block]) for block in events.live_after(8)}
    assert found[8].allocated_bytes == sum(found[8].blocks.values()) == replay(events).peak_allocated_bytes
    small = moments(Events([0, 1], [KIB, 64 * MIB]), [0, 1], capacity_bytes=4 * MIB)
    assert set(small) == {0}, "nothing comes after an OOM"


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with Process() as process:
        yield process


def _explained(process: Process, case: str, variant: dict[str, str], batch_size: int) -> dict[str, Any]:
    spec = yaml.safe_load((ROOT / f"examples/{case}.yaml").read_text())
    found: dict[str, Any] = process.do("explained", spec=spec, variant=variant, batch_size=batch_size)
    return found


# Parameters: transformers' own count (GPT2LMHeadModel, ResNetForImageClassification, T5ForConditionalGeneration).
MODELS: dict[str, tuple[dict[str, str], int, int]] = {
    "gpt2-s1024": ({"precision": "bf16-amp"}, 9, 124_439_808),
    "resnet50-224": ({"precision": "fp32"}, 64, 25_557_032),
    "t5-base-s512": ({"precision": "bf16-amp"}, 4, 222_903_552),
}


@pytest.mark.parametrize("case", MODELS)
def test_every_byte_of_a_model_is_counted_once(process: Process, case: str) -> None:
    variant, batch_size, num_parameters = MODELS[case]
    found = _explained(process, case, variant, batch_size)
    explanation, peaks = found["explanation"], found["peaks"]
    for name in ("allocated", "reserved"):
        peak = explanation["peaks"][name]
        assert sum(peak["kinds"].values()) + peak["rounding_bytes"] == peak["allocated_bytes"]
        assert peak["allocated_bytes"] + peak["cached_bytes"] == peak["reserved_bytes"]
        assert peak["rounding_bytes"] >= 0
        assert peak[f"{name}_bytes"] == peaks[name], "the peak is the one that is predicted"
        assert peak["kinds"]["parameters"] == 4 * num_parameters
        assert "kept" not in peak["kinds"]
    kinds = explanation["peaks"]["allocated"]["kinds"]
    assert sum(row["bytes"] for row in explanation["activations"]) == kinds["activations"]
    assert len(explanation["largest"]) == 10
    assert len(json.dumps(explanation)) < 20 * KIB


def test_where_the_memory_of_gpt2_goes(process: Process) -> None:
    """Figures that follow from the model: vocabulary 50,257, 1024 tokens, 12 layers of width 768, AdamW."""
    explanation = _explained(process, "gpt2-s1024", {"precision": "bf16-amp"}, 8)["explanation"]
    peak = explanation["peaks"]["allocated"]
    measured = json.loads((ROOT / "measurements/h200/truth/gpt2-s1024.json").read_text())["variants"]["bf16-amp"]
    assert peak["allocated_bytes"] == pytest.approx(measured["peaks"]["8"]["alloc"], rel=0.0005)
    assert peak["when"] == "step 2, backward"
    assert peak["kinds"]["optimizer_state"] == 2 * peak["kinds"]["parameters"]
    assert peak["kinds"]["inputs"] == 8 * 1024 * 8
    logits = 8 * 1023 * 50_257 * 4  # the loss leaves the last position out
    first = explanation["largest"][0]
    assert first["module"] == "GPT2LMHeadModel", "transformers works the loss out in the model's own forward"
    assert first["bytes"] in (logits, 8 * 1024 * 50_257 * 4)
    by_module = {row["module"]: row for row in explanation["activations"]}
    gelu = by_module["transformer.h.*.mlp.act"]
    assert gelu["num_modules"] == 12
    assert gelu["bytes"] % (12 * 8 * 1024 * 4 * 768) == 0


def test_with_checkpointing_only_the_inputs_of_blocks_are_kept(process: Process) -> None:
    variant = {"precision": "bf16-amp", "checkpointing": "full"}
    by_module = {
        row["module"]: row["bytes"]
        for row in _explained(process, "gpt2-s1024", variant, 4)["explanation"]["activations"]
    }
    assert by_module["transformer.h.*"] == 12 * 4 * 1024 * 768 * 4, "the results of twelve blocks in float32"
    assert "transformer.h.*.mlp.act" not in by_module


TIED: dict[str, Any] = {
    "model": {"source": "python", "target": "tests.virtual_models:Tied"},
    "data": {
        "kind": "tensors",
        "inputs": {name: {"shape": [12], "dtype": "int64", "high": 100} for name in ("input_ids", "labels")},
    },
}


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
@pytest.mark.parametrize("precision", ["fp32", "fp16-amp"])
def test_averages_micro_batches_clipping_and_evaluation_are_told_apart(
    process: Process, precision: str, checkpointing: str
) -> None:
    train = {"optimizer": "adamw", "ema": 0.99, "accumulation_steps": 4, "clip_grad_norm": 1.0, "evaluation": {}}
    model = {"source": "transformers", "model_type": "gpt2", "task": "causal-lm"}
    config = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512, "n_positions": 64}
    spec = {"model": {**model, "config": config}, "data": {"kind": "tokens", "sequence_length": 64}, "train": train}
    variant = {"precision": precision, "checkpointing": checkpointing}
    found = process.do("explained", spec=spec, variant=variant, batch_size=8)
    for name, peak in found["explanation"]["peaks"].items():
        kinds = peak["kinds"]
        assert sum(kinds.values()) + peak["rounding_bytes"] == peak["allocated_bytes"]
        assert peak[f"{name}_bytes"] == found["peaks"][name]
        # The copy has the buffer of how many steps it averages beside the model's own.
        assert 0 <= kinds["averaged_parameters"] - kinds["parameters"] - kinds.get("buffers", 0) <= 8
        assert kinds.get("gradients", 0) <= kinds["parameters"]
    kinds = found["explanation"]["peaks"]["allocated"]["kinds"]
    assert kinds["gradients"] == kinds["parameters"], "they are kept from one micro-batch to the next"


def test_gradients_and_state_belong_to_their_parameters(process: Process) -> None:
    code = """
from planner.training import Training
from planner.specs.document import parse_spec
from planner.specs.variants import Variant
from planner.virtual.tracing import trace_steps
spec = parse_spec(SPEC)
found = trace_steps(spec, Variant(), 2, architecture)
result = sorted({
    (int(purpose), found.owners[owner][1])
    for purpose, owner in zip(found.purposes, found.block_owners)
    if purpose in (2, 4, 5, 6)
})
"""
    found = process.run(code.replace("SPEC", repr({**TIED, "train": {"optimizer": "adamw"}})))
    names = {name for purpose, name in found if purpose == Purpose.PARAMETER}
    assert names
    assert {name for purpose, name in found if purpose == Purpose.GRADIENT} == names
    assert {name for purpose, name in found if purpose == Purpose.OPTIMIZER_STATE} == {
        f"{key} of {name}" for name in names for key in ("exp_avg", "exp_avg_sq")
    }
    assert {name for purpose, name in found if purpose == Purpose.INPUT} == {"input_ids", "labels"}
