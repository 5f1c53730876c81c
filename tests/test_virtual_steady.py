"""The third training step is a copy of the second where that is what it would be, and is run where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.allocator import AllocatorConfig, replay
from planner.endurance import wants_another_step
from planner.units import GIB, MIB
from planner.virtual.scaling import Scaled, events_of
from planner.virtual.steady import repeat_last_step, successors_of_last_step, until_steady
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


def _steps(num_steps: int, tensors: list[tuple[int, int]]) -> Trace:
    """Steps of tensors, each of a size and a lifetime in allocations; one that outlives its step dies in the next."""
    trace = Trace()
    deaths: dict[int, list[int]] = {}
    for step in range(num_steps):
        trace.mark(f"step {step + 1}")
        for number, (size, lifetime) in enumerate(tensors):
            now = step * len(tensors) + number
            deaths.setdefault(now + min(lifetime, len(tensors) - 1), []).append(trace.allocate(size, f"{number}"))
            for block in deaths.get(now, ()):
                trace.free(block)
    return trace


SIZES = st.integers(1, 60).map(lambda number: number * MIB)
TENSORS = st.lists(st.tuples(SIZES, st.integers(0, 12)), min_size=1, max_size=12)


@given(TENSORS, st.integers(3, 6), st.one_of(st.none(), st.integers(60, 400)))
def test_a_replay_that_goes_on_does_what_a_trace_of_more_steps_does(
    tensors: list[tuple[int, int]], num_steps: int, capacity_mib: int | None
) -> None:
    trace = _steps(2, tensors)
    trace.successors = successors_of_last_step(trace)
    assert trace.successors is not None
    capacity = None if capacity_mib is None else capacity_mib * MIB
    cycled = replay(
        events_of(trace, trace.sizes),
        capacity_bytes=capacity,
        goes_on=lambda allocated, taken: len(allocated) == len(taken) < num_steps,
    )
    while len(trace.steps) < num_steps:
        assert repeat_last_step(trace)
    unrolled = replay(events_of(trace, trace.sizes), capacity_bytes=capacity)
    for name in ("peak_allocated_bytes", "peak_reserved_bytes", "num_alloc_retries", "fits", "num_steps"):
        assert getattr(cycled, name) == getattr(unrolled, name)


def test_a_size_that_fits_for_three_steps_and_not_for_six_does_not_fit() -> None:
    """A trial on a GPU would take the others too: in each the driver gives more."""
    tensors = [(44, 3), (53, 0), (22, 4), (40, 3), (39, 4), (31, 1)]
    trace = _steps(3, [(size * MIB, lifetime) for size, lifetime in tensors])
    trace.successors = successors_of_last_step(trace)
    scaled = Scaled(events_of(trace, trace.sizes), trace, True, ())
    three = replay(scaled.events, capacity_bytes=226 * MIB)
    assert (three.fits, three.peak_reserved_bytes, three.num_steps) == (True, 226 * MIB, 3)
    limited = replay(scaled.events, capacity_bytes=226 * MIB, goes_on=wants_another_step)
    assert (limited.fits, limited.num_steps) == (False, 5)
    free = replay(scaled.events, goes_on=wants_another_step)
    assert free.peak_reserved_bytes == 280 * MIB
    steady, fits = until_steady(scaled, AllocatorConfig(), 226 * MIB, GIB)
    assert not fits
    assert len(steady.events.steps) == free.num_steps > 3
    assert replay(steady.events).peak_reserved_bytes == 280 * MIB


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
