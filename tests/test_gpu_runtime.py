"""The real card: run with ``make test-gpu``. Needs one idle CUDA GPU and a CUDA build of torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from planner.errors import DeviceBusy
from planner.local_gpus import local_gpus
from planner.planning import plan_sweep
from planner.runtime.card import IDLE_BYTES, Card, wait_until_idle
from planner.runtime.device import LocalDevice
from planner.specs.document import parse_spec
from planner.specs.variants import Variant
from planner.trials import Outcome, PlanStatus, Source
from planner.units import GIB, MIB
from tests.planning_fakes import ThresholdDevice

pytestmark = pytest.mark.gpu

SMALL = {
    "model": {
        "source": "transformers", "model_type": "gpt2", "task": "causal-lm",
        "config": {"n_layer": 2, "n_embd": 256, "n_head": 4, "use_cache": False},
    },
    "data": {"kind": "tokens", "sequence_length": 256},
    "train": {"optimizer": "adamw"},
    "variants": {"precision": ["fp32", "bf16-amp", "fp16-amp"], "checkpointing": ["none", "full"]},
}  # fmt: skip
GPT2 = {
    "model": {"source": "transformers", "model_type": "gpt2", "task": "causal-lm", "config": {"use_cache": False}},
    "data": {"kind": "tokens", "sequence_length": 1024},
    "train": {"optimizer": "adamw"},
    "variants": {"precision": ["bf16-amp"]},
}
RESNET = {
    "model": {"source": "transformers", "model_type": "resnet", "task": "image-classification"}
    | {"config": {"num_labels": 1000}},
    "data": {"kind": "images", "size": 224, "classes": 1000},
    "train": {"optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9}},
    "variants": {"precision": ["bf16-amp"]},
}
HOLD = "import torch; x = torch.empty(1 << 30, dtype=torch.uint8, device='cuda'); print('held', flush=True); input()"


@pytest.fixture
def card():
    cards = local_gpus()
    assert cards, "no NVIDIA GPU is visible here"
    return cards[0]


@pytest.fixture
def device(card):
    made = LocalDevice(card, 4 * GIB)
    yield made
    made.close()


def used_bytes(card):
    with Card.open(card.uuid) as handle:
        return handle.used_bytes()


def test_a_trial_reports_all_three_layers_and_leaves_nothing(card, device):
    with device.open(parse_spec(SMALL), Variant()) as runner:
        trial = runner.run(8)
    assert trial.outcome is Outcome.FITS
    assert 0 < trial.peaks.allocated_bytes <= trial.peaks.reserved_bytes <= 4 * GIB
    # The context alone takes more than 100 MiB on every architecture.
    assert trial.peaks.device_bytes > trial.peaks.reserved_bytes + 100 * MIB
    assert trial.details["context_bytes"] > 100 * MIB
    assert len(trial.step_times_s) == 3
    assert all(0 < seconds < 60 for seconds in trial.step_times_s)
    assert used_bytes(card) < IDLE_BYTES


def test_peaks_are_the_same_in_every_process(device):
    with device.open(parse_spec(SMALL), Variant()) as runner:
        first, second = runner.run(8), runner.run(8)
    assert first.peaks.allocated_bytes == second.peaks.allocated_bytes
    assert first.peaks.reserved_bytes == second.peaks.reserved_bytes


def test_after_an_out_of_memory_the_next_trial_is_as_if_it_had_not_been(device):
    with device.open(parse_spec(SMALL), Variant()) as runner:
        before = runner.run(4)
        oom = runner.run(100_000)
        after = runner.run(4)
    assert oom.outcome is Outcome.OOM
    assert "out of memory" in oom.error
    assert oom.peaks.reserved_bytes <= 4 * GIB
    assert after.peaks.allocated_bytes == before.peaks.allocated_bytes


def test_every_variant_of_a_small_model_is_certified(device):
    plans = plan_sweep(parse_spec(SMALL), device)
    assert len(plans) == 6
    for plan in plans:
        assert plan.status is PlanStatus.PLANNED, plan.error
        assert plan.certified
        assert plan.first_oom_batch_size == plan.max_batch_size + 1
        assert plan.peaks.reserved_bytes <= 4 * GIB
        assert plan.step_time_s > 0
    by_variant = {(plan.variant.precision, plan.variant.checkpointing): plan.max_batch_size for plan in plans}
    assert by_variant["fp32", "full"] > by_variant["fp32", "none"]


def test_a_card_that_somebody_else_uses_is_refused(card):
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(DeviceBusy):
                wait_until_idle(card.uuid, card.usable_bytes, wait_s=1)
        finally:
            other.kill()
    wait_until_idle(card.uuid, card.usable_bytes - IDLE_BYTES)


@pytest.mark.parametrize(
    ("document", "capacity_gib", "largest"), [(GPT2, 16, 9), (GPT2, 40, 27), (RESNET, 16, 372), (RESNET, 40, 944)]
)
def test_the_largest_batch_sizes_that_a_plain_loop_reached_on_an_h200(card, document, capacity_gib, largest):
    """Measured by a script of its own under torch 2.11.0+cu130 and transformers 5.17.0 (driver 580.159.04).

    Another torch, driver or modelling library may move them, by a percent or so.
    """
    assert card.gpu.name == "h200", f"these figures were measured on an h200, not on a {card.gpu.name}"
    device = LocalDevice(card, capacity_gib * GIB)
    start = ThresholdDevice(largest, source=Source.PREDICTED)  # the known answer: trials go into certifying it
    try:
        (plan,) = plan_sweep(parse_spec(document), device, predict_start=start)
    finally:
        device.close()
    assert plan.certified
    assert abs(plan.max_batch_size - largest) <= max(1, largest // 100)
