"""The fastest size, the knee, and how a global batch size is reached."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.choices import accumulation_details
from planner.throughput import MAX_TIMED, Accumulation, accumulations, fastest, knee, next_to_time, speeds
from planner.trials import Outcome, Source
from tests.planning_fakes import make_trial


def timed(rates):
    """Trials by ``{batch size: samples per second}``."""
    return [make_trial(size, step_times_s=(9.0, size / rate, size / rate)) for size, rate in rates.items()]


def test_speeds_are_those_of_what_ran_and_was_measured():
    trials = [
        *timed({8: 100.0, 4: 90.0}),
        *timed({8: 110.0}),
        make_trial(16, Outcome.OOM, step_times_s=(0.1, 0.1)),
        make_trial(2, step_times_s=()),
        make_trial(6, source=Source.PREDICTED, step_times_s=(0.1,)),
    ]
    found = speeds(trials)
    assert [(speed.batch_size, round(speed.samples_per_second)) for speed in found] == [(4, 90), (8, 110)]
    assert fastest(found).batch_size == 8
    assert fastest(found).as_dict()["source"] == "measured"
    assert (fastest([]), knee([])) == (None, None)


def test_a_step_of_several_micro_batches_counts_all_their_samples():
    trial = make_trial(8, step_times_s=(1.0, 0.5), details={"samples_per_step": 32})
    assert speeds([trial])[0].samples_per_second == 64
    assert (trial.seconds_per_sample, trial.samples_per_second) == (0.5 / 32, 64)
    assert replace(trial, source=Source.PREDICTED).samples_per_second is None


def test_the_knee_is_the_smallest_size_that_is_nearly_as_fast():
    found = speeds(timed({4: 50.0, 8: 94.0, 16: 96.0, 32: 100.0, 64: 99.0}))
    assert (knee(found).batch_size, fastest(found).batch_size) == (16, 32)


@pytest.mark.parametrize(
    ("rates", "largest", "multiple_of", "wanted"),
    [
        ({54: 100.0}, 54, 1, 24),
        ({54: 100.0, 24: 99.0}, 54, 1, 14),
        ({54: 100.0, 24: 80.0}, 54, 1, 40),
        ({54: 100.0, 32: 99.0}, 54, 1, 14),  # 32 of the search stands in for half
        ({54: 100.0, 24: 99.0, 14: 80.0}, 54, 1, None),
        ({48: 100.0}, 48, 8, 24),
        ({12: 100.0}, 12, 12, None),
        ({2: 100.0}, 2, 1, 1),
        ({1: 100.0}, 1, 1, None),
        ({24: 100.0}, 54, 1, None),  # the largest was not timed: nothing to compare with
    ],
)
def test_sizes_are_timed_towards_the_knee(rates, largest, multiple_of, wanted):
    assert next_to_time(speeds(timed(rates)), largest, multiple_of) == wanted


@given(st.integers(1, 5000), st.integers(1, 64), st.randoms(use_true_random=False))
def test_a_few_trials_are_enough_and_all_are_below_the_largest(units, multiple, random):
    largest = units * multiple
    rates = {largest: random.uniform(1, 100)}
    for _ in range(MAX_TIMED + 1):
        size = next_to_time(speeds(timed(rates)), largest, multiple)
        if size is None:
            break
        assert 0 < size < largest
        assert size % multiple == 0
        assert size not in rates
        rates[size] = random.uniform(1, 100)
    assert size is None
    assert len(rates) <= MAX_TIMED + 1


def test_a_global_batch_size_is_reached_exactly():
    assert [way.micro_batch_size for way in accumulations(512, 54)] == [32, 16, 8, 4, 2, 1]
    assert [way.micro_batch_size for way in accumulations(512, 54, multiple_of=8)] == [32, 16, 8]
    assert [way.micro_batch_size for way in accumulations(500, 54, multiple_of=8)] == []
    assert next((way.micro_batch_size, way.accumulation_steps) for way in accumulations(40, 54)) == (40, 1)
    assert [way.micro_batch_size for way in accumulations(512, 54, gpus=3)] == []
    assert [way.micro_batch_size for way in accumulations(512, 54, steps=16)] == [32]
    assert [way.micro_batch_size for way in accumulations(512, 54, steps=3)] == []


def test_a_way_over_several_gpus_counts_the_samples_of_all():
    way = Accumulation(micro_batch_size=8, accumulation_steps=16, gpus=4)
    trial = make_trial(8, step_times_s=(1.0, 0.5), details={"samples_per_step": 8 * 4 * 4})
    answer = accumulation_details(512, [(way, trial)])
    assert (answer["gpus"], answer["timed_accumulation_steps"], answer["samples_per_second"]) == (4, 4, 256.0)


@given(st.integers(1, 3000), st.integers(0, 500), st.integers(1, 8), st.integers(1, 16))
def test_whatever_is_asked_the_product_is_exact_and_nothing_is_left_out(target, largest, gpus, multiple):
    found = list(accumulations(target, largest, gpus=gpus, multiple_of=multiple))
    assert all(way.global_batch_size == target for way in found)
    assert {way.micro_batch_size for way in found} == {
        size for size in range(1, largest + 1) if target % (size * gpus) == 0 and size % multiple == 0
    }
    assert found == sorted(found, key=lambda way: -way.micro_batch_size)
