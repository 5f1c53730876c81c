"""The real GPU's processes without a GPU: real forks in every state, and the card as NVML tells of it."""

import gc
import os
import time
from dataclasses import replace

import pytest

from planner.errors import DeviceBusy, DeviceLost, DeviceUnavailable, InvalidSpec, ModelError
from planner.forks import Fork, shared_with_forks
from planner.gpus import COMMUNICATOR_BYTES, default_capacity_bytes, find_gpu
from planner.local_gpus import local_gpus
from planner.planning import plan_sweep
from planner.runtime.card import Card, Held, wait_until_idle
from planner.runtime.device import LocalDevice
from planner.specs.model import ModelSource, ModelSpec
from planner.specs.variants import Parallelism, Variant
from planner.trials import Outcome, PlanStatus, Source
from planner.units import GIB, MIB
from tests import environment_fakes
from tests.planning_fakes import BF16, FP32, make_spec
from tests.runtime_fakes import UUID, FakeNvml, fake_nvml, local_devices
from tests.test_processes import gone


@pytest.fixture
def make_device():
    with local_devices() as make:
        yield make


def test_a_smaller_card_has_less_left_beside_nccl():
    small, two = find_gpu("a10g"), Variant(parallelism=Parallelism.DDP, gpus=2)
    most = default_capacity_bytes(small)
    (local,) = local_gpus({}, fake_nvml())

    def held(capacity_bytes, variant):
        return LocalDevice(local, capacity_bytes, stands_for=small).limit.of(variant)

    assert (held(most, Variant()).capacity_bytes, "NCCL" in held(most, Variant()).note) == (most, False)
    assert (held(most, two).capacity_bytes, "NCCL" in held(most, two).note) == (most - COMMUNICATOR_BYTES, True)
    assert (held(GIB, two).capacity_bytes, "NCCL" in held(GIB, two).note) == (GIB, False)


def test_a_fresh_trial_is_a_fork_of_one_preloaded_process(make_device):
    device = make_device()
    with device.open(make_spec(), BF16) as runner:
        trials = [runner.run(size, fresh=True) for size in (3, 4)]
    with device.open(make_spec(), FP32) as runner:
        trials.append(runner.run(5, fresh=True))
    details = [trial.details for trial in trials]
    assert [found["trials"] for found in details] == [1, 1, 1]
    assert len({found["pid"] for found in details}) == 3
    assert {found["parent"] for found in details} == {found["zygote"] for found in details}
    assert len({found["zygote"] for found in details}) == 1
    assert (details[0]["visible"], details[0]["uuid"], details[0]["capacity"]) == (UUID, UUID, 16 * GIB)
    assert [found["variant"]["precision"] for found in details] == ["bf16-amp", "bf16-amp", "fp32"]
    assert all(gone(found["pid"]) for found in details)
    trial = trials[0]
    assert (trial.outcome, trial.source, trial.fresh_process) == (Outcome.FITS, Source.MEASURED, True)
    assert (trial.peaks.device_bytes, trial.num_alloc_retries, trial.step_time_s) == (3, 4, 0.1)
    assert trial.started_at.tzinfo is not None
    assert set(trial.details["timings"]) == {"idle_s", "leaving_s"}


def test_trials_that_need_not_be_fresh_share_a_warm_process(make_device):
    seen = []
    device = make_device(wait_idle=lambda uuid, needed, held: seen.append(held))
    with device.open(make_spec(), BF16) as runner:
        trials = [runner.run(size) for size in (3, 4, 10)] + [runner.run(5, fresh=True), runner.run(6)]
    details = [trial.details for trial in trials]
    assert [found["trials"] for found in details] == [1, 2, 3, 1, 1]
    assert [trial.fresh_process for trial in trials] == [True, False, False, True, True]
    assert len({found["pid"] for found in details}) == 3
    warm = Held(pids=(details[0]["pid"], 4242), bytes=7)  # the ids that the driver knows it by too
    assert seen == [Held(), warm, warm, Held(), Held(pids=(details[4]["pid"],), bytes=5)]  # the last: begun ahead
    assert all(gone(found["pid"]) for found in details)  # the last one with its runner


