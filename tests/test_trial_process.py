"""A trial's process on the CPU: its steps are real, the GPU's counters are not."""

import gc
import os
from dataclasses import dataclass, field

import pytest
import torch

from planner.errors import DeviceUnavailable
from planner.runtime import context, trial
from planner.runtime.context import Context
from planner.runtime.trial import TrialProcess
from planner.specs.document import parse_spec
from planner.training import build_model
from planner.units import GIB, MIB

SPEC = {
    "model": {"source": "python", "target": "tests.runtime_cpu_model:Small"},
    "data": {"kind": "tensors", "inputs": {"x": {"shape": [8], "dtype": "float32"}}},
    "train": {"optimizer": "adamw"},
}
VARIANT = {"precision": "fp32", "checkpointing": "none", "compile": "off"}
CONTEXT_BYTES = 500 * MIB


@dataclass
class FakeCard:
    """A card whose bytes are what the test says."""

    used: int = 0
    pids: list[int] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    """Of the caching allocator, in the order in which they were set."""

    def used_bytes(self):
        return self.used

    def free_bytes(self):
        return 80 * GIB - self.used

    def compute_processes(self):
        return list(self.pids)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def card(monkeypatch):
    """The counters of a GPU on which nothing but the context and what the test adds takes memory."""
    card = FakeCard()
    taken = {"reserved": 0}

    def start(capacity_bytes, opened, device_index=0, join=None):
        assert opened is card
        card.limits.append(capacity_bytes)
        before, others = card.used, card.compute_processes()
        card.used += CONTEXT_BYTES
        card.pids.append(os.getpid())
        return Context(torch.device("cpu"), CONTEXT_BYTES, 0, before, {}, (os.getpid(),), tuple(others))

    monkeypatch.setattr(trial.Card, "open", lambda uuid: card)
    monkeypatch.setattr(trial.Context, "start", start)
    for name, value in {
        "memory_stats": lambda device: {"reserved_bytes.all.allocated": 7, "allocated_bytes.all.current": 5},
        "memory_reserved": lambda device: taken["reserved"],
        "memory_allocated": lambda device: taken["reserved"],
        "max_memory_allocated": lambda device: 5,
        "max_memory_reserved": lambda device: 7,
        "synchronize": lambda device=None: None,
        "reset_peak_memory_stats": lambda device: None,
        "reset_accumulated_memory_stats": lambda device: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(context.torch.cuda, name, value)
    monkeypatch.setattr(context, "_limit", lambda device, capacity_bytes: card.limits.append(capacity_bytes))
    monkeypatch.setattr(context.torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    card.taken = taken
    return card


@pytest.fixture
def process():
    spec = parse_spec(SPEC)
    return TrialProcess(spec, build_model(spec))


REQUEST = {"variant": VARIANT, "capacity_bytes": GIB, "gpu_uuid": "GPU-1", "accumulation_steps": 1}


def test_a_trial_alone(card, process):
    result = process.run(**REQUEST, batch_size=4, keep=False)
    assert (result["outcome"], len(result["step_times_s"])) == ("fits", 3)
    assert result["peaks"]["device_bytes"] == CONTEXT_BYTES
    assert result["details"]["context_bytes"] == CONTEXT_BYTES
    assert "beside_bytes" not in result["details"]
    assert set(result["details"]["timings"]) == {"context_s", "move_s", "steps_s", "settle_s"}


def test_what_was_begun_beside_another_trial_is_not_done_again_and_is_measured_alone(card, process):
    card.used, card.pids = 40 * GIB, [77]  # the trial before
    card.taken["reserved"] = 3 * MIB
    held = process.start(**REQUEST, batch_size=4, room_bytes=2 * GIB)
    assert (held["pids"], held["bytes"]) == ((os.getpid(),), 3 * MIB)
    card.used, card.pids = MIB + CONTEXT_BYTES + 3 * MIB, [os.getpid()]  # it has gone
    again = process.start(**REQUEST, batch_size=4, used_before_bytes=MIB)
    assert again == {"pids": (os.getpid(),), "used_before_bytes": MIB, "bytes": 3 * MIB}
    result = process.run(**REQUEST, batch_size=4, keep=False)
    assert (result["outcome"], result["error"]) == ("fits", None)
    assert result["details"]["context_bytes"] == CONTEXT_BYTES
    assert result["details"]["used_before_bytes"] == MIB
    assert result["peaks"]["device_bytes"] == card.used
    assert set(result["details"]["timings"]) == {"context_s", "move_s", "steps_s", "settle_s"}


def test_no_cuda_is_started_where_another_trial_leaves_no_room(card, process):
    with pytest.raises(DeviceUnavailable, match="no room"):
        process.start(
            **REQUEST, batch_size=4, room_bytes=GIB
        )  # less than the model and what segments are rounded up by
    assert (card.used, card.pids) == (0, [])


def test_beside_a_trial_no_more_is_taken_than_it_leaves_and_alone_the_capacity(card, process):
    """Whatever moving the model takes, its average or the user's own tensors: else that trial would be short."""
    request = {**REQUEST, "capacity_bytes": 60 * GIB}
    process.start(**request, batch_size=4, room_bytes=2 * GIB)
    assert card.limits == [2 * GIB]
    process.start(**request, batch_size=4, used_before_bytes=0)
    assert card.limits == [2 * GIB, 60 * GIB]


def test_a_stranger_that_came_beside_the_trial_before_is_one_for_this_trial_too(card, process):
    card.pids = [77, 79]  # the trial before, and a stranger
    process.start(**REQUEST, batch_size=4, room_bytes=2 * GIB)
    card.pids = [os.getpid()]
    process.start(**REQUEST, batch_size=4, used_before_bytes=0)
    card.pids.append(79)
    result = process.run(**REQUEST, batch_size=4, keep=False)
    assert (result["outcome"], "(79)" in result["error"]) == ("failed", True)


def test_a_trial_that_was_started_alone_is_not_started_again(card, process):
    process.start(**REQUEST, batch_size=4)
    result = process.run(**REQUEST, batch_size=4, keep=False)
    assert (result["outcome"], result["details"]["context_bytes"], card.pids) == ("fits", CONTEXT_BYTES, [os.getpid()])
    assert set(result["details"]["timings"]) == {"context_s", "move_s", "steps_s", "settle_s"}


def test_a_context_beside_is_not_the_trials_own(card, process):
    asked = []

    def settle():
        asked.append(None)
        card.used += CONTEXT_BYTES + 5 * MIB
        card.pids.append(78)
        return {"num_contexts": 1, "pids": [78], "bytes": 5 * MIB}

    result = process.run(**REQUEST, batch_size=4, keep=False, settle=settle)
    assert (result["outcome"], result["peaks"]["device_bytes"]) == ("fits", CONTEXT_BYTES + trial.SHARED_BYTES)
    assert result["details"]["beside_bytes"] == CONTEXT_BYTES - trial.SHARED_BYTES + 5 * MIB
    assert len(asked) == 1


def test_a_stranger_beside_makes_the_trial_fail_though_a_context_was_begun_there(card, process):
    def settle():
        card.pids += [78, 79]
        return {"num_contexts": 1, "pids": [78], "bytes": 0}

    result = process.run(**REQUEST, batch_size=4, keep=False, settle=settle)
    assert (result["outcome"], "(79)" in result["error"]) == ("failed", True)


def test_a_trial_whose_first_step_fails_waits_for_the_process_beside_too(card, process):
    asked = []
    result = process.run(
        **REQUEST,
        batch_size=99,
        keep=False,
        settle=lambda: asked.append(None) or {"num_contexts": 0, "pids": [], "bytes": 0},
    )
    assert (result["outcome"], len(asked)) == ("oom", 1)


def test_a_process_that_is_kept_holds_no_optimizer(card, process, monkeypatch):
    """Neither the trial's own nor one that was begun ahead is there any more when the process is cleaned."""

    def clean(self, model):
        return not any(type(each) is trial.Training for each in gc.get_objects())

    monkeypatch.setattr(Context, "clean", clean)
    process.start(**REQUEST, batch_size=4, room_bytes=2 * GIB)
    process.start(**REQUEST, batch_size=4, used_before_bytes=0)
    first, second = (process.run(**REQUEST, batch_size=size, keep=True) for size in (4, 2))
    assert (first["warm"], second["warm"]) == (True, True)
    assert "move_s" in second["details"]["timings"]
