"""Running one piece of work in a forked copy of this process: a fresh process that repays no import.

Only for a process that has no thread of its own and has not touched CUDA: threads do not survive a fork, and CUDA
refuses to work in a copy of a process that used it. No torch here.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from planner.processes import describe_exit, die_with_parent

_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Forked:
    """How a forked process ended."""

    reply: dict[str, Any] | None
    """What the work returned; ``None`` when the process ended without returning."""
    returncode: int
    """Negative for a signal, as in ``subprocess``."""
    timed_out: bool = False
    leaving_s: float = 0.0
    """From its answer, or its death, to the end of its process: how long CUDA took to give everything back."""

    @property
    def description(self) -> str:
        """Why there is no reply, for people."""
        return "did not finish in time and was killed" if self.timed_out else describe_exit(self.returncode)


def run_forked(work: Callable[[], Mapping[str, Any]], timeout_s: float) -> Forked:
    """Run ``work`` in a fork and wait for the JSON data that it returns. What it does to itself stays in the fork.

    ``work`` raises nothing: what it has to say about a failure is part of its answer. After ``timeout_s`` the fork is
    killed. Nothing of it is left when this returns.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _work_and_leave(work, writing)
    os.close(writing)
    try:
        text, timed_out = _read(pid, reading, time.monotonic() + timeout_s)
        answered = time.monotonic()
        if text.endswith(b"\n"):
            _let_it_leave(pid)
    finally:
        os.close(reading)
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    return Forked(
        reply=json.loads(text) if text.endswith(b"\n") else None,
        returncode=os.waitstatus_to_exitcode(status),
        timed_out=timed_out,
        leaving_s=time.monotonic() - answered,
    )


def _work_and_leave(work: Callable[[], Mapping[str, Any]], writing: int) -> None:
    """The fork's life. It must never return into the parent's code."""
    status = 1
    try:
        die_with_parent()
        reply = json.dumps(work()).encode() + b"\n"
        sys.stdout.flush()
        sys.stderr.flush()
        while reply:
            reply = reply[os.write(writing, reply) :]
        status = 0
    finally:
        # Neither the parent's exit handlers nor the interpreter's teardown: CUDA and user code may hang in them.
        os._exit(status)


def _read(pid: int, reading: int, deadline: float) -> tuple[bytes, bool]:
    """All that the fork wrote, up to the line's end, its death or the deadline; and whether it was the deadline."""
    text = bytearray()
    waiting = select.poll()
    waiting.register(reading, select.POLLIN)
    while not text.endswith(b"\n"):
        wait_s = min(_POLL_S, deadline - time.monotonic())
        if wait_s <= 0:
            return bytes(text), True
        if waiting.poll(wait_s * 1000):
            chunk = os.read(reading, 1 << 16)
            if not chunk:
                break
            text += chunk
        elif os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break  # a process that the work started may hold the pipe open
    if not text.endswith(b"\n"):
        # It closed the pipe by dying, which may take a moment to show: a core dump, CUDA's teardown.
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() >= deadline:
                return bytes(text), True
            time.sleep(0.01)
    return bytes(text), False


def _let_it_leave(pid: int, within_s: float = 10.0) -> None:
    """Wait for a fork that has answered: its GPU memory is free only once it has ended."""
    deadline = time.monotonic() + within_s
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.monotonic() < deadline:
        time.sleep(0.002)
