"""The search against thresholds: exact, economical, and never reporting a size that did not run."""

import math
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.search import LIMIT, Search, contradiction_note, contradictions, search_max_batch
from planner.trials import Outcome, Peaks, Source, Trial

ROOT = Path(__file__).parent.parent
GIB = 1 << 30


class Card:
    """A GPU on which allocated bytes are affine in the batch size; counts what it is asked."""

    def __init__(self, threshold, *, capacity=16 * GIB, base_share=0.1, waste=1.08, peaks=True):
        self.threshold, self.capacity, self.waste, self.with_peaks = threshold, capacity, waste, peaks
        self.base = int(capacity * base_share)
        self.slope = (capacity / waste - self.base) / (threshold + 0.5)
        self.calls = []

    def peaks(self, size):
        allocated = int(self.base + self.slope * size)
        return Peaks(
            allocated_bytes=min(allocated, self.capacity),
            reserved_bytes=min(int(allocated * self.waste), self.capacity),
        )

    def __call__(self, size, fresh):
        self.calls.append((size, fresh))
        return Trial(
            batch_size=size,
            outcome=Outcome.FITS if size <= self.threshold else Outcome.OOM,
            source=Source.MEASURED,
            peaks=self.peaks(size) if self.with_peaks else None,
            fresh_process=fresh,
        )


def check_sound(result, card):
    """What holds of every result: exact, from trials that ran, no size asked twice in the same way."""
    assert result.max_batch_size == card.threshold
    ran = {trial.batch_size: trial.outcome for trial in result.trials}
    if result.max_batch_size:
        assert ran[result.max_batch_size] is Outcome.FITS
        assert result.best.batch_size == result.max_batch_size
    if result.first_oom_batch_size is not None:
        assert result.first_oom_batch_size == result.max_batch_size + 1
        assert ran[result.first_oom_batch_size] is Outcome.OOM
    assert len(set(card.calls)) == len(card.calls)


thresholds = st.one_of(st.integers(0, 40), st.integers(0, 100_000))
shapes = {"base_share": st.floats(0.0, 0.7), "waste": st.floats(1.0, 1.3)}


def bisection_trials(threshold):
    """Of the finder that everybody has: 1, 2, 4, ... until one runs out of memory, then halving."""
    return 2 * int(math.log2(threshold)) + 2 if threshold else 1


@given(threshold=thresholds, peaks=st.booleans(), **shapes)
def test_without_a_start_it_is_exact_and_takes_no_more_trials_than_a_bisection(threshold, peaks, base_share, waste):
    card = Card(threshold, base_share=base_share, waste=waste, peaks=peaks)
    result = search_max_batch(card, capacity_bytes=card.capacity)
    check_sound(result, card)
    assert not result.certified
    assert len(result.trials) <= bisection_trials(threshold)


@given(threshold=thresholds, peaks=st.booleans(), **shapes)
def test_fresh_processes_cost_two_trials_more_at_most(threshold, peaks, base_share, waste):
    card = Card(threshold, base_share=base_share, waste=waste, peaks=peaks)
    result = search_max_batch(card, confirm_fresh=True, capacity_bytes=card.capacity)
    check_sound(result, card)
    assert result.certified
    assert len(result.trials) <= bisection_trials(threshold) + 2


