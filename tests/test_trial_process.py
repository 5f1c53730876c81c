"""A trial's process on the CPU: its steps are real, the GPU's counters are not."""

import gc
import os
from dataclasses import dataclass, field

import pytest
import torch

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
LISTED_BYTES = CONTEXT_BYTES - 9 * MIB


@dataclass
class FakeCard:
    """A card whose bytes are what the test says."""

    used: int = 0
    pids: list[int] = field(default_factory=list)
    listed: int = LISTED_BYTES
    """What the driver lists for this process."""
    limits: list[int] = field(default_factory=list)
    """Of the caching allocator, in the order in which they were set."""

    def used_bytes(self):
        return self.used

    def free_bytes(self):
        return 80 * GIB - self.used

    def compute_processes(self):
        return list(self.pids)

    def process_bytes(self):
        return {pid: self.listed if pid == os.getpid() else None for pid in self.pids}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def card(monkeypatch):
    """The counters of a GPU on which nothing but the context takes memory."""
    card = FakeCard()

    def start(capacity_bytes, opened, device_index=0, join=None):
        assert opened is card
        before, others = card.used, card.compute_processes()
        card.used += CONTEXT_BYTES
        card.pids.append(os.getpid())
        device = torch.device("cpu")
        return Context(device, CONTEXT_BYTES, 0, before, {}, (os.getpid(),), tuple(others), card.listed)

    monkeypatch.setattr(trial.Card, "open", lambda uuid: card)
    monkeypatch.setattr(trial.Context, "start", start)
    for name, value in {
        "memory_stats": lambda device: {"reserved_bytes.all.allocated": 7, "allocated_bytes.all.current": 5},
        "memory_reserved": lambda device: 0,
        "memory_allocated": lambda device: 0,
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
    return card


@pytest.fixture
def process():
    spec = parse_spec(SPEC)
    return TrialProcess(spec, build_model(spec))


START = {"variant": VARIANT, "capacity_bytes": GIB, "gpu_uuid": "GPU-1"}
REQUEST = START | {"accumulation_steps": 1}


def test_a_trial_alone(card, process):
    result = process.run(**REQUEST, batch_size=4, keep=False)
    assert (result["outcome"], len(result["step_times_s"])) == ("fits", 3)
    assert result["peaks"]["device_bytes"] == CONTEXT_BYTES
    assert result["details"]["context_bytes"] == CONTEXT_BYTES
    assert set(result["details"]["timings"]) == {"context_s", "move_s", "steps_s"}


def test_what_was_started_beside_another_trial_is_measured_when_that_has_gone(card, process):
    card.used, card.pids = 40 * GIB, [77]  # the trial before
    started = process.start(**START, used_before_bytes=None)
    assert started["listed_bytes"] == LISTED_BYTES
    card.used, card.pids = MIB + CONTEXT_BYTES, [os.getpid()]  # it has gone
    assert process.start(**{**START, "capacity_bytes": 2 * GIB}, used_before_bytes=MIB)["used_before_bytes"] == MIB
    card.pids.append(79)  # somebody else
    result = process.run(**REQUEST, batch_size=4, keep=False)
    assert (result["details"]["context_bytes"], result["details"]["used_before_bytes"]) == (CONTEXT_BYTES, MIB)
    assert card.limits == [2 * GIB]
    assert (result["outcome"], "(79)" in result["error"]) == ("failed", True)


def test_what_a_process_beside_takes_is_not_the_trials_own(card, process):
    process.start(**START, used_before_bytes=None)

    def settle():
        card.used += 600 * MIB
        card.pids.append(78)
        card.listed += 100 * MIB  # the trial's own
        return True

    result = process.run(**REQUEST, batch_size=4, keep=False, beside=78, settle=settle)
    assert (result["outcome"], result["peaks"]["device_bytes"]) == ("fits", CONTEXT_BYTES + 100 * MIB)
    assert set(result["details"]["timings"]) == {"context_s", "move_s", "settle_s", "steps_s"}


def test_a_stranger_beside_makes_the_trial_fail_though_a_process_of_ours_was_begun(card, process):
    result = process.run(
        **REQUEST, batch_size=4, keep=False, beside=78, settle=lambda: card.pids.extend([78, 79]) or True
    )
    assert (result["outcome"], "(79)" in result["error"]) == ("failed", True)


def test_no_step_is_taken_beside_a_process_that_does_not_settle(card, process):
    result = process.run(**REQUEST, batch_size=4, keep=False, beside=78, settle=lambda: False)
    assert (result["outcome"], result["step_times_s"]) == ("failed", [])
    assert "begun beside this one" in result["error"]


@pytest.mark.parametrize(
    ("most", "skipped", "steps", "outcome"),
    [(1e9, 0, 3, "fits"), (20_000.0, 2, 4, "fits"), (5_000.0, 4, 6, "fits"), (1e-5, 24, 24, "failed")],
)
def test_a_trial_goes_on_until_the_optimizers_state_was_there(card, most, skipped, steps, outcome):
    """A scaler that begins with 65,536 skips the updates of steps whose gradients overflow: on an H200 an LSTM with a
    CTC loss in fp16-amp updated its weights in the third step first (``steps`` of lstm-projected in
    measurements/h200/unseen-5.json.gz)."""
    model = {"source": "python", "target": "tests.runtime_cpu_model:Overflowing", "args": {"most": most}}
    spec = parse_spec(SPEC | {"model": model})
    request = REQUEST | {"variant": VARIANT | {"precision": "fp16-amp"}}
    result = TrialProcess(spec, build_model(spec)).run(**request, batch_size=4, keep=False)
    assert (result["outcome"], result["details"]["num_steps"]) == (outcome, steps)
    assert result["details"].get("num_skipped_updates", 0) == skipped
    assert ("gradients overflowed in each of 24 steps" in (result["error"] or "")) == (outcome == "failed")


def test_a_process_that_is_kept_holds_no_optimizer(card, process, monkeypatch):
    """The trial's own is not there any more when the process is cleaned."""

    others = _trainings()

    def clean(self, model):
        return all(any(each is other for other in others) for each in _trainings())

    monkeypatch.setattr(Context, "clean", clean)
    first, second = (process.run(**REQUEST, batch_size=size, keep=True) for size in (4, 2))
    assert (first["warm"], second["warm"]) == (True, True)
    assert "move_s" in second["details"]["timings"]


def _trainings():
    """Those that are alive; other tests of this process may have left some."""
    return [each for each in gc.get_objects() if type(each) is trial.Training]
