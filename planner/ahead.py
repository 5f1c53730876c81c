"""Work that is done before it is needed, one piece after another, beside what the caller does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from planner.trial_log import Stopped

_POLL_S = 0.2

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class Ahead(Generic[Key, Result]):
    """Works the pieces that it is given in their order, in a thread of its own. Leaving it begins no further piece."""

    def __init__(self) -> None:
        self._futures: dict[Key, Future[Result]] = {}
        self._hints: dict[Key, Future[int | None]] = {}
        self.is_over = False

    def begin(self, pieces: Mapping[Key, Callable[[], Result]]) -> None:
        """To be called once."""
        self._futures = {key: Future() for key in pieces}
        self._hints = {key: Future() for key in pieces}
        # A daemon: whoever interrupts the caller must not wait for the piece that is worked on.
        threading.Thread(target=self._work, args=(dict(pieces),), name="ahead", daemon=True).start()

    def has(self, key: Key) -> bool:
        return key in self._futures

    def take(self, key: Key, should_stop: Callable[[], bool] = lambda: False) -> Result:
        """Wait for a piece's result. Raises what the piece raised, and ``Stopped`` once ``should_stop`` says so."""
        _wait(self._futures[key], should_stop)
        return self._futures[key].result()

    def hint(self, key: Key, value: int) -> None:
        """For a piece that is being worked on: the figure that its result will most likely have."""
        if not self._hints[key].done():
            self._hints[key].set_result(value)

    def take_hint(self, key: Key, should_stop: Callable[[], bool] = lambda: False) -> int | None:
        """Wait for the hint of a piece; ``None`` where its result is there, which says more. Raises ``Stopped`` as
        ``take`` does."""
        _wait(self._hints[key], should_stop)
        value = self._hints[key].result()
        return None if self._futures[key].done() else value

    def _work(self, pieces: Mapping[Key, Callable[[], Result]]) -> None:
        for key, work in pieces.items():
            if self.is_over:
                return
            try:
                self._futures[key].set_result(work())
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever takes the result
                self._futures[key].set_exception(error)
            if not self._hints[key].done():
                self._hints[key].set_result(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_over = True


def _wait(future: Future[Any], should_stop: Callable[[], bool]) -> None:
    while not wait([future], timeout=_POLL_S).done:
        if should_stop():
            raise Stopped
