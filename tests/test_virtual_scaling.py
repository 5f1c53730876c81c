"""Which sizes are traced, and what happens where a trace is not what smaller ones foretold."""

from __future__ import annotations

from collections.abc import Iterable

from planner.virtual.scaling import TraceFamily
from planner.virtual.trace import Trace


class _Model:
    """A step whose memory is affine in the batch size up to ``turn``, and takes one more block above it."""

    def __init__(self, turn: int = 1 << 30) -> None:
        self.turn = turn
        self.traced: list[int] = []
        self.started: list[int] = []

    def trace(self, batch_size: int) -> Trace:
        self.traced.append(batch_size)
        trace = Trace()
        trace.allocate(1000 + 10 * batch_size, "activation")
        if batch_size > self.turn:
            trace.allocate(77, "workspace")
        return trace

    def start(self, batch_sizes: Iterable[int]) -> None:
        self.started += batch_sizes

    def family(self) -> TraceFamily:
        return TraceFamily(self.trace, self.start)


def test_a_search_takes_three_traces() -> None:
    model = _Model()
    family = model.family()
    for size in (8, 16, 100, 54, 55, 3, 4):
        assert list(family.scaled(size).events.sizes) == [1000 + 10 * size]
    assert (model.started, model.traced) == ([2, 5], [2, 5])
    assert family.checked(54).exact
    assert not family.checked(55).exact
    assert model.traced == [2, 5, 54]


def test_what_is_foretold_is_replayed_beside_the_trace_that_checks_it() -> None:
    model = _Model()
    family = model.family()
    family.scaled(8)
    seen: list[tuple[list[int], list[int], list[int]]] = []
    for size in (54, 55):
        family.checked(
            size, lambda foretold: seen.append(([*foretold.events.sizes], [*model.started], [*model.traced]))
        )
    assert seen == [([1540], [2, 5, 54], [2, 5])], "once, with the trace begun and not waited for"


def test_a_check_speaks_for_sizes_near_it_and_below() -> None:
    model = _Model(turn=70)
    family = model.family()
    family.scaled(8)
    family.checked(54)
    for size in (62, 3, 30):
        assert not family.checked(size).exact
    assert model.traced == [2, 5, 54]
    assert family.checked(71).surprising, "far above it another kernel is found out"
    assert model.traced == [2, 5, 54, 71]


def test_a_check_of_a_large_size_speaks_for_an_eighth_more() -> None:
    model = _Model()
    family = model.family()
    family.scaled(8)
    family.checked(800)
    assert [family.checked(size).exact for size in (900, 901)] == [False, True]


def test_one_question_takes_one_trace() -> None:
    model = _Model()
    assert model.family().checked(54).exact
    assert model.traced == [54]


def test_a_single_sample_is_always_traced() -> None:
    model = _Model()
    family = model.family()
    family.scaled(8)
    family.checked(8)
    assert family.checked(1).exact
    assert model.traced == [2, 5, 8, 1]


def test_a_trace_that_is_not_as_foretold_is_used() -> None:
    model = _Model(turn=50)
    family = model.family()
    assert list(family.scaled(54).events.sizes) == [1540]
    found = family.checked(54)
    assert (found.surprising, found.exact, list(found.events.sizes)) == (True, True, [1540, 77])
    # The next one is not taken on trust either; then the two larger ones foretell the third.
    assert family.checked(55).surprising
    assert not family.checked(56).surprising
    assert list(family.checked(57).events.sizes) == [1570, 77]
    assert model.traced == [2, 5, 54, 55, 56]


def test_a_check_says_nothing_of_sizes_between_two_traces_of_different_paths() -> None:
    """A step that branches on the batch size: a check far above the turn is none of what was foretold from below."""
    model = _Model(turn=12)
    family = model.family()
    family.scaled(8)
    assert family.checked(1000).surprising
    assert family.checked(999).surprising, "foretold from below the turn"
    assert not family.checked(500).surprising
    assert len(family.checked(400).events.sizes) == 2
    for size in (300, 20, 13):
        assert family.checked(size).exact
        assert len(family.checked(size).events.sizes) == 2
    assert not family.checked(4).exact
