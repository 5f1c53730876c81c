"""What a plan says beyond the largest batch size, on the real card: run with ``make test-gpu``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from planner.local_gpus import local_gpus
from planner.planning import plan_sweep
from planner.runtime.device import LocalDevice
from planner.specs.document import parse_spec
from planner.trials import Outcome
from planner.units import GIB, MIB

pytestmark = pytest.mark.gpu

SMALL = {
    "model": {
        "source": "transformers", "model_type": "gpt2", "task": "causal-lm",
        "config": {"n_layer": 2, "n_embd": 256, "n_head": 4, "use_cache": False},
    },
    "data": {"kind": "tokens", "sequence_length": 256},
    "train": {"optimizer": "adamw", "global_batch_size": 480},
    "variants": {"precision": ["bf16-amp"]},
    "search": {"multiple_of": 8, "headroom": "25%"},
}  # fmt: skip
LEAKING = {
    "model": {"source": "python", "target": "leaking_model:Leaking"},
    "data": {
        "kind": "tensors",
        "inputs": {name: {"shape": [512, 1024], "dtype": "float32"} for name in ("x", "y")},
    },
    "train": {"optimizer": "adamw"},
    "variants": {"precision": ["fp32"]},
}  # fmt: skip


@pytest.fixture
def device():
    cards = local_gpus()
    assert cards, "no NVIDIA GPU is visible here"
    made = LocalDevice(cards[0], 4 * GIB)
    yield made
    made.close()


def test_multiples_headroom_speed_and_a_global_batch_size(device):
    (plan,) = plan_sweep(parse_spec(SMALL), device)
    assert plan.certified
    assert plan.max_batch_size % 8 == 0
    assert plan.first_oom_batch_size == plan.max_batch_size + 8
    assert plan.peaks.reserved_bytes <= 3 * GIB
    ran = {trial.batch_size for trial in plan.trials if trial.fits}
    assert plan.details["fastest"]["batch_size"] in ran
    assert plan.details["knee"]["batch_size"] in ran
    way = plan.details["accumulation"]
    assert way["micro_batch_size"] * way["accumulation_steps"] == 480
    assert way["micro_batch_size"] % 8 == 0
    assert way["samples_per_second"] > 0


def test_micro_batches_keep_their_gradients_during_the_next_forward_pass(device):
    """From the second micro-batch on: they are what accumulates."""
    document = {**SMALL, "train": {"optimizer": "adamw", "accumulation_steps": 2}, "search": {}}
    plain = parse_spec({**document, "train": {"optimizer": "adamw"}})
    with device.open(plain, plain.variants.product()[0]) as runner:
        alone = runner.run(8, fresh=True)
    accumulating = parse_spec(document)
    with device.open(accumulating, accumulating.variants.product()[0]) as runner:
        both = runner.run(8, fresh=True)
    assert (alone.samples_per_step, both.samples_per_step) == (8, 16)
    assert both.peaks.allocated_bytes > alone.peaks.allocated_bytes
    assert both.step_time_s > 1.3 * alone.step_time_s


def test_a_leak_is_found_and_nothing_is_certified(device, monkeypatch):
    examples = str(Path(__file__).parent.parent / "examples")
    monkeypatch.chdir(examples)
    monkeypatch.syspath_prepend(examples)
    assert examples in sys.path
    (plan,) = plan_sweep(parse_spec(LEAKING), device, batch_size=16)
    (trial,) = plan.trials
    assert (trial.outcome, plan.fits, plan.certified) == (Outcome.FITS, None, False)
    assert plan.details["leak"]["bytes_per_step"] == 12 * MIB
    assert 0 < plan.details["leak"]["steps_left"] < 4 * GIB // (12 * MIB)
