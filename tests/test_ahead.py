"""Work that is done before it is needed."""

import threading

import pytest

from planner.ahead import Ahead
from planner.trial_log import Stopped


def test_pieces_are_worked_in_order_while_the_caller_does_something_else():
    gate, worked = threading.Event(), []

    def piece(name):
        def work():
            assert gate.wait(20)
            worked.append(name)
            return name.upper()

        return work

    with Ahead() as ahead:
        ahead.begin({name: piece(name) for name in "abc"})
        assert ahead.has("b")
        assert not ahead.has("d")
        assert worked == []
        gate.set()
        assert [ahead.take(name) for name in "ca"] == ["C", "A"]
    assert worked == ["a", "b", "c"]


def test_what_a_piece_raises_is_raised_where_it_is_taken_and_the_next_one_is_worked():
    def fail():
        raise KeyError("x")

    with Ahead() as ahead:
        ahead.begin({1: fail, 2: lambda: 2})
        assert ahead.take(2) == 2
        for _ in range(2):
            with pytest.raises(KeyError):
                ahead.take(1)


def test_leaving_begins_no_further_piece():
    gate, begun, over = threading.Event(), threading.Event(), []

    def first():
        begun.set()
        assert gate.wait(20)

    with Ahead() as ahead:
        ahead.begin({1: first, 2: lambda: over.append(2)})
        assert begun.wait(20)
    gate.set()
    ahead.take(1)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "ahead"] or [None]
    if thread is not None:
        thread.join(20)
    assert over == []


def test_a_hint_can_be_taken_before_the_result_and_not_after_it():
    hinted, gate = threading.Event(), threading.Event()

    def work():
        ahead.hint("a", 7)
        ahead.hint("a", 8)  # the first one counts
        hinted.set()
        assert gate.wait(20)
        return "A"

    def fail():
        raise KeyError("x")

    with Ahead() as ahead:
        ahead.begin({"a": work, "b": fail, "c": lambda: "C"})
        assert hinted.wait(20)
        assert ahead.take_hint("a") == 7
        gate.set()
        assert [ahead.take(name) for name in "ac"] == ["A", "C"]
        assert [ahead.take_hint(name) for name in "abc"] == [None, None, None]


def test_whoever_is_stopped_waits_for_no_piece():
    gate, asked = threading.Event(), []

    def should_stop():
        asked.append(True)
        return len(asked) > 1

    with Ahead() as ahead:
        ahead.begin({1: lambda: gate.wait(20)})
        with pytest.raises(Stopped):
            ahead.take(1, should_stop)
        assert not gate.is_set()
        gate.set()
        assert ahead.take(1, should_stop), "what is there is taken"
