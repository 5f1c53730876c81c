"""Ctrl-C and SIGTERM end a sweep in order: what is finished stays, and the user is told."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

_REPEAT_S = 1.0
"""Within this time a second signal is the same wish (``make``, a terminal and a supervisor may each send one)."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end. Not an ``Exception``: no handler of failures may take it for one."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum
        """As shells count: 130 for Ctrl-C, 143 for SIGTERM."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise ``Interrupted`` in the main thread; a second one, later, ends the process at once.

    Ending at once is safe: every trial and plan was committed to the store on its own, and children die with us.
    """
    first_s: float | None = None

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal first_s
        if first_s is None:
            first_s = time.monotonic()
            raise Interrupted(signum)
        if time.monotonic() - first_s > _REPEAT_S:
            os._exit(128 + signum)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
