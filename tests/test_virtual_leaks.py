"""What each step leaves allocated on the virtual GPU: the same every time, but for a model that keeps something."""

from pathlib import Path

import pytest

from planner.endurance import leak_of
from planner.gpus import find_gpu
from planner.specs.document import load_spec, parse_spec
from planner.units import GIB, MIB
from planner.virtual.device import VirtualDevice

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 1000, "use_cache": False}
SOUND = {
    "model": {"source": "transformers", "model_type": "gpt2", "task": "causal-lm", "config": TINY},
    "data": {"kind": "tokens", "sequence_length": 64},
    "train": {
        "optimizer": "adamw", "accumulation_steps": 2, "clip_grad_norm": 1.0, "ema": True, "evaluation": True,
    },
    "variants": {"precision": ["fp16-amp"], "checkpointing": ["full"]},
}  # fmt: skip


def predicted(spec):
    device = VirtualDevice(find_gpu("h200"), 4 * GIB)
    with device.open(spec, spec.variants.product()[0]) as runner:
        return runner.run(8, fresh=True)


def test_a_model_that_keeps_something_is_predicted_to_leak_what_it_was_measured_to(monkeypatch):
    """12 MiB a step on an H200 (measurements/h200/probe/leaking-4.json)."""
    monkeypatch.chdir(EXAMPLES)
    leak = leak_of(predicted(load_spec(EXAMPLES / "leaking.yaml")), 4 * GIB)
    assert leak is not None
    assert (leak.bytes_per_step, leak.source, leak.in_cycles) == (12 * MIB, "predicted", False)


CYCLES = """
import gc
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1024, 1024)
        gc.disable()  # when it runs by itself depends on all else that is there

    def forward(self, x):
        kept = {"x": x + 1}
        kept["self"] = kept
        return {"loss": self.linear(x).sum()}
"""


def test_reference_cycles_are_told_from_a_leak(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cyclic_net.py").write_text(CYCLES)
    data = {"kind": "tensors", "inputs": {"x": {"shape": [1024], "dtype": "float32"}}}
    trial = predicted(parse_spec({"model": {"source": "python", "target": "cyclic_net:Net"}, "data": data}))
    leak = leak_of(trial, 4 * GIB)
    assert leak is not None
    assert (leak.in_cycles, leak.bytes_per_step) == (True, 8 * 1024 * 4)
    assert leak.sentence().startswith(
        "memory in reference cycles, predicted: at batch size 8 every step leaves 32768 B"
    )


@pytest.mark.parametrize("train", [SOUND["train"], {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}])
def test_a_sound_training_step_leaves_the_same_each_time(train):
    trial = predicted(parse_spec({**SOUND, "train": train}))
    left = trial.details["allocated_after_step_bytes"]
    assert len(left) >= 3
    assert len(set(left)) == 1
    assert 0 < left[0] < trial.peaks.allocated_bytes
    assert leak_of(trial, 4 * GIB) is None
