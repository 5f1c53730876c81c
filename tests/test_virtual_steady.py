"""The third training step is a copy of the second where that is what it would be, and is run where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from planner.virtual.steady import repeat_last_step
from planner.virtual.trace import Formula, Trace
from tests.virtual_child import Process


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with Process() as process:
        yield process


def _two_steps(*, second_left: int) -> Trace:
    """Weights; then steps that free the last gradient, take a workspace and leave a gradient of their own."""
    trace = Trace()
    trace.mark("move")
    trace.allocate(100, "weight")
    trace.mark("step 1")
    gradient = trace.allocate(100, "gradient")
    trace.allocate(200, "state")
    trace.mark("step 2")
    trace.free(gradient)
    workspace = trace.allocate(Formula(int, (64,)), "workspace")
    trace.convolutions[workspace] = 7
    trace.allocate(second_left, "gradient")
    trace.free(workspace)
    return trace


def test_a_step_that_leaves_what_it_found_is_copied() -> None:
    trace = _two_steps(second_left=100)
    assert trace.events == [0, 1, 2, ~1, 3, 4, ~3]
    assert repeat_last_step(trace)
    assert trace.events == [0, 1, 2, ~1, 3, 4, ~3, ~4, 5, 6, ~5]
    assert trace.sizes[5:] == [64, 100]
    assert trace.operators[5:] == ["workspace", "gradient"]
    assert (trace.formulas[5], trace.convolutions[5]) == (trace.formulas[3], 7)
    assert trace.marks == [(0, "move"), (1, "step 1"), (3, "step 2"), (7, "step 3")]
    assert repeat_last_step(trace)
    assert trace.events[11:] == [~6, 7, 8, ~7]


def test_a_step_that_leaves_something_else_is_not_copied() -> None:
    trace = _two_steps(second_left=101)
    events = list(trace.events)
    assert not repeat_last_step(trace)
    assert trace.events == events


TOKENS = {"kind": "tokens", "sequence_length": 12}
TINY = {
    "source": "transformers",
    "model_type": "gpt2",
    "task": "causal-lm",
    "config": {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 101},
}


@pytest.mark.parametrize(
    "optimizer", ["adamw", "sgd", "sgd-momentum", "adafactor", "rmsprop", "radam", "nadam", "adagrad", "asgd"]
)
def test_the_third_step_is_the_second_again_with_every_optimizer(process: Process, optimizer: str) -> None:
    spec = {"model": TINY, "data": TOKENS, "train": {"optimizer": optimizer}}
    found = process.do("copied_and_run", spec=spec, variant={"precision": "bf16-amp"}, batch_size=2)
    assert found == {"copied": [True], "same": True}


@pytest.mark.parametrize(("precision", "checkpointing"), [("fp16-amp", "none"), ("bf16", "full"), ("fp32", "full")])
def test_the_third_step_is_the_second_again(process: Process, precision: str, checkpointing: str) -> None:
    spec = {"model": TINY, "data": TOKENS}
    variant = {"precision": precision, "checkpointing": checkpointing}
    found: dict[str, Any] = process.do("copied_and_run", spec=spec, variant=variant, batch_size=2)
    assert found == {"copied": [True], "same": True}


LABELS = {"shape": [], "dtype": "int64", "high": 4}


def test_a_step_of_the_users_own_is_always_run(process: Process) -> None:
    data = {"kind": "tensors", "inputs": {"features": {"shape": [8], "dtype": "float32"}, "labels": LABELS}}
    model = {"source": "python", "target": "tests.virtual_models:Classifier"}
    spec = {"model": model, "data": data, "train": {"step": "tests.virtual_models:logging_step"}}
    found = process.do("copied_and_run", spec=spec, variant={}, batch_size=2)
    assert found == {"copied": [], "same": True}