def test_a_warm_process_that_is_not_clean_any_more_is_replaced(make_device):
    with make_device().open(make_spec(), BF16) as runner:
        trials = [runner.run(size) for size in (3, 7, 3)]
    assert [trial.fresh_process for trial in trials] == [True, False, True]
    assert trials[0].details["pid"] == trials[1].details["pid"] != trials[2].details["pid"]


def test_a_spec_that_only_accumulates_is_served_by_the_same_model(make_device):
    device, spec = make_device(), make_spec()
    accumulating = replace(spec, train=replace(spec.train, accumulation_steps=4))
    with device.open(spec, BF16) as plain, device.open(accumulating, BF16) as other:
        details = [runner.run(3, fresh=True).details for runner in (plain, other, plain)]
    assert [found["accumulation_steps"] for found in details] == [1, 4, 1]
    assert len({found["zygote"] for found in details}) == 1


def test_a_warm_process_serves_one_capacity_which_may_be_less_than_the_devices(make_device):
    device = make_device()
    with device.open(make_spec(), BF16) as first, device.open(make_spec(), BF16, capacity_bytes=15 * GIB) as second:
        trials = [first.run(3), second.run(3)]
    assert [trial.details["capacity"] for trial in trials] == [16 * GIB, 15 * GIB]
    assert [trial.fresh_process for trial in trials] == [True, True]


def test_a_warm_process_serves_one_capacity(make_device):
    device = make_device()
    with device.open(make_spec(), BF16) as first, device.open(make_spec(), BF16, capacity_bytes=8 * GIB) as second:
        trials = [first.run(3), second.run(3), second.run(4)]
    assert [trial.fresh_process for trial in trials] == [True, True, False]
    assert [trial.details["capacity"] for trial in trials] == [16 * GIB, 8 * GIB, 8 * GIB]


def test_after_an_error_nothing_is_held(make_device):
    seen = []
    device = make_device(wait_idle=lambda uuid, needed, held: seen.append(held))
    with device.open(make_spec(), BF16) as runner:
        runner.run(3)
        with pytest.raises(ModelError):
            runner.run(106)
        assert runner.run(3).fresh_process
    assert seen[-1] == Held()


def test_a_warm_process_serves_one_variant(make_device):
    device = make_device()
    with device.open(make_spec(), BF16) as first, device.open(make_spec(), FP32) as second:
        trials = [first.run(3), second.run(3)]
    assert [trial.fresh_process for trial in trials] == [True, True]


def test_a_fault_in_the_warm_process_is_one_failed_trial(make_device):
    with make_device().open(make_spec(), FP32) as runner:
        before, failed, after = runner.run(3), runner.run(102), runner.run(3)
    assert failed.outcome is Outcome.FAILED
    assert not failed.fresh_process
    assert (after.fits, after.fresh_process) == (True, True)
    assert gone(before.details["pid"])


def test_out_of_memory_is_an_outcome(make_device):
    with make_device().open(make_spec(), FP32) as runner:
        trial = runner.run(10)
    assert (trial.outcome, trial.error) == (Outcome.OOM, "CUDA out of memory")


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (102, "was killed by SIGSEGV"),
        (103, "was killed by SIGKILL"),
        (104, "ended with exit status 3"),
        (108, "RuntimeError: a defect"),
        (109, "ended with exit status 7"),
        (110, "was killed by SIGSEGV"),
        (112, "SystemExit: 4"),
    ],
)
def test_a_trial_that_dies_is_one_failed_trial_and_the_next_one_runs(make_device, act, words):
    with make_device().open(make_spec(), FP32) as runner:
        failed, after = runner.run(act), runner.run(3)
    assert failed.outcome is Outcome.FAILED
    assert words in failed.error
    assert failed.peaks is None
    assert after.fits


