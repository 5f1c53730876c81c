"""The next trial's process, begun beside the present trial: real forks, no GPU."""

import contextlib
from functools import partial
from pathlib import Path

import pytest

from planner.errors import DeviceBusy
from planner.gpus import default_capacity_bytes
from planner.local_gpus import local_gpus
from planner.planning import plan_sweep
from planner.progress import TrialFinished
from planner.runtime.card import Held
from planner.specs.variants import Precision
from planner.trials import Outcome, Source
from planner.units import GIB
from tests.planning_fakes import BF16, FP32, ThresholdDevice, make_spec
from tests.runtime_fakes import fake_nvml, local_devices
from tests.test_processes import gone


@pytest.fixture
def make_device():
    with local_devices() as make:
        yield partial(make, begins_ahead=True)


def test_nothing_is_begun_ahead_unless_it_is_asked_for(make_device):
    device = make_device.func()
    device.prepare(make_spec(), [BF16, FP32])
    trials = []
    for variant in (BF16, FP32):
        with device.open(make_spec(), variant) as runner:
            trials += [runner.run(size, fresh=True) for size in (9, 10)]
    assert [trial.details["beside"]["num_contexts"] for trial in trials] == [0, 0, 0, 0]
    assert not any("started_ahead" in trial.details for trial in trials)


def test_the_next_trials_process_is_begun_beside_a_trial(make_device):
    seen = []
    device = make_device(wait_idle=lambda uuid, needed, held: seen.append(held))
    device.prepare(make_spec(), [BF16, FP32])
    with device.open(make_spec(), BF16) as runner:
        first, second = (runner.run(size, fresh=True) for size in (9, 10))
    with device.open(make_spec(), FP32) as runner:
        third = runner.run(9, fresh=True)
    beside = [trial.details["beside"] for trial in (first, second, third)]
    pids = [trial.details["pid"] for trial in (first, second, third)]
    assert beside[:2] == [{"num_contexts": 1, "pids": [pid, 5000], "bytes": 100} for pid in pids[1:]]
    assert [trial.details.get("started_ahead", False) for trial in (first, second, third)] == [False, True, True]
    assert [trial.details["moved"] for trial in (first, second, third)] == [None, BF16.as_dict(), FP32.as_dict()]
    assert [trial.details["told_bytes"] for trial in (first, second, third)] == [None, 11, 11]
    # Measured before the next process was begun: its context would be taken for the trial's own.
    assert [trial.details["contexts_when_measured"] for trial in (second, third)] == [2, 3]
    assert [trial.details["contexts"] for trial in (first, second, third)] == [2, 3, 4]
    assert second.details["room_bytes"] == device.room_bytes() - 11  # what others hold of the GPU is no room
    assert [trial.details["trials"] for trial in (first, second, third)] == [1, 1, 1]
    assert all(trial.fresh_process for trial in (first, second, third))
    assert second.details["began_s"] < first.details["ended_s"] < third.details["began_s"]
    assert seen == [Held(), *(Held(pids=(pid, 5000), bytes=100) for pid in pids[1:])]
    assert all(gone(pid) for pid in [*pids, *beside[2]["pids"][:1]])  # the last was begun in vain


def test_nothing_is_begun_ahead_where_a_trial_may_take_all_that_the_gpu_leaves(make_device):
    (local,) = local_gpus({}, fake_nvml())
    device = make_device()
    device.capacity_bytes = default_capacity_bytes(local.gpu)
    with device.open(make_spec(), BF16) as runner:
        trials = [runner.run(size, fresh=True) for size in (9, 10)]
    assert [trial.details["beside"]["num_contexts"] for trial in trials] == [0, 0]
    assert set(trials[1].details["timings"]) == {"ready_s", "idle_s", "leaving_s"}


