"""Whole models on the virtual GPU: families that trace, traces that scale, and a sweep from end to end."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planner.gpus import find_gpu
from planner.planning import plan_sweep
from planner.specs.document import load_spec, parse_spec
from planner.trials import Outcome, PlanStatus, Source
from planner.units import GIB
from planner.virtual.device import VirtualDevice
from tests.virtual_child import Process

ROOT = Path(__file__).parent.parent
SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
TOKENS = {"kind": "tokens", "sequence_length": 64}
FEATURES = {
    "kind": "tensors",
    "inputs": {"features": {"shape": [8], "dtype": "float32"}, "labels": {"shape": [], "dtype": "int64", "high": 4}},
}
IMAGES = {"kind": "images", "size": 64, "classes": 10}


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with Process() as process:
        yield process


def _transformers(model_type: str, task: str, **config: Any) -> dict[str, Any]:
    return {"source": "transformers", "model_type": model_type, "task": task, "config": config}


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "gpt2 as it is by default": (_transformers("gpt2", "causal-lm", n_layer=1), TOKENS, {"precision": "bf16-amp"}),
    "llama, grouped heads, checkpointing": (
        _transformers("llama", "causal-lm", num_key_value_heads=2, **SMALL),
        TOKENS,
        {"precision": "bf16-amp", "checkpointing": "full"},
    ),
    "gpt_neo, a constant that a checkpointed block makes": (
        _transformers(
            "gpt_neo",
            "causal-lm",
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
        ),
        TOKENS,
        {"precision": "bf16-amp", "checkpointing": "full"},
    ),
    "mixtral, experts": (
        _transformers("mixtral", "causal-lm", num_key_value_heads=2, num_local_experts=4, **SMALL),
        TOKENS,
        {"precision": "bf16"},
    ),
    "bert, sequences": (_transformers("bert", "sequence-classification", **SMALL), TOKENS, {"precision": "fp16-amp"}),
    "longformer, a mask that it looks into": (
        _transformers("longformer", "sequence-classification", attention_window=32, pad_token_id=1, **SMALL),
        TOKENS,
        {},
    ),
    "roberta, tokens": (_transformers("roberta", "token-classification", num_labels=5, **SMALL), TOKENS, {}),
    "t5, both halves": (
        _transformers("t5", "seq2seq-lm", d_model=64, num_layers=1, num_heads=4, d_ff=128, decoder_start_token_id=0),
        TOKENS,
        {"precision": "bf16-amp"},
    ),
    "wav2vec2, CTC": (
        _transformers(
            "wav2vec2",
            "ctc",
            vocab_size=40,
            conv_dim=[16, 16],
            conv_kernel=[10, 4],
            conv_stride=[160, 2],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            ctc_zero_infinity=True,
            **SMALL,
        ),
        {
            "kind": "tensors",
            "inputs": {
                "input_values": {"shape": [16_000], "dtype": "float32"},
                "labels": {"shape": [12], "dtype": "int64", "low": 1, "high": 40},
            },
        },
        {"precision": "bf16-amp"},
    ),
    "vit": (_transformers("vit", "image-classification", image_size=64, **SMALL), IMAGES, {"precision": "fp16"}),
    "resnet of transformers": (
        _transformers("resnet", "image-classification", depths=[1, 1], hidden_sizes=[16, 32], embedding_size=16),
        IMAGES,
        {"precision": "tf32"},
    ),
    "timm, convolutions": ({"source": "timm", "name": "resnet18"}, IMAGES, {"checkpointing": "full"}),
    "timm, attention": (
        {"source": "timm", "name": "vit_tiny_patch16_224", "args": {"img_size": 64, "depth": 1}},
        IMAGES,
        {"precision": "bf16-amp"},
    ),
    "torchvision": ({"source": "torchvision", "name": "mobilenet_v3_small"}, IMAGES, {"precision": "bf16-amp"}),
    "torchvision, logits in a tuple": ({"source": "torchvision", "name": "googlenet"}, IMAGES, {}),
    "a user's own": (
        {"source": "python", "target": "tests.virtual_models:Tied"},
        {
            "kind": "tensors",
            "inputs": {key: {"shape": [12], "dtype": "int64", "high": 100} for key in ("input_ids", "labels")},
        },
        {"precision": "fp16-amp"},
    ),
}

# Experts are chosen by values: what their kernels take beside tensors is named to the user.


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_of_models_traces(process: Process, name: str) -> None:
    model, data, variant = FAMILIES[name]
    trace = process.do("traced", spec={"model": model, "data": data}, variant=variant, batch_size=2)
    assert trace["unmodelled"] == []
    assert len(trace["operators"]) == len(trace["sizes"]) > 30
    assert min(trace["sizes"]) >= 0
    freed = [~event for event in trace["events"] if event < 0]
    assert len(freed) == len(set(freed)), "no block is freed twice"
    born: set[int] = set()
    for event in trace["events"]:
        assert event >= 0 or ~event in born
        born.add(event)


@pytest.mark.parametrize(
    "name", ["gpt2 as it is by default", "bert, sequences", "timm, convolutions", "timm, attention"]
)
def test_what_is_scaled_equals_what_is_traced(process: Process, name: str) -> None:
    """At batch sizes around and far beyond those that scaling starts from, below and above the paths of kernels."""
    model, data, variant = FAMILIES[name]
    sizes = [3, 7, 24, 61]
    found = process.do("scaled_and_traced", spec={"model": model, "data": data}, variant=variant, batch_sizes=sizes)
    assert found == [{"exact": False, "same_order": True, "differing": 0} for size in sizes]


GPT2 = {
    "model": _transformers("gpt2", "causal-lm", n_layer=1, n_embd=128, n_head=2, vocab_size=512),
    "data": TOKENS,
    "variants": {"precision": ["bf16-amp"]},
}


def test_a_sweep_on_the_virtual_gpu() -> None:
    (plan,) = plan_sweep(parse_spec(GPT2), VirtualDevice(find_gpu("h200"), GIB // 4))
    assert plan.status is PlanStatus.PLANNED
    assert (plan.source, plan.certified) == (Source.PREDICTED, False)
    assert plan.max_batch_size is not None
    assert plan.max_batch_size > 8
    assert plan.first_oom_batch_size == plan.max_batch_size + 1
    assert plan.peaks is not None
    assert plan.peaks.allocated_bytes <= plan.peaks.reserved_bytes <= GIB // 4 < (plan.peaks.device_bytes or 0)
    interval = plan.reserved_interval
    assert interval is not None
    assert interval.low_bytes < plan.peaks.reserved_bytes
    assert interval.high_bytes > plan.peaks.allocated_bytes
    assert all(trial.step_time_s is None for trial in plan.trials), "speed is not predicted"
    assert {trial.outcome for trial in plan.trials} == {Outcome.FITS, Outcome.OOM}


def test_variants_that_cannot_run_say_why_and_stop_no_other() -> None:
    model, data, _ = FAMILIES["a user's own"]
    spec = parse_spec({"model": model, "data": data, "variants": {"checkpointing": ["full", "selective", "none"]}})
    full, selective, none = plan_sweep(spec, VirtualDevice(find_gpu("h200"), GIB), batch_size=2)
    assert (none.status, none.fits) == (PlanStatus.PLANNED, True)
    for plan, kind in ((full, "full"), (selective, "selective")):
        assert plan.status is PlanStatus.UNSUPPORTED
        assert plan.error is not None
        assert plan.error["field"] == "variants.checkpointing"
        assert f"Tied offers no {kind} checkpointing" in plan.error["message"]


def test_one_process_builds_the_model_and_each_variant_takes_three_traces() -> None:
    device = VirtualDevice(find_gpu("h200"), GIB // 4)
    spec = parse_spec({**GPT2, "variants": {"precision": ["fp32", "bf16-amp"]}})
    plans = plan_sweep(spec, device)
    (child,) = device._preloaded.values()
    for plan in plans:
        assert plan.status is PlanStatus.PLANNED
        assert plan.max_batch_size is not None
        sizes = plan.trials[-1].details["traced_batch_sizes"]
        assert len(sizes) == 3
        assert any(abs(size - plan.max_batch_size) <= 3 for size in sizes), "a trace checks where the answer is"
        assert plan.notes == ()
    assert child.alive
    device.close()
    assert not child.alive


def test_two_processes_predict_the_same_bytes_of_a_model_that_draws_its_sizes() -> None:
    """wav2vec2's masks and the order of ModernBERT's rotary embeddings differ in two processes of a training loop."""
    spec = parse_spec({"model": {"source": "python", "target": "tests.virtual_models:Random"}, "data": FEATURES})
    found = []
    for _ in range(2):
        device = VirtualDevice(find_gpu("h200"), GIB)
        with contextlib.closing(device), device.open(spec, spec.variants.product()[0]) as runner:
            found.append([runner.run(size).peaks for size in (1, 4)])
    assert found[0] == found[1]


@pytest.mark.parametrize(("precision", "skips"), [("fp16-amp", True), ("bf16-amp", False)])
def test_the_interval_holds_steps_that_a_gradient_scaler_skipped(precision: str, skips: bool) -> None:
    """The first two of three measured steps overflowed and made no optimizer state: 488,636,416 bytes reserved."""
    measured = json.loads(gzip.decompress((ROOT / "measurements/h200/unseen-5.json.gz").read_bytes()))["cases"]
    (case,) = (
        each for each in measured if (each["case"], each["variant"]["precision"]) == ("lstm-projected", precision)
    )
    spec = load_spec(ROOT / "measurements/specs/lstm-projected.yaml")
    device = VirtualDevice(find_gpu("h200"), GIB)
    (variant,) = (each for each in spec.variants.product() if str(each.precision) == precision)
    with contextlib.closing(device), device.open(spec, variant) as runner:
        trial = runner.run(1, fresh=True)
    interval, reserved = trial.reserved_interval, case["peaks"]["1"]["reserved"]
    assert trial.peaks is not None
    assert interval is not None
    assert interval.low_bytes <= reserved <= interval.high_bytes
    assert (trial.peaks.reserved_bytes == reserved) != skips
    assert ("while gradients overflow" in interval.basis) == skips


def test_traces_are_made_where_no_gpu_is_visible() -> None:
    """They run in forks, and CUDA aborts in a fork of a process that had asked it for a GPU: seen on an H200."""
    spec = parse_spec({"model": {"source": "python", "target": "tests.virtual_models:Blind"}, "data": FEATURES})
    (plan,) = plan_sweep(spec, VirtualDevice(find_gpu("h200"), GIB), batch_size=2)
    assert plan.fits