def test_a_segfault_leaves_its_traceback_as_evidence(make_device):
    with make_device().open(make_spec(), FP32) as runner:
        assert "string_at" in runner.run(102).details["output"]


def test_what_a_trial_leaves_running_is_killed(make_device):
    with make_device().open(make_spec(), FP32) as runner:
        output = runner.run(109).details["output"]
        left = [int(word) for word in output.split() if word.isdigit()]
        assert len(left) == 2
        assert all(gone(pid) for pid in left)
        assert runner.run(3).fits


def test_preparing_starts_the_preloaded_process_and_does_not_wait(make_device, tmp_path, monkeypatch):
    monkeypatch.setenv("GATE", str(tmp_path / "gate"))
    device = make_device(child_module="tests.runtime_slow_child")
    device.prepare(make_spec(), ())
    device.prepare(make_spec(), ())
    (tmp_path / "gate").touch()
    with device.open(make_spec(), FP32) as runner:
        assert runner.run(3).fits


def test_a_trial_that_hangs_is_killed_and_the_preloaded_process_lives(make_device):
    device = make_device(trial_timeout_s=0.5)
    with device.open(make_spec(), FP32) as runner:
        before = runner.run(3)
        start = time.monotonic()
        hung = runner.run(101)
        assert time.monotonic() - start < 5
        after = runner.run(3)
    assert hung.outcome is Outcome.FAILED
    assert "did not finish in time and was killed" in hung.error
    assert after.details["zygote"] == before.details["zygote"]


def test_a_trial_that_prints_gigabytes_is_not_disturbed(make_device):
    with make_device().open(make_spec(), FP32) as runner:
        assert runner.run(105).outcome is Outcome.OOM


def test_a_preloaded_process_that_dies_is_started_again(make_device):
    with make_device().open(make_spec(), FP32) as runner:
        first = runner.run(3)
        died = runner.run(111)
        after = runner.run(3)
    assert died.outcome is Outcome.FAILED
    assert "was killed by SIGKILL" in died.error
    assert after.details["zygote"] != first.details["zygote"]


@pytest.mark.parametrize(("act", "kind"), [(106, ModelError), (107, DeviceLost)])
def test_errors_cross_two_processes_with_their_traceback(make_device, act, kind):
    with make_device().open(make_spec(), FP32) as runner, pytest.raises(kind) as caught:
        runner.run(act)
    assert "Traceback" in caught.value.__notes__[0]


def test_what_building_the_model_raises_is_raised(make_device):
    spec = make_spec(model=ModelSpec(source=ModelSource.TRANSFORMERS, name="bert", task="masked-lm"))
    with make_device().open(spec, FP32) as runner, pytest.raises(InvalidSpec) as caught:
        runner.run(1)
    assert caught.value.field == "model.config.n_layerz"


def test_the_preloaded_process_goes_with_its_device(make_device):
    (local,) = local_gpus({}, fake_nvml())
    device = LocalDevice(local, GIB, child_module="tests.runtime_child", wait_idle=lambda *_: None)
    with device.open(make_spec(), FP32) as runner:
        pid = runner.run(1).details["zygote"]
    del device, runner
    gc.collect()
    assert gone(pid)


def test_a_busy_card_is_not_measured(make_device):
    def wait_idle(uuid, needed_bytes, held):
        assert uuid == UUID
        assert needed_bytes > 16 * GIB
        raise DeviceBusy("busy")

    with make_device(wait_idle=wait_idle).open(make_spec(), FP32) as runner, pytest.raises(DeviceBusy):
        runner.run(1)


def test_a_whole_sweep_is_certified(make_device):
    (plan,) = plan_sweep(make_spec(), make_device())
    assert (plan.status, plan.max_batch_size, plan.certified) == (PlanStatus.PLANNED, 9, True)
    assert plan.environment.gpu_uuid == UUID


def test_a_torch_without_cuda_says_so(make_device):
    device = make_device(child_module="planner.runtime.child")
    import torch

    if torch.version.cuda is not None:
        assert device.environment(make_spec()).cuda_version == torch.version.cuda
        return
    with device.open(make_spec(), FP32) as runner, pytest.raises(DeviceUnavailable, match="built without CUDA"):
        runner.run(1)


