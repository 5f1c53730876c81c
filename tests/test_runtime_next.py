"""The next trial's process, begun beside a trial: real forks of a preloaded process without torch or GPU."""

import contextlib
import os
import time
from pathlib import Path

import pytest

from planner.errors import DeviceBusy
from planner.forks import Latch
from planner.planning import plan_sweep
from planner.progress import TrialFinished
from planner.runtime import zygote
from planner.specs.variants import Precision, Variant
from planner.trials import Outcome, Source
from planner.units import GIB
from tests.planning_fakes import BF16, FP32, ThresholdDevice, make_spec
from tests.runtime_fakes import local_devices
from tests.test_processes import gone


@pytest.fixture
def make_device():
    with local_devices() as make:
        yield make


def test_the_next_trial_takes_the_process_that_was_begun_beside_this_one(make_device):
    device = make_device()
    with device.open(make_spec(), FP32) as runner:
        first = runner.run(9, fresh=True)
        waiting = first.details["beside"]
        assert not gone(waiting)
        second = runner.run(11, fresh=True)
    assert (second.details["pid"], second.fresh_process, second.details["trials"]) == (waiting, True, 1)
    assert (first.details["starts"], second.details["starts"]) == ([None], [None, 3])
    assert ("started_ahead" in first.details, second.details["started_ahead"]) == (False, True)
    assert (second.details["beside"], device.expects_more) == (None, False)
    assert gone(waiting)


def test_it_is_kept_for_the_next_variant_and_ended_after_the_last(make_device):
    device = make_device()
    device.prepare(make_spec(), [FP32, BF16])
    with device.open(make_spec(), FP32) as runner:
        runner.run(9, fresh=True)
        second = runner.run(11, fresh=True)
    assert not gone(second.details["beside"])
    device.prepare(make_spec(), [BF16])
    with device.open(make_spec(), BF16) as runner:
        third = runner.run(9, fresh=True)
        fourth = runner.run(11, fresh=True)
    assert third.details["pid"] == second.details["beside"]
    assert third.details["variant"] == BF16.as_dict()
    assert (fourth.details["pid"], fourth.details["beside"]) == (third.details["beside"], None)


def test_a_trial_waits_until_it_has_started(make_device):
    with make_device().open(make_spec(), FP32) as runner:
        began = time.monotonic()
        assert runner.run(1, fresh=True).details["is_settled"]
        assert time.monotonic() > began + 0.3


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7])
def test_whatever_becomes_of_it_the_trial_beside_is_as_ever(make_device, size):
    """It is killed, faults, exits, floods its output or raises: then the next trial begins a process of its own."""
    with make_device().open(make_spec(), FP32) as runner:
        trial = runner.run(size, fresh=True)
        after = runner.run(9, fresh=True)
    assert (trial.outcome, trial.details["is_settled"], after.outcome) == (Outcome.FITS, True, Outcome.FITS)
    assert gone(trial.details["beside"]) or size == 5
    assert (after.details["pid"] == trial.details["beside"]) == (size == 5)


def test_one_that_hangs_makes_the_trial_fail_and_the_one_after_it_is_alone(make_device):
    device = make_device(child_module="tests.runtime_hanging_child")
    device.prepare(make_spec(), [FP32, BF16])
    with device.open(make_spec(), FP32) as runner:
        trial = runner.run(8, fresh=True)
        assert trial.outcome is Outcome.FAILED
        assert gone(trial.details["beside"])
        again = runner.run(8, fresh=True)
        assert (again.outcome, again.details["beside"]) == (Outcome.FITS, None)
        assert runner.run(9, fresh=True).details["beside"] is not None


@pytest.mark.parametrize("act", [101, 102, 103, 104, 105, 106, 108, 109, 110, 111])
def test_a_trial_that_fails_takes_it_along(make_device, act):
    device = make_device(trial_timeout_s=2)
    device.prepare(make_spec(), [FP32, BF16])
    with device.open(make_spec(), FP32) as runner:
        session = device.preloaded(make_spec()).pid
        with contextlib.suppress(Exception):
            failed = runner.run(act, fresh=True)
            assert failed.outcome is (Outcome.OOM if act == 105 else Outcome.FAILED)
        expected = 2 if act == 105 else 0 if act == 111 else 1
        deadline = time.monotonic() + 5
        while len(_in_session(session)) != expected:  # a process that was killed takes a moment to go
            assert time.monotonic() < deadline
            time.sleep(0.01)
        after = runner.run(9, fresh=True)
    assert (after.outcome, after.fresh_process) == (Outcome.FITS, True)
    assert (after.details.get("started_ahead"), after.details["beside"] is None) == (
        (True, False) if act == 105 else (None, act != 111)
    )


