"""What every route of one service shares: the store, the settings, and the threads that predict."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Protocol, TypeVar

from fastapi import Depends, Request

from planner.store import Store
from planner_api.metrics import Metrics
from planner_api.problems import TimedOut, TooBusy
from planner_api.settings import Settings

T = TypeVar("T")


class Dispatcher(Protocol):
    """The worker that the service runs in its own process, if it runs one; a started ``threading.Thread`` is one."""

    def is_alive(self) -> bool: ...


class Predictions:
    """A bounded number of threads for predictions, and a bounded queue in front of them.

    A thread pool of its own: a prediction takes seconds, and the framework's pool serves every other route. One that
    passes its time limit is told to stop and keeps its place until it has, so the bound holds.
    """

    def __init__(self, *, concurrency: int, queue: int, timeout_s: float) -> None:
        self._pool = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="preflight")
        self._places = threading.Semaphore(concurrency + queue)
        self._timeout_s = timeout_s

    async def run(self, work: Callable[[Callable[[], bool]], T]) -> T:
        """``work(should_stop)`` in a thread. Raises ``TooBusy`` at once when no place is free, ``TimedOut`` later."""
        if not self._places.acquire(blocking=False):
            raise TooBusy("as many predictions as this service takes are already waiting; try again in a few seconds")
        stop = threading.Event()
        future = self._pool.submit(work, stop.is_set)
        future.add_done_callback(lambda _: self._places.release())
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._timeout_s)
        except TimeoutError as error:
            raise TimedOut(f"the prediction took longer than {self._timeout_s:g} s; submit a job instead") from error
        finally:
            stop.set()  # also when the client has gone

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    store: Store
    settings: Settings
    metrics: Metrics
    predictions: Predictions
    dispatcher: Dispatcher | None = None
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the service shuts down: open event streams end."""


def get_service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


ServiceDep = Annotated[Service, Depends(get_service)]
