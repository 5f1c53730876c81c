"""The bound on predictions that a web process runs at the same time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
from planner_api.problems import TimedOut, TooBusy
from planner_api.service import Predictions

from planner.errors import ModelError


def predictions(*, concurrency: int = 1, queue: int = 0, timeout_s: float = 10.0) -> Predictions:
    return Predictions(concurrency=concurrency, queue=queue, timeout_s=timeout_s)


def test_an_answer_and_an_error_come_back() -> None:
    def fail(_: Callable[[], bool]) -> int:
        raise ModelError("it raised")

    pool = predictions()
    assert asyncio.run(pool.run(lambda should_stop: 7)) == 7
    with pytest.raises(ModelError, match="it raised"):
        asyncio.run(pool.run(fail))
    assert asyncio.run(pool.run(lambda should_stop: 8)) == 8, "its place was not given back"


def test_beyond_the_queue_it_is_busy_at_once() -> None:
    pool, go = predictions(concurrency=1, queue=1), threading.Event()

    async def ask() -> None:
        waiting = [asyncio.create_task(pool.run(lambda should_stop: go.wait(10))) for _ in range(2)]
        await asyncio.sleep(0.05)
        started = time.monotonic()
        with pytest.raises(TooBusy):
            await pool.run(lambda should_stop: True)
        assert time.monotonic() - started < 1
        go.set()
        assert await asyncio.gather(*waiting) == [True, True]

    asyncio.run(ask())


def test_no_more_run_at_once_than_allowed() -> None:
    pool, running, most = predictions(concurrency=2, queue=8), [0], [0]
    lock = threading.Lock()

    def work(_: Callable[[], bool]) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.03)
        with lock:
            running[0] -= 1

    async def ask() -> None:
        await asyncio.gather(*(pool.run(work) for _ in range(8)))

    asyncio.run(ask())
    assert most == [2]


def test_one_that_takes_too_long_is_told_to_stop_and_keeps_its_place_until_it_has() -> None:
    pool, told, go = predictions(timeout_s=0.1), threading.Event(), threading.Event()

    def work(should_stop: Callable[[], bool]) -> None:
        while not should_stop():
            time.sleep(0.01)
        told.set()
        assert go.wait(10)

    async def ask() -> None:
        with pytest.raises(TimedOut):
            await pool.run(work)
        assert await asyncio.to_thread(told.wait, 5)
        with pytest.raises(TooBusy):
            await pool.run(lambda should_stop: None)
        go.set()
        for _ in range(200):
            try:
                return await pool.run(lambda should_stop: None)
            except TooBusy:
                await asyncio.sleep(0.01)
        pytest.fail("the place was never given back")

    asyncio.run(ask())
