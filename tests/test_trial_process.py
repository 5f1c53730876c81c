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


@dataclass
class FakeCard:
    """A card whose bytes are what the test says."""

    used: int = 0
    pids: list[int] = field(default_factory=list)

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
    """The counters of a GPU on which nothing but the context takes memory."""
    card = FakeCard()

    def start(capacity_bytes, opened, device_index=0, join=None):
        assert opened is card
        before, others = card.used, card.compute_processes()
        card.used += CONTEXT_BYTES
        card.pids.append(os.getpid())
        return Context(torch.device("cpu"), CONTEXT_BYTES, 0, before, {}, (os.getpid(),), tuple(others))

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
    monkeypatch.setattr(context.torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
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
    assert set(result["details"]["timings"]) == {"context_s", "move_s", "steps_s"}


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
