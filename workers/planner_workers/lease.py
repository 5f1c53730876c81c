"""A claim kept alive: heartbeats in a thread of their own while the job runs."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

import structlog

from planner.errors import Conflict, StoreError
from planner.jobs import Claim
from planner.store import Store

_log = structlog.get_logger(__name__)


class Lease:
    """Renews ``claim`` at a third of ``lease_s`` for as long as the context is open, and learns of cancellation."""

    def __init__(self, store: Store, claim: Claim, *, lease_s: float) -> None:
        self._store = store
        self._claim = claim
        self._lease_s = lease_s
        self._renewed = time.monotonic()
        self._closed = threading.Event()
        self._cancelled = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease-{claim.job.id}", daemon=True)

    @property
    def cancel_requested(self) -> bool:
        return self._cancelled.is_set()

    @property
    def is_lost(self) -> bool:
        """Another worker may have the job: nothing more may be written under this claim."""
        return self._lost.is_set()

    @property
    def is_over(self) -> bool:
        return self.cancel_requested or self.is_lost

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._closed.set()
        self._thread.join()

    def renew(self) -> None:
        """One heartbeat now. Raises nothing: a claim that is void, or was silent for ``lease_s``, is lost."""
        if self.is_lost:
            return
        try:
            if self._store.heartbeat(self._claim, self._lease_s):
                self._cancelled.set()
            self._renewed = time.monotonic()
        except Conflict:
            self._lost.set()
        except StoreError as error:
            _log.warning("the claim was not renewed", job=self._claim.job.id, error=str(error))
            if time.monotonic() - self._renewed >= self._lease_s:
                self._lost.set()

    def _beat(self) -> None:
        while not self.is_lost and not self._closed.wait(self._lease_s / 3):
            self.renew()
