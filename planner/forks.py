"""Work in forked copies of this process: fresh processes that repay no import.

Only for a process that has no thread of its own and has not touched CUDA: threads do not survive a fork, and CUDA
refuses to work in a copy of a process that used it. No torch here.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import json
import math
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

from planner.processes import describe_exit, die_with_parent

_POLL_S = 0.2
_LEAVE_S = 10.0
"""How long a fork that was told to leave may take: CUDA gives tens of GiB back in less than one second."""
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

Work = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Of a request: its answer, as JSON data. It raises nothing: a failure is part of its answer."""


_living: set[int] = set()
"""The forks of this process."""


class Fork:
    """A forked copy of this process that answers one request after another. What it does to itself stays in it."""

    def __init__(self, pid: int, requests: int, replies: int) -> None:
        self.pid = pid
        self._requests, self._replies = requests, replies
        self._returncode: int | None = None
        self._timed_out = False
        self.leaving_s = 0.0
        """From being told to leave, or from its death, to its end: how long CUDA took to give everything back."""

    @classmethod
    def start(cls, work: Work) -> Self:
        sys.stdout.flush()
        sys.stderr.flush()
        requests, requests_write = os.pipe()
        replies, replies_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            _living.clear()
            os.close(requests_write)
            os.close(replies)
            _serve_and_leave(work, requests, replies_write)
        os.close(requests)
        os.close(replies_write)
        _living.add(pid)
        return cls(pid, requests_write, replies)

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any] | None:
        """Its answer, or ``None`` where it died or did not answer in time: it has ended, and ``ending`` says how."""
        self.send(request)
        return self.receive(timeout_s)

    def send(self, request: Mapping[str, Any]) -> None:
        """Send a request of a few KiB and return at once: several forks can work side by side. ``receive`` follows."""
        with contextlib.suppress(BrokenPipeError):  # it is gone, which reading will tell
            os.write(self._requests, json.dumps(request).encode() + b"\n")

    def receive(self, timeout_s: float = math.inf) -> dict[str, Any] | None:
        """The answer to what was sent last, as ``ask`` gives it."""
        text = self._read(time.monotonic() + timeout_s)
        if text is not None:
            answer: dict[str, Any] = json.loads(text)
            return answer
        self.end()
        return None

    def has_answered(self) -> bool:
        """Whether ``receive`` need not wait: it has answered, or died."""
        return bool(select.select([self._replies], [], [], 0)[0])

    def kill(self) -> None:
        """End it whatever it does."""
        if self._returncode is None:
            os.kill(self.pid, signal.SIGKILL)
            self.end()

    def end(self) -> None:
        """Have it leave and wait until it has; kill it where it does not. Orphans of it are killed too."""
        if self._returncode is not None:
            return
        start = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            os.write(self._requests, b"\n")
        while not self._timed_out and not self._has_ended() and time.monotonic() < start + _LEAVE_S:
            time.sleep(0.002)
        if not self._has_ended():
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        _living.discard(self.pid)
        self._returncode = os.waitstatus_to_exitcode(status)
        self.leaving_s = time.monotonic() - start
        os.close(self._requests)
        os.close(self._replies)
        end_orphans()

    @property
    def returncode(self) -> int | None:
        """``None`` while it lives; negative for a signal, as in ``subprocess``."""
        return self._returncode

    @property
    def ending(self) -> str:
        """Why there is no answer, for people."""
        assert self._returncode is not None, "it has not ended"
        return "did not finish in time and was killed" if self._timed_out else describe_exit(self._returncode)

    def _has_ended(self) -> bool:
        """Whether it has ended, without reaping it."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _read(self, deadline: float) -> bytes | None:
        """One line of its answer; ``None`` when it ends before one, or at the deadline, which is noted."""
        text = bytearray()
        waiting = select.poll()
        waiting.register(self._replies, select.POLLIN)
        while not text.endswith(b"\n"):
            wait_s = min(_POLL_S, deadline - time.monotonic())
            if wait_s <= 0:
                self._timed_out = True
                return None
            if waiting.poll(wait_s * 1000):
                chunk = os.read(self._replies, 1 << 16)
                if not chunk:
                    self._watch_it_die(deadline)
                    return None
                text += chunk
            elif self._has_ended():  # a process that the work started may hold the pipe open
                return None
        return bytes(text)

    def _watch_it_die(self, deadline: float) -> None:
        """It closed the pipe by dying, which may take a moment to show: a core dump, CUDA's teardown."""
        while not self._has_ended():
            if time.monotonic() >= deadline:
                self._timed_out = True
                return
            time.sleep(0.01)


class Latch:
    """Closed for a fork that is busy until it opens it, or dies: the kernel's lock of an open file (flock(2)). Made
    before the forks that use it, so that all have it."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - for the life of this process

    def _opened(self) -> int:
        # Anew: a lock belongs to an open file, and forks share those that they inherit.
        return os.open(f"/proc/self/fd/{self._file.fileno()}", os.O_RDWR)

    def close(self) -> int | None:
        """A descriptor that keeps it closed until every copy of it is; ``None`` where it is closed already."""
        descriptor = self._opened()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is open; whether it is."""
        deadline = time.monotonic() + timeout_s
        while (descriptor := self.close()) is None:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.002)
        os.close(descriptor)
        return True


def _serve_and_leave(work: Work, requests: int, replies: int) -> NoReturn:
    """The fork's life. It must never return into the parent's code."""
    status = 1
    try:
        die_with_parent()
        with os.fdopen(requests, "rb") as lines:
            for line in lines:
                if not line.strip():
                    break
                reply = json.dumps(work(json.loads(line))).encode() + b"\n"
                sys.stdout.flush()
                sys.stderr.flush()
                while reply:
                    reply = reply[os.write(replies, reply) :]
        status = 0
    finally:
        # Neither the parent's exit handlers nor the interpreter's teardown: CUDA and user code may hang in them.
        os._exit(status)


@contextlib.contextmanager
def shared_with_forks() -> Iterator[None]:
    """Around what this process imports and builds before it forks. The garbage collector waits meanwhile, which spares
    a tenth of the time that importing torch and transformers takes; what is left after it has run once is never looked
    at again, here or in a fork, so that its pages stay shared."""
    # By its threshold: a model that switches the collector off while it is built has it off.
    threshold, *others = gc.get_threshold()
    gc.set_threshold(0, *others)
    try:
        yield
    finally:
        if not gc.get_threshold()[0]:
            gc.set_threshold(threshold, *others)
        gc.collect()
        gc.freeze()


def adopt_orphans() -> None:
    """Have the kernel make this process the parent of what its forks leave behind (prctl(2)), to be ended with them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_orphans() -> None:
    """Kill and reap every child of this process but its forks: what one that has ended had started, whatever its
    session.

    To be called only where no child lives that was not forked here. A child's own children are adopted as it dies,
    hence the repetition.
    """
    while children := [pid for pid in _children() if pid not in _living]:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> Iterator[int]:
    """Ids of this process's children, from ``/proc/PID/stat`` (proc(5)): the parent's id is the fourth field."""
    here = str(os.getpid())
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                # The second field is a name in brackets that may hold anything.
                if (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1] == here:
                    yield int(entry.name)