@pytest.mark.parametrize("size", [301, 302, 303, 304])
def test_a_process_that_cannot_be_begun_ahead_changes_nothing(make_device, size):
    """It dies, raises, hangs, or another process comes to the GPU at the same moment."""
    with make_device().open(make_spec(), BF16) as runner:
        beside, after = runner.run(size, fresh=True), runner.run(9, fresh=True)
    assert beside.outcome is Outcome.OOM
    assert beside.details["beside"] == {"num_contexts": 0, "pids": [], "bytes": 0}
    assert (after.fits, after.fresh_process, after.details["moved"]) == (True, True, None)
    assert "started_ahead" not in after.details


def test_a_process_begun_for_another_variant_is_ended(make_device):
    """A third trial comes of the first variant, where the next one was expected."""
    device = make_device()
    device.prepare(make_spec(), [BF16, FP32])
    with device.open(make_spec(), BF16) as runner:
        trials = [runner.run(size, fresh=True) for size in (9, 10, 8)]
    (pid, _) = trials[1].details["beside"]["pids"]
    assert [trial.details["moved"] for trial in trials] == [None, BF16.as_dict(), None]
    assert trials[2].details["pid"] != pid
    assert gone(pid)


def test_nothing_is_begun_beside_the_last_trial_that_is_expected(make_device):
    device = make_device()
    device.prepare(make_spec(), [BF16])
    with device.open(make_spec(), BF16) as runner:
        trials = [runner.run(size, fresh=True) for size in (9, 10)]
    assert [trial.details["beside"]["num_contexts"] for trial in trials] == [1, 0]


@pytest.mark.parametrize("act", [102, 103, 108, 109, 120])
def test_after_a_trial_that_failed_everything_begins_anew(make_device, act):
    with make_device().open(make_spec(), BF16) as runner:
        failed, after = runner.run(act, fresh=True), runner.run(9, fresh=True)
    assert failed.outcome is Outcome.FAILED
    assert (after.fits, after.details["moved"]) == (True, None)


def test_a_process_begun_ahead_for_another_capacity_is_ended(make_device):
    device = make_device()
    with device.open(make_spec(), BF16) as first, device.open(make_spec(), BF16, capacity_bytes=8 * GIB) as second:
        trials = [first.run(9, fresh=True), second.run(9, fresh=True)]
    assert trials[1].details["moved"] is None
    assert gone(trials[0].details["beside"]["pids"][0])


def test_a_busy_card_is_found_though_a_process_waits_on_it(make_device):
    seen = []

    def wait_idle(uuid, needed_bytes, held):
        seen.append(held)
        if len(seen) == 2:
            raise DeviceBusy("busy")

    with make_device(wait_idle=wait_idle).open(make_spec(), BF16) as runner:
        first = runner.run(9, fresh=True)
        with pytest.raises(DeviceBusy):
            runner.run(10, fresh=True)
        third = runner.run(10, fresh=True)
    (waiting, _) = first.details["beside"]["pids"]
    assert seen[1].pids == (waiting, 5000)
    assert seen[2] == seen[1]
    assert third.details["pid"] == waiting  # it has trained nothing
    assert gone(waiting)


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
    left = {pid for trial in seen for pid in (trial.details["pid"], *trial.details["beside"]["pids"]) if pid != 5000}
    assert sum(trial.details["beside"]["num_contexts"] for trial in seen) >= 2
    assert all(gone(pid) for pid in left)


@pytest.mark.parametrize("act", [101, 105, 111])
def test_a_trial_that_hangs_or_prints_or_kills_its_parent_leaves_no_process_beside(make_device, act):
    device = make_device(trial_timeout_s=2)
    device.prepare(make_spec(), [BF16, FP32])
    with device.open(make_spec(), BF16) as runner:
        first = device.preloaded(make_spec()).pid
        runner.run(act, fresh=True)
        after = runner.run(9, fresh=True)
        assert after.details["beside"]["num_contexts"] == 1
    second = device.preloaded(make_spec()).pid
    assert (first == second) == (act != 111)
    (waiting, _) = after.details["beside"]["pids"]
    assert _in_sessions(first, second) == {second, waiting}
    device.rest()
    assert _in_sessions(first, second) == {second}


def _in_sessions(*sessions):
    """The living processes in these sessions: what a preloaded process has started, and itself."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) in sessions and state != "Z":
                    found.add(int(entry.name))
    return found