def test_a_process_that_the_driver_does_not_list_begins_none(make_device):
    """Its bytes could not be told from the other's."""
    with make_device().open(make_spec(), FP32) as runner:
        assert runner.run(10, fresh=True).details["beside"] is None


@pytest.mark.parametrize(
    ("capacity_bytes", "variant", "fresh"),
    [(GIB, FP32, False), (139 * GIB, FP32, True), (GIB, Variant(gpus=2, parallelism="ddp"), True)],
    ids=["not fresh", "no room", "two GPUs"],
)
def test_none_is_begun_beside(make_device, capacity_bytes, variant, fresh):
    device = make_device()
    device.peers = (device.local,)
    with device.open(make_spec(), variant, capacity_bytes=capacity_bytes) as runner:
        assert runner.run(9, fresh=fresh).details["beside"] is None


@pytest.mark.parametrize(
    "variant", [Variant(allocator="expandable_segments:True"), Variant(gpus=2, parallelism="ddp")], ids=str
)
def test_it_runs_no_trial_that_needs_other_settings_of_the_allocator_or_other_gpus(make_device, variant):
    device = make_device()
    device.peers = (device.local,)
    device.prepare(make_spec(), [FP32, variant])
    with device.open(make_spec(), FP32) as runner:
        waiting = runner.run(9, fresh=True).details["beside"]
    assert not gone(waiting)
    with device.open(make_spec(), variant) as runner:
        assert runner.run(9, fresh=True).details["pid"] != waiting
    assert gone(waiting)


def test_a_trial_that_need_not_be_fresh_is_the_first_of_a_warm_process(make_device):
    with make_device().open(make_spec(), FP32) as runner:
        waiting = runner.run(9, fresh=True).details["beside"]
        warm, again = runner.run(4), runner.run(5)
        fresh = runner.run(9, fresh=True)
    assert (warm.details["pid"], again.details["pid"]) == (waiting, waiting)
    assert (warm.fresh_process, again.fresh_process, fresh.fresh_process) == (True, False, True)
    assert fresh.details["pid"] != waiting


def test_a_busy_card_is_found_though_a_process_waits_on_it(make_device):
    seen = []

    def wait_idle(uuid, needed_bytes, held):
        seen.append(held)
        if len(seen) == 2:
            raise DeviceBusy("busy")

    with make_device(wait_idle=wait_idle).open(make_spec(), FP32) as runner:
        first = runner.run(9, fresh=True)
        with pytest.raises(DeviceBusy):
            runner.run(10, fresh=True)
        third = runner.run(11, fresh=True)
    waiting = first.details["beside"]
    assert (seen[0].pids, seen[1].pids, seen[1].bytes) == ((), (waiting,), 5)
    assert seen[2] == seen[1]
    assert third.details["pid"] == waiting  # it has trained nothing


class _InterruptedError(Exception):
    pass


@pytest.mark.parametrize("error", [None, _InterruptedError, KeyboardInterrupt])
def test_however_a_sweep_ends_no_process_of_a_trial_is_left(make_device, error):
    seen = []

    def listen(event):
        if isinstance(event, TrialFinished):
            seen.append(event.trial)
            if error and len(seen) == 2:
                raise error

    device, expected = make_device(), ThresholdDevice(9, source=Source.PREDICTED)
    with contextlib.suppress(*([error] if error else [])):
        plan_sweep(make_spec(Precision.BF16_AMP, Precision.FP32), device, predict_start=expected, listener=listen)
    assert len(seen) == 2 if error else len(seen) > 2
    pids = {trial.details["pid"] for trial in seen} | {trial.details["beside"] for trial in seen} - {None}
    assert all(gone(pid) for pid in pids)
    assert sum(trial.details.get("started_ahead", False) for trial in seen) >= 1


def test_a_latch_is_closed_until_the_last_who_holds_it_is_gone():
    latch = Latch()
    assert latch.wait(0)
    closed = latch.close()
    assert (latch.wait(0.01), latch.close()) == (False, None)
    pid = os.fork()
    if pid == 0:
        time.sleep(0.2)
        os._exit(0)
    os.close(closed)
    assert not latch.wait(0.01)
    os.waitpid(pid, 0)
    assert latch.wait(0)


def test_a_trial_waits_shorter_for_it_than_the_preloaded_process_does():
    assert zygote.SETTLE_S < zygote.START_S


def _in_session(session):
    """The living processes in it: a preloaded process, and what it has forked."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                state, _, _, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its_session) == session and state != "Z":
                    found.add(int(entry.name))
    return found
