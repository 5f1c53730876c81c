"""Leaks and thrashing, told from what trials recorded."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.endurance import (
    GROWING_STEPS,
    growing_steps,
    leak_of,
    needs_comparison,
    thrashing,
    wants_another_step,
)
from planner.trials import Outcome, Peaks
from planner.units import GIB, MIB
from tests.planning_fakes import make_trial

PROBES = Path(__file__).parent.parent / "measurements/h200/probe"


def trial(size=8, *allocated, step_s=None, **changes):
    details = {"allocated_after_step_bytes": list(allocated)}
    times = () if step_s is None else (1.0, step_s, step_s)
    return make_trial(size, details=details, step_times_s=times, **changes)


def test_bytes_that_grow_with_every_step_are_a_leak():
    peaks = Peaks(allocated_bytes=10 * GIB, reserved_bytes=11 * GIB)
    leak = leak_of(trial(8, 5 * GIB, *(5 * GIB + step * 12 * MIB for step in (1, 2, 3)), peaks=peaks), 16 * GIB)
    assert (leak.batch_size, leak.bytes_per_step, leak.steps_left) == (8, 12 * MIB, 512)
    assert leak.sentence() == (
        "a leak: at batch size 8 every step leaves 12.0 MiB more allocated, so that memory runs out after about 512 "
        "more steps; nothing is certified"
    )


@pytest.mark.parametrize(
    "allocated",
    [
        (),
        (5, 5, 5),
        (5, 9, 9),  # the gradient scaler skipped the first step, so the optimizer's state came with the second
        (5, 5, 9),
        (5, 6, 7, 7),
        (9, 8, 7, 6),
        (5, 6, 7, 6, 7, 8),
    ],
)
def test_what_settles_is_no_leak(allocated):
    assert leak_of(trial(8, *allocated), 16 * GIB) is None


def test_cycles_that_grow_in_every_other_step_are_named():
    def kept(*steps):
        allocated = [GIB + MIB * step for step in steps]
        return make_trial(8, details={"allocated_after_step_bytes": allocated, "in_cycles": True})

    leak = leak_of(kept(0, 1, 1, 2, 2, 3), 16 * GIB)
    assert (leak.in_cycles, leak.bytes_per_step) == (True, 2 * MIB // 4)
    assert "until Python's garbage collector runs" in leak.sentence()
    assert leak_of(kept(0, 1, 1, 1), 16 * GIB) is None


def test_a_leak_that_no_run_lives_to_see_is_none():
    """A loss that is kept at every step is 512 bytes."""
    growing = trial(8, GIB, GIB + 512, GIB + 1024, GIB + 1536, peaks=Peaks(allocated_bytes=GIB, reserved_bytes=GIB))
    assert leak_of(growing, 16 * GIB) is None
    assert leak_of(growing, GIB + 100 * MIB).steps_left == 100 * MIB // 512


def test_a_trial_that_ran_out_of_memory_is_no_evidence_of_a_leak():
    assert leak_of(trial(8, 1, 2, 3, 4, outcome=Outcome.OOM), GIB) is None


@given(st.lists(st.integers(0, 10), min_size=3, max_size=3), st.lists(st.integers(0, 10), min_size=20, max_size=20))
def test_a_trial_goes_on_only_until_it_can_tell(first, later):
    allocated, more = list(first), iter(later)
    while wants_another_step(allocated):
        allocated.append(next(more))
    assert growing_steps(allocated) == 0 or growing_steps(allocated) >= GROWING_STEPS
    assert len(allocated) <= 3 + GROWING_STEPS


LATER = json.loads((Path(__file__).parents[1] / "measurements/h200/later_steps.json").read_text())["cases"]
"""Eight steps of each case, as an H200 ran them."""


@pytest.mark.parametrize("case", LATER, ids=lambda case: f"{case['case']}-{case['batch_size']}")
def test_a_trial_ends_when_later_steps_bring_nothing_new(case):
    steps = case["steps"]
    taken = 0  # a trial ends before the eighth step or sees what ended the run
    while wants_another_step(
        [step["allocated_bytes"] for step in steps[:taken]],
        [step["segments_taken"] for step in steps[:taken]],
        [9.0 * (index > 0) for index in range(taken)],
    ):
        taken += 1
        if taken == case["oom_in_step"]:
            return
    assert case["oom_in_step"] is None
    last, later = steps[taken - 1], steps[taken:]
    for name in ("peak_reserved_bytes", "segments_taken", "num_alloc_retries", "peak_allocated_bytes"):
        assert {step[name] for step in later} <= {last[name]}


def test_how_many_steps_the_measured_cases_take():
    expected = {"gpt2-s1024-9": 3, "gpt2-s1024-20": 2, "t5-base-s512-16": 4, "resnet50-224-372": 5}
    expected["swin-t-torchvision-233"] = 4
    for case in LATER:
        name = f"{case['case']}-{case['batch_size']}"
        if name in expected:
            allocated = [step["allocated_bytes"] for step in case["steps"]]
            segments = [step["segments_taken"] for step in case["steps"]]
            taken = next(
                (
                    n
                    for n in range(1, len(allocated) + 1)
                    if not wants_another_step(allocated[:n], segments[:n], [9.0] * n)
                ),
                case["oom_in_step"],
            )
            assert (name, taken) == (name, expected[name])


def test_a_short_step_is_timed_twice():
    assert wants_another_step([5, 5], [9, 9], [3.0, 0.2])
    assert not wants_another_step([5, 5], [9, 9], [3.0, 1.2])
    assert not wants_another_step([5, 5, 5], [9, 9, 9], [3.0, 0.2, 0.2])


def test_a_step_with_the_optimizers_state_is_waited_for():
    assert wants_another_step([5] * 3, [9] * 3, skipped=[True, True, False]), "state came with the third step"
    assert not wants_another_step([5] * 3, [9] * 3, skipped=[True, False, True])
    assert not wants_another_step([5] * 3, [9] * 3, skipped=[False, True, True])
    assert wants_another_step([5] * 3, [9] * 3, skipped=[True] * 3)
    assert wants_another_step([5] * 23, [9] * 23, skipped=[True] * 23)
    assert not wants_another_step([5] * 24, [9] * 24, skipped=[True] * 24)


def measured(name):
    """The trials of a plan that was measured on an H200, by batch size."""
    (plan,) = json.loads((PROBES / f"{name}.json").read_text())["plans"][:1]
    kept = ("batch_size", "num_alloc_retries", "details")
    trials = [
        make_trial(
            outcome=Outcome(trial["outcome"]), step_times_s=tuple(trial["step_times_s"]),
            peaks=Peaks(allocated_bytes=trial["peak_allocated_bytes"], reserved_bytes=trial["peak_reserved_bytes"]),
            **{key: trial[key] for key in kept},
        )
        for trial in plan["trials"]
    ]  # fmt: skip
    return {trial.batch_size: trial for trial in trials}


def test_the_unet_that_was_measured_on_an_h200_thrashes_at_its_largest_size():
    """bf16-amp under 16 GiB: 79 retries, all in the first step, at 74 samples and above; at 73 one step was fast and
    the later ones were not."""
    trials = measured("unet-256-16")
    found = {size: thrashing(trial, trials.values()) for size, trial in trials.items() if trial.fits}
    assert {size for size, entry in found.items() if entry} == {73, 74, 76, 77}
    assert found[77].compared_with == 72
    assert found[77].sentence() == (
        "batch size 77 fits but thrashes: it takes 2.5 times as long a sample as 72, with 79 allocation retries"
    )
    assert needs_comparison(trials[77])
    assert not needs_comparison(trials[40])


def test_the_leak_that_was_measured_on_an_h200():
    trials = measured("leaking-4")
    for size in (24, 48, 98, 100):
        assert leak_of(trials[size], 4 * GIB).bytes_per_step == 12 * MIB
    sound = measured("gpt2-global-512-40")
    assert not any(leak_of(trial, 38 * GIB) for trial in sound.values())


@pytest.mark.parametrize(
    ("retries", "per_sample_s", "thrashes"),
    [
        (10, 0.97, False),  # convnext-tiny fp32 on an h200: 10 retries and no slower
        (1, 1.05, False),
        (44, 1.23, True),  # the U-Net in fp32
        (0, 1.4, False),
        (0, 1.6, True),
    ],
)
def test_retries_thrash_where_they_cost_time(retries, per_sample_s, thrashes):
    large = trial(10, step_s=10 * per_sample_s, num_alloc_retries=retries)
    assert (thrashing(large, [trial(4, step_s=4.0)]) is not None) == thrashes


def test_only_a_smaller_size_that_was_timed_can_tell():
    large = trial(10, step_s=100.0, num_alloc_retries=3)
    others = [trial(12, step_s=12.0), trial(4), trial(5, step_s=5.0, outcome=Outcome.OOM), large]
    assert thrashing(large, others) is None
    assert thrashing(trial(10, outcome=Outcome.OOM), [trial(4, step_s=4.0)]) is None
