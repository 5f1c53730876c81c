"""The next trial's process beside a trial, on the real card: ``make test-gpu``."""

from dataclasses import replace

import pytest

from planner.local_gpus import local_gpus
from planner.planning import plan_sweep
from planner.runtime.card import IDLE_BYTES, Card
from planner.runtime.device import LocalDevice
from planner.specs.document import parse_spec
from planner.specs.variants import Variant
from planner.trials import Outcome
from planner.units import GIB, KIB, MIB
from tests.test_gpu_runtime import FAULTY, SMALL
from tests.test_processes import gone

pytestmark = pytest.mark.gpu

DRIVER_PAGE_BYTES = 64 * KIB
"""*Measured*: on one H200 of four, a context that was started beside another process took a page more."""


@pytest.fixture(scope="module")
def card():
    cards = local_gpus()
    assert cards, "no NVIDIA GPU is visible here"
    return cards[0]


@pytest.fixture(scope="module")
def device(card):
    made = LocalDevice(card, 4 * GIB)
    yield made
    made.close()


@pytest.fixture(scope="module")
def faulty(card):
    made = LocalDevice(card, 4 * GIB, trial_timeout_s=6)
    yield made
    made.close()


def used_bytes(card):
    with Card.open(card.uuid) as handle:
        return handle.used_bytes()


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_every_byte_of_the_allocator_is_that_of_a_trial_alone(card, device, monkeypatch, checkpointing):
    spec, variant = parse_spec(SMALL), Variant.from_dict({"precision": "fp32", "checkpointing": checkpointing})
    with monkeypatch.context() as patch, device.open(spec, variant) as runner:
        patch.setattr(LocalDevice, "has_room_beside", lambda *_: False)
        alone = [runner.run(size, fresh=True) for size in (8, 100_000)]
    device.prepare(spec, [variant, variant])
    with device.open(spec, variant) as runner:
        beside = [runner.run(size, fresh=True) for size in (8, 100_000, 8)]
    waiting = used_bytes(card)  # the next trial's process, which has allocated nothing
    device.rest()
    assert [trial.details.get("started_ahead", False) for trial in beside] == [False, True, True]
    assert [trial.outcome for trial in beside] == [Outcome.FITS, Outcome.OOM, Outcome.FITS]
    for trial, expected in zip(beside, (*alone, alone[0]), strict=True):
        print(trial.peaks, expected.peaks, trial.details["context_bytes"], expected.details["context_bytes"])
        print(trial.details["timings"], expected.details["timings"])
        assert replace(trial.peaks, device_bytes=expected.peaks.device_bytes) == expected.peaks
        for name in ("used_before_bytes", "allocated_after_step_bytes", "system"):
            assert trial.details[name] == expected.details[name]
        more = trial.details["context_bytes"] - expected.details["context_bytes"]
        assert more in (0, DRIVER_PAGE_BYTES)
        assert trial.peaks.device_bytes - expected.peaks.device_bytes == more
    assert waiting - used_bytes(card) == pytest.approx(alone[0].details["context_bytes"], abs=MIB)
    assert used_bytes(card) < IDLE_BYTES


LEAVES_A_CHILD = 109
FAULTS = {
    101: "device-side assert triggered",
    102: "illegal memory access",
    103: "did not finish in time and was killed",
    104: "did not finish in time and was killed",
    105: "was killed by SIGKILL",
    106: "was killed by SIGSEGV",
    107: "ended with exit status 3",
    LEAVES_A_CHILD: "ended with exit status 7",
    111: "other processes came to the GPU during the trial",
}


@pytest.mark.parametrize("size", FAULTS)
def test_a_fault_is_one_failed_trial_and_leaves_no_process(card, faulty, size):
    """Of a trial whose process was begun beside another, with the next one's beside it."""
    spec = parse_spec(FAULTY)
    faulty.prepare(spec, [Variant(), Variant()])
    with faulty.open(spec, Variant()) as runner:
        before, failed = (runner.run(each, fresh=True) for each in (8, size))
        assert failed.outcome is Outcome.FAILED, failed
        assert FAULTS[size] in failed.error
        assert failed.details["started_ahead"]
        alone, again = (runner.run(8, fresh=True) for _ in range(2))
    assert ("started_ahead" in alone.details, "started_ahead" in again.details) == (False, False)
    assert before.peaks == alone.peaks == again.peaks
    faulty.rest()
    assert used_bytes(card) < IDLE_BYTES
    if size == LEAVES_A_CHILD:
        assert gone(int(failed.details["output"].rpartition("left ")[2]))


def test_gigabytes_of_output_and_a_full_device_do_not_disturb_what_is_beside(card, faulty):
    spec = parse_spec(FAULTY)
    faulty.prepare(spec, [Variant(), Variant()])
    with faulty.open(spec, Variant()) as runner:
        trials = [runner.run(size, fresh=True) for size in (8, 108, 110, 8)]
    faulty.rest()
    assert [trial.outcome for trial in trials] == [Outcome.FITS, Outcome.FITS, Outcome.OOM, Outcome.FITS], trials
    assert used_bytes(card) < IDLE_BYTES


def test_a_sweep_begins_all_but_the_first(card, device):
    spec = parse_spec({**SMALL, "variants": {"precision": ["fp32", "bf16-amp"]}})
    plans = plan_sweep(spec, device)
    fresh = [trial for plan in plans for trial in plan.trials if trial.fresh_process]
    assert all(plan.certified for plan in plans)
    assert sum(trial.details.get("started_ahead", False) for trial in fresh) >= len(fresh) - 3
    contexts = {trial.details["context_bytes"] for trial in fresh}
    assert max(contexts) - min(contexts) <= DRIVER_PAGE_BYTES
    assert used_bytes(card) < IDLE_BYTES
