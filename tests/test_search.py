"""The search against thresholds: exact, economical, and never reporting a size that did not run."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.search import LIMIT, Search, search_max_batch
from planner.trials import Outcome, Peaks, Source, Trial

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


@given(threshold=thresholds, peaks=st.booleans(), fresh=st.booleans(), **shapes)
def test_without_a_start_it_is_exact_within_twice_a_bisection(threshold, peaks, fresh, base_share, waste):
    card = Card(threshold, base_share=base_share, waste=waste, peaks=peaks)
    result = search_max_batch(card, confirm_fresh=fresh, capacity_bytes=card.capacity)
    check_sound(result, card)
    assert result.certified == fresh
    assert len(result.trials) <= 2 * math.log2(max(threshold, 1)) + 12 + 2 * fresh


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
    assert any("did not run out of memory up to batch size 1000" in note for note in result.notes)
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


def test_fits_above_an_out_of_memory_is_noted_as_not_monotone():
    """Warm, 10 does not fit and the start 9 does; fresh, only up to 8 and, by luck of fragmentation, 10."""
    outcomes = {(9, True): [OOM], (8, True): [FITS], (10, True): [FITS], (11, True): [OOM]}
    search = Search(start=10, confirm_fresh=True)
    asked = search.ask()
    assert (asked.batch_size, asked.fresh) == (10, True)
    probe = scripted(outcomes)
    search.tell(probe(10, True))
    # What the search has no reason to ask, evidence from elsewhere may say: an out of memory below a size that fits.
    search._evidence[9] = probe(9, True)
    search._trials.append(probe(9, True))
    while (asked := search.ask()) is not None:
        search.tell(probe(asked.batch_size, asked.fresh))
    result = search.result()
    assert (result.max_batch_size, result.first_oom_batch_size) == (10, 11)
    assert any("not monotone: batch size 9 ran out of memory and 10 fitted" in note for note in result.notes)


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
