"""Two real cards: run with ``make test-gpu`` on a machine with two idle CUDA GPUs of one type."""

from __future__ import annotations

import time

import pytest

from planner.local_gpus import local_gpus
from planner.planning import plan_sweep
from planner.runtime.device import LocalDevice
from planner.specs.document import parse_spec
from planner.specs.variants import Parallelism
from planner.trials import Outcome, PlanStatus
from planner.units import GIB, MIB
from tests.test_gpu_runtime import SMALL

pytestmark = pytest.mark.gpu


@pytest.fixture
def device():
    cards = local_gpus()
    if len(cards) < 2:
        pytest.skip("needs two GPUs")
    made = LocalDevice(cards[0], 4 * GIB, peers=cards[1:])
    yield made
    made.close()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_are_certified_and_each_tells_its_peaks(device, kind):
    # A coarse grid: each trial starts Python and NCCL in every rank, so that few of them are wanted.
    document = SMALL | {
        "variants": {"precision": ["bf16-amp"], "parallelism": [kind], "gpus": 2},
        "search": {"speed": False, "multiple_of": 8},
    }
    (plan,) = plan_sweep(parse_spec(document), device)
    assert plan.status is PlanStatus.PLANNED, plan.error
    assert plan.certified
    assert plan.first_oom_batch_size == plan.max_batch_size + 8
    fitted = next(trial for trial in plan.trials if trial.fits and trial.batch_size == plan.max_batch_size)
    ranks = fitted.details["ranks"]
    assert [rank["outcome"] for rank in ranks] == ["fits", "fits"]
    assert max(rank["peak_reserved_bytes"] for rank in ranks) == plan.peaks.reserved_bytes <= 4 * GIB
    for rank in ranks:
        assert rank["context_bytes"] > 100 * MIB
        assert rank["communicator_bytes"] > 100 * MIB
    # NCCL's own is counted: more than the context and the libraries of one GPU.
    outside = plan.peaks.device_bytes - plan.peaks.reserved_bytes
    assert outside > device.gpu.context_bytes + device.gpu.library_bytes + 100 * MIB


def test_shards_are_smaller_than_copies(device):
    variants = {"parallelism": ["ddp", "fsdp2"], "gpus": 2}
    spec = parse_spec(SMALL | {"variants": variants})
    copies, shards = plan_sweep(spec, device, batch_size=1)
    assert copies.variant.parallelism is Parallelism.DDP
    assert shards.peaks.allocated_bytes < copies.peaks.allocated_bytes


def test_one_rank_alone_out_of_memory_ends_the_trial_and_the_next_one_runs(device):
    spec = parse_spec(
        {
            "model": {"source": "python", "target": "tests.training_targets:GreedyRank"},
            "data": {"kind": "tensors", "inputs": {"x": {"shape": [8], "dtype": "float32"}}},
            "variants": {"parallelism": ["ddp"], "gpus": 2},
        }
    )
    (variant,) = spec.variants.product()
    start = time.monotonic()
    with device.open(spec, variant) as runner:
        oom, fits = runner.run(4), runner.run(2)
    assert time.monotonic() - start < 120
    assert (oom.outcome, fits.outcome) == (Outcome.OOM, Outcome.FITS)
    assert [rank["outcome"] for rank in oom.details["ranks"]] == ["ended with the others", "oom"]