def test_a_fork_changes_nothing_here():
    state = {"n": 0}

    def work(request):
        state["n"] += request["by"]
        os.environ["FORKED"] = "1"
        return {"n": state["n"], "big": "x" * 300_000}

    fork = Fork.start(work)
    first, second = fork.ask({"by": 1}, 10), fork.ask({"by": 2}, 10)
    fork.end()
    fork.end()
    assert (first["n"], second["n"], len(first["big"]), fork.ending) == (1, 3, 300_000, "ended with exit status 0")
    assert state == {"n": 0}
    assert "FORKED" not in os.environ
    assert gone(fork.pid)


def test_an_idle_card_is_accepted_at_once_and_nvml_is_closed():
    nvml = fake_nvml()
    wait_until_idle(UUID, 100 * GIB, wait_s=0, nvml=nvml)
    assert nvml.open_count == 0


def test_a_card_that_becomes_free_is_waited_for():
    nvml = fake_nvml(busy=[([4242], 900), ([4242], 900), ([], 3)])
    wait_until_idle(UUID, GIB, wait_s=5, nvml=nvml)


def test_what_is_held_on_purpose_is_no_reason_to_wait():
    nvml = fake_nvml(busy=[([4242], 60_000)])
    held = Held(pids=(4242,), bytes=60_000 * MIB)
    wait_until_idle(UUID, 140 * GIB, held, wait_s=0, nvml=nvml)
    with pytest.raises(DeviceBusy, match=r"\(4242\)"):
        wait_until_idle(UUID, 140 * GIB, Held(pids=(1,)), wait_s=0, nvml=nvml)


def test_another_process_on_the_card_is_named():
    nvml = fake_nvml(busy=[([4243, 4242], 900)])
    with pytest.raises(DeviceBusy, match=r"\(4242, 4243\) and hold 900.0 MiB"):
        wait_until_idle(UUID, GIB, wait_s=0, nvml=nvml)
    assert nvml.open_count == 0


@pytest.mark.parametrize(("used_mib", "busy"), [(200, False), (1000, False), (60_000, True)])
def test_memory_that_no_compute_process_holds_matters_only_when_too_little_is_left(used_mib, busy):
    nvml = fake_nvml(busy=[([], used_mib)])
    if busy:
        with pytest.raises(DeviceBusy, match="are needed"):
            wait_until_idle(UUID, 100 * GIB, wait_s=0, nvml=nvml)
    else:
        wait_until_idle(UUID, 100 * GIB, wait_s=0, nvml=nvml)


def test_a_card_that_is_gone_is_lost():
    with pytest.raises(DeviceLost):
        wait_until_idle("GPU-2", GIB, wait_s=0, nvml=fake_nvml())
    with pytest.raises(DeviceLost):
        wait_until_idle(UUID, GIB, wait_s=0, nvml=fake_nvml(error=FakeNvml.NVMLError_GpuIsLost("GPU is lost")))


def test_a_driver_that_does_not_list_processes_is_no_reason_to_stop():
    nvml = fake_nvml(error=environment_fakes.FakeNvmlError("Not Supported"))
    wait_until_idle(UUID, GIB, wait_s=0, nvml=nvml)
    with Card.open(UUID, nvml) as card:
        assert card.compute_processes() == []
        nvml.cards[0].used_mib = 7
        assert card.used_bytes() == 7 * MIB


@pytest.mark.parametrize("is_switched_off", [False, True])
def test_the_collector_waits_while_something_is_built_for_forks_and_is_then_as_that_left_it(is_switched_off):
    before = gc.get_threshold()
    try:
        with shared_with_forks():
            assert gc.get_threshold()[0] == 0
            if is_switched_off:
                gc.disable()
        assert (gc.get_threshold(), gc.isenabled()) == (before, not is_switched_off)
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        gc.enable()