def test_in_no_measured_case_it_takes_more_trials_than_a_bisection():
    """Of some 400 largest batch sizes that an H200 had, with the peaks that it showed on the way."""
    command = [sys.executable, "benchmarks/search.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    more, cases = re.search(r"without a prediction: (\d+) of (\d+) cases$", printed.strip()).groups()
    assert (int(more), int(cases) > 400) == (0, True)


@given(threshold=thresholds, noise=st.integers(0, 2**32), **shapes)
def test_peaks_that_say_nothing_cost_a_few_trials_at_most(threshold, noise, base_share, waste):
    """Two trials for each doubling that a wrong line leads to, and two in the bracket."""
    card = Card(threshold, base_share=base_share, waste=waste)
    random = Random(noise)
    card.peaks = lambda size: Peaks(allocated_bytes=random.randrange(1, GIB), reserved_bytes=random.randrange(1, GIB))
    result = search_max_batch(card, capacity_bytes=card.capacity)
    check_sound(result, card)
    assert len(result.trials) <= 2 * bisection_trials(threshold) + 8


@given(threshold=st.integers(1, 100_000), fresh=st.booleans())
def test_an_exact_start_takes_two_trials(threshold, fresh):
    card = Card(threshold)
    result = search_max_batch(card, start=threshold, confirm_fresh=fresh, capacity_bytes=card.capacity)
    check_sound(result, card)
    assert [call[0] for call in card.calls] == [threshold, threshold + 1]
    assert result.certified == fresh


@given(threshold=thresholds, start=st.integers(-5, 200_000), peaks=st.booleans(), fresh=st.booleans(), **shapes)
def test_any_start_leads_to_the_same_answer(threshold, start, peaks, fresh, base_share, waste):
    card = Card(threshold, base_share=base_share, waste=waste, peaks=peaks)
    result = search_max_batch(card, start=start, confirm_fresh=fresh, capacity_bytes=card.capacity)
    check_sound(result, card)
    assert result.certified == fresh
    assert len(result.trials) <= 2 * math.log2(max(threshold, start, 2)) + 14


@given(threshold=st.integers(20, 3000), error=st.floats(-0.03, 0.03))
def test_a_start_that_is_a_few_percent_off_costs_a_few_trials(threshold, error):
    start = round(threshold * (1 + error))
    card = Card(threshold)
    result = search_max_batch(card, start=start, capacity_bytes=card.capacity)
    check_sound(result, card)
    assert len(result.trials) <= 4 + 2 * math.log2(1 + max(abs(start - threshold), start / 100))


@given(threshold=st.integers(20, 3000), error=st.floats(0, 0.2), off=st.floats(0.97, 1.03))
def test_bytes_per_sample_lead_from_a_start_that_is_too_low_to_the_answer(threshold, error, off):
    card = Card(threshold)
    start = max(round(threshold * (1 - error)), 1)
    result = search_max_batch(
        card, start=start, capacity_bytes=card.capacity, bytes_per_sample=card.slope * off, confirm_fresh=True
    )
    check_sound(result, card)
    assert len(result.trials) <= 10
    assert [call[0] for call in card.calls][:2] == [start, start + 1]


@pytest.mark.parametrize("off_by", [-2, -1, 1, 2])
def test_a_start_off_by_a_sample_or_two_takes_at_most_four_trials(off_by):
    card = Card(50)
    check_sound(search_max_batch(card, start=50 + off_by, capacity_bytes=card.capacity), card)
    assert len(card.calls) <= 4


def test_interpolation_beats_bisection_where_memory_is_affine():
    with_peaks, without = Card(5431), Card(5431, peaks=False)
    for card in (with_peaks, without):
        check_sound(search_max_batch(card, capacity_bytes=card.capacity), card)
    assert len(with_peaks.calls) <= 9 < 20 < len(without.calls)


def test_nothing_fits():
    card = Card(0)
    result = search_max_batch(card, confirm_fresh=True)
    assert (result.max_batch_size, result.first_oom_batch_size, result.best) == (0, 1, None)
    assert result.certified
    assert len(result.trials) == 1 or {trial.batch_size for trial in result.trials} == {1}


@pytest.mark.parametrize("start", [None, 7])
def test_a_model_that_never_runs_out_stops_at_the_limit_and_says_so(start):
    card = Card(10**12)
    result = search_max_batch(card, start=start, limit=1000, capacity_bytes=card.capacity, confirm_fresh=True)
    assert (result.max_batch_size, result.first_oom_batch_size, result.certified) == (1000, None, False)
    assert max(size for size, _ in card.calls) == 1000
    assert any("did not run out of memory up to batch size 1000, where the search stops" in n for n in result.notes)
    assert len(card.calls) <= 16


def test_a_start_above_the_limit_is_brought_down_to_it():
    card = Card(50)
    assert search_max_batch(card, start=LIMIT * 4, limit=64).max_batch_size == 50
    assert max(size for size, _ in card.calls) <= 64


def scripted(outcomes):
    """A probe that plays a list of outcomes per (size, fresh), the last one for ever."""
    left = {key: list(value) for key, value in outcomes.items()}

    def probe(size, fresh):
        script = left[size, fresh]
        outcome = script.pop(0) if len(script) > 1 else script[0]
        return Trial(batch_size=size, outcome=outcome, source=Source.MEASURED, peaks=None, fresh_process=fresh)

    return probe


FITS, OOM, FAILED = Outcome.FITS, Outcome.OOM, Outcome.FAILED


def test_a_failure_is_tried_once_more_and_forgotten_if_it_was_an_accident():
    result = search_max_batch(scripted({(4, False): [FAILED, FITS], (5, False): [FAILED, OOM]}), start=4)
    assert (result.max_batch_size, result.first_oom_batch_size, result.failure) == (4, 5, None)
    assert [trial.outcome for trial in result.trials] == [FAILED, FITS, FAILED, OOM]


def test_a_failure_that_repeats_ends_the_search_without_an_answer():
    result = search_max_batch(scripted({(4, False): [FITS], (5, False): [FAILED]}), start=4)
    assert (result.max_batch_size, result.first_oom_batch_size, result.certified) == (None, None, False)
    assert result.failure is result.trials[-1]
    assert [trial.batch_size for trial in result.trials] == [4, 5, 5]
    assert any("largest batch size that fitted is 4" in note for note in result.notes)


def test_a_warm_result_that_a_fresh_process_contradicts_is_corrected_and_noted():
    """From 100 down: warm processes say 90 fits and 91 does not; fresh ones say that 91 does and 92 does not."""
    truth = {True: 91, False: 90}
    calls = []

    def probe(size, fresh):
        calls.append((size, fresh))
        outcome = FITS if size <= truth[fresh] else OOM
        return Trial(batch_size=size, outcome=outcome, source=Source.MEASURED, peaks=None, fresh_process=fresh)

    result = search_max_batch(probe, start=100, confirm_fresh=True)
    assert (result.max_batch_size, result.first_oom_batch_size, result.certified) == (91, 92, True)
    assert {(91, True), (92, True)} <= set(calls)

    truth[True] = 88
    result = search_max_batch(probe, start=100, confirm_fresh=True)
    assert (result.max_batch_size, result.first_oom_batch_size, result.certified) == (88, 89, True)
    assert any("ran out of memory in one process and fitted in another" in note for note in result.notes)


def test_a_runner_without_fresh_processes_gives_an_uncertified_answer():
    def probe(size, fresh):
        return Trial(batch_size=size, outcome=FITS if size < 9 else OOM, source=Source.MEASURED, peaks=None)

    result = search_max_batch(probe, confirm_fresh=True)
    assert (result.max_batch_size, result.first_oom_batch_size, result.certified) == (8, 9, False)


def islands(*fitting):
    """A card on which exactly these ranges of sizes fit: fragmentation."""

    def probe(size, fresh):
        fits = any(first <= size <= last for first, last in fitting)
        return Trial(
            batch_size=size, outcome=FITS if fits else OOM, source=Source.MEASURED, peaks=None, fresh_process=fresh
        )

    return probe


def test_a_size_that_fits_above_one_that_does_not_is_told_from_a_monotone_result():
    result = search_max_batch(islands((1, 40), (42, 44)), start=40, suspects=(43,), confirm_fresh=True)
    assert (result.max_batch_size, result.first_oom_batch_size, result.certified) == (44, 45, True)
    assert result.oom_below == (41,)
    note = contradiction_note(result.trials, result.oom_below)
    assert note.startswith("not monotone: batch size 41 ran out of memory and 43 fitted; train with a size that ran")
    below = search_max_batch(islands((1, 40), (42, 44)), start=44, suspects=(41,), confirm_fresh=True)
    assert (below.max_batch_size, below.oom_below) == (44, (41,))


def test_many_sizes_that_contradict_are_one_sentence_and_predicted_ones_are_said_to_be():
    sizes = range(10, 30)
    trials = [
        Trial(batch_size=size, outcome=FITS if size % 2 else OOM, source=Source.PREDICTED, peaks=None) for size in sizes
    ]
    note = contradiction_note(trials, contradictions(trials, 29))
    assert note.startswith(
        "not monotone: batch sizes 10, 12, 14, 16, 18, 20, 22, 24 and 2 more are predicted to run out"
    )
    assert "and 29 to fit" in note
    assert "ran" not in note


def test_what_is_found_out_after_the_first_trial_is_followed():
    card, search = islands((1, 40), (42, 44)), Search(start=40, confirm_fresh=True)
    search.tell(card(search.ask().batch_size, True))
    search.expect(suspects=(43,), bytes_per_sample=None)
    while (ask := search.ask()) is not None:
        search.tell(card(ask.batch_size, ask.fresh))
    assert (search.result().max_batch_size, search.result().oom_below) == (44, (41,))


def test_a_suspect_that_does_what_monotony_expects_changes_nothing():
    card = Card(40)
    result = search_max_batch(card, start=40, suspects=(38, 43), confirm_fresh=True, capacity_bytes=card.capacity)
    check_sound(result, card)
    assert (result.oom_below, result.notes, result.certified) == ((), (), True)
    assert [size for size, _ in card.calls] == [40, 41, 38, 43]


@given(st.lists(st.integers(1, 60), unique=True, max_size=8), st.integers(0, 60), st.none() | st.integers(1, 80))
def test_whatever_fits_what_is_reported_ran(holes, largest, start):
    """Sizes up to ``largest`` fit but for some holes: the answer ran, and the size above it ran out of memory."""
    fitting = set(range(1, largest + 1)) - set(holes)
    result = search_max_batch(
        islands(*((size, size) for size in fitting)), start=start, suspects=holes, confirm_fresh=True
    )
    outcomes = {trial.batch_size: trial.outcome for trial in result.trials}
    assert result.certified
    assert result.max_batch_size == 0 or result.max_batch_size in fitting
    assert outcomes.get(result.max_batch_size) is (FITS if result.max_batch_size else None)
    assert outcomes[result.first_oom_batch_size] is OOM
    assert result.first_oom_batch_size == result.max_batch_size + 1
    assert all(outcomes[size] is OOM and size < result.max_batch_size for size in result.oom_below)


@given(threshold=st.integers(0, 3000), multiple=st.integers(1, 64), start=st.none() | st.integers(-5, 4000))
def test_only_multiples_are_asked_for_and_the_pair_is_one_multiple_apart(threshold, multiple, start):
    card = Card(threshold)
    result = search_max_batch(card, start=start, multiple_of=multiple, confirm_fresh=True, capacity_bytes=card.capacity)
    assert all(size % multiple == 0 for size, _ in card.calls)
    assert result.max_batch_size == threshold // multiple * multiple
    assert result.first_oom_batch_size == result.max_batch_size + multiple
    assert result.certified
    assert len(result.trials) <= bisection_trials(threshold // multiple) + 2 or start is not None


@given(threshold=st.integers(0, 300), limit=st.integers(8, 200), start=st.none() | st.integers(1, 400))
def test_a_limit_ends_the_search_without_a_certificate(threshold, limit, start):
    card = Card(threshold)
    result = search_max_batch(
        card, start=start, limit=limit, multiple_of=8, confirm_fresh=True, capacity_bytes=card.capacity
    )
    assert all(size <= limit for size, _ in card.calls)
    assert result.max_batch_size == min(threshold, limit) // 8 * 8
    assert result.certified == (result.max_batch_size + 8 <= limit)
    assert any("not certified as the largest" in note for note in result.notes) != result.certified


def test_the_limit_has_a_name_where_somebody_chose_it():
    search = Search(limit=32, limit_name="search.max_batch_size", start=54, confirm_fresh=True)
    card = Card(54)
    while (asked := search.ask()) is not None:
        search.tell(card(asked.batch_size, asked.fresh))
    assert [size for size, _ in card.calls] == [32]
    assert search.result().notes == (
        "did not run out of memory up to batch size 32, where the search stops (search.max_batch_size): not certified "
        "as the largest",
    )
    with pytest.raises(ValueError, match="no multiple of 8"):
        Search(limit=7, multiple_of=8)


@given(threshold=st.integers(0, 5000), start=st.none() | st.integers(1, 5000), fresh=st.booleans())
def test_the_estimate_of_what_is_left_is_an_upper_bound(threshold, start, fresh):
    card, asked = Card(threshold), []
    result = search_max_batch(
        card, start=start, confirm_fresh=fresh, capacity_bytes=card.capacity, observer=asked.append
    )
    for index, ask in enumerate(asked):
        assert (ask.remaining_trials is None) == (ask.high is None and ask.low < LIMIT)
        if ask.remaining_trials is not None:
            assert ask.low < ask.batch_size <= ask.high or ask.batch_size == ask.low
            assert ask.remaining_trials >= len(result.trials) - index


def test_asking_twice_asks_the_same_and_only_answers_are_accepted():
    search = Search(start=3)
    assert search.ask() is search.ask()
    with pytest.raises(ValueError, match="was not asked"):
        search.tell(Card(9)(4, False))
