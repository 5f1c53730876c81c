"""Child processes that answer JSON lines and can be killed: user models and CUDA run only inside one.

The parent writes one request per line on the child's standard input, ``{"do": "trial", "batch_size": 4}``, and reads
one reply per line from a pipe of its own, ``{"ok": {...}}`` or ``{"error": PlannerError.as_dict()}``. Standard output
and standard error belong to the user's code: a thread drains both into a short tail, the evidence of a death.

The parent side is ``Child``, the child side ``serve``. Neither imports torch. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from planner.errors import PlannerError, described, error_from_dict

TAIL_BYTES = 32 * 1024
"""How much of a child's output is kept: enough for a long traceback."""
_POLL_S = 0.2
_REPLY_FD = "PLANNER_REPLY_FD"
_BOOTSTRAP = """\
import json, runpy, sys
sys.path[:], module = json.loads(sys.argv.pop())
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# The kernel sends the death signal when the *thread* that started the child ends (prctl(2)), so all children are
# started by one thread that lives as long as the process.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner-spawn")


def _new_spawner() -> None:
    global _spawner
    _spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner-spawn")


os.register_at_fork(after_in_child=_new_spawner)


class ChildError(PlannerError):
    """A child process did not answer as agreed. ``tail`` is the end of what it printed."""

    code: ClassVar[str] = "child_error"

    def __init__(
        self, message: str, *, tail: str = "", field: str | None = None, suggestion: str | None = None
    ) -> None:
        super().__init__(message, field=field, suggestion=suggestion)
        self.tail = tail


class ChildDied(ChildError):
    """It ended before it answered. ``returncode`` is negative for a signal, as in ``subprocess``."""

    code: ClassVar[str] = "child_died"
    returncode: int = 0


class ChildTimeout(ChildError):
    """It did not answer in time and was killed."""

    code: ClassVar[str] = "child_timeout"


class ChildGarbled(ChildError):
    """It answered something that is not a reply and was killed."""

    code: ClassVar[str] = "child_garbled"


class InternalError(ChildError):
    """A handler raised something that the planner did not expect: a defect. Its traceback is in ``__notes__``."""

    code: ClassVar[str] = "internal"


def describe_exit(returncode: int) -> str:
    """``-11`` -> ``"was killed by SIGSEGV"``; ``3`` -> ``"ended with exit status 3"``."""
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"


class Child:
    """A child process in a session of its own. A context manager: leaving it kills the whole process group."""

    def __init__(self, process: subprocess.Popen[bytes], replies: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self._replies = replies
        self._buffer = bytearray()
        self._outgoing = b""
        self._tail = bytearray()
        os.set_blocking(replies, False)
        os.set_blocking(process.stdin.fileno(), False)
        self._drain = threading.Thread(target=self._drain_output, name=f"drain-{process.pid}", daemon=True)
        self._drain.start()

    @classmethod
    def start(cls, module: str, *, env: Mapping[str, str] | None = None, import_cwd: bool = False) -> Self:
        """Run ``python -m module``, which must call ``serve``.

        The child imports from where this process does; the current folder is importable only with ``import_cwd``.
        ``env`` is laid over this process's environment.
        """
        path = [entry for entry in sys.path if entry]
        if import_cwd:
            path.insert(0, str(Path.cwd()))
        replies, replies_write = os.pipe()
        try:
            process = _spawner.submit(
                subprocess.Popen[bytes],
                [sys.executable, "-P", "-c", _BOOTSTRAP, json.dumps([path, module])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                pass_fds=(replies_write,),
                env={**os.environ, **(env or {}), _REPLY_FD: str(replies_write)},
                start_new_session=True,
            ).result()
        except BaseException:
            os.close(replies)
            raise
        finally:
            os.close(replies_write)
        return cls(process, replies)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.returncode is None and not self._has_exited()

    def tail(self) -> str:
        """The end of what the child and its own children printed."""
        return self._tail.decode(errors="replace")

    def request(self, message: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send one request and wait for its reply's ``ok``.

        Raises the ``PlannerError`` that the child answered with, ``ChildDied``, or, after killing the child,
        ``ChildTimeout`` or ``ChildGarbled``. An interrupted wait (Ctrl-C) kills the child too: its late reply would be
        taken for the answer to the next request.
        """
        self.send(message)
        return self.receive(timeout_s)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one request and return at once, so that the child works beside the caller; ``receive`` must follow."""
        self._outgoing = json.dumps(message).encode() + b"\n"
        if self._replies >= 0:
            self._write_some()

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The reply to what was sent last; raises as ``request`` does."""
        try:
            line = self._exchange(time.monotonic() + timeout_s)
        except BaseException:
            self.kill()
            raise
        if line is None:
            self.kill()
            raise ChildTimeout(f"did not answer within {timeout_s:g} s and was killed", tail=self.tail())
        return self._unwrap(line)

    def kill(self) -> None:
        """End the whole process group and wait for it. May be called twice."""
        if self.process.returncode is None:
            # Before the child is reaped: until then its id cannot name a stranger's group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self._drain.join(timeout=1.0)  # a grandchild that left the group may hold the pipe open
        if self._replies >= 0:
            os.close(self._replies)
            self._replies = -1
            assert self.process.stdin is not None
            self.process.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _drain_output(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            while chunk := output.read(1 << 16):
                self._tail += chunk
                del self._tail[:-TAIL_BYTES]

    def _has_exited(self) -> bool:
        """Whether the child has ended, without reaping it."""
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # reaped by someone else's wait
            return True

    def _died(self) -> ChildDied:
        self.kill()
        code = self.process.returncode
        error = ChildDied(f"the process {describe_exit(code)} before it answered", tail=self.tail())
        error.returncode = code
        return error

    def _write_some(self) -> None:
        """As much of the request as the pipe takes now. A child that has died is found out by reading."""
        assert self.process.stdin is not None
        try:
            self._outgoing = self._outgoing[os.write(self.process.stdin.fileno(), self._outgoing) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._outgoing = b""

    def _exchange(self, deadline: float) -> bytes | None:
        """Write what is left of the request while watching for a reply; one reply line, or ``None`` at the deadline."""
        if self._replies < 0:
            raise self._died()
        assert self.process.stdin is not None
        requests = self.process.stdin.fileno()
        while True:
            if b"\n" in self._buffer:
                line, _, rest = bytes(self._buffer).partition(b"\n")
                self._buffer[:] = rest
                return line
            wait_s = min(_POLL_S, deadline - time.monotonic())
            if wait_s <= 0:
                return None
            # poll, not select: a busy service has descriptors above 1024.
            waiting = select.poll()
            waiting.register(self._replies, select.POLLIN)
            if self._outgoing:
                waiting.register(requests, select.POLLOUT)
            ready = [fd for fd, _ in waiting.poll(wait_s * 1000)]
            if self._replies in ready:
                chunk = os.read(self._replies, 1 << 20)
                if not chunk:
                    raise self._died()
                self._buffer += chunk
            elif requests in ready:
                self._write_some()
            elif self._has_exited():  # a grandchild may hold the reply pipe open
                raise self._died()

    def _unwrap(self, line: bytes) -> dict[str, Any]:
        try:
            reply = json.loads(line)
            kind, body = next(iter(reply.items()))
            if kind not in ("ok", "error") or not isinstance(body, dict):
                raise ValueError(kind)
        except (ValueError, AttributeError, StopIteration):
            self.kill()
            start = line[:80].decode(errors="replace")
            raise ChildGarbled(f"answered {start!r}, which is no reply, and was killed", tail=self.tail()) from None
        if kind == "ok":
            return body
        error = error_from_dict(body)
        if isinstance(error, ChildError):
            error.tail = self.tail()
        if body.get("trace"):
            error.add_note("In the child process:\n" + str(body["trace"]))
        raise error


def kill_all(children: dict[str, Child]) -> None:
    """Kill every child of ``children`` and leave it empty."""
    while children:
        children.popitem()[1].kill()


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even while a handler is busy (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(handlers: Mapping[str, Callable[..., Mapping[str, Any]]]) -> None:
    """The child's side: answer requests until standard input ends, then end this process. Never returns.

    ``{"do": NAME, ...}`` calls ``handlers[NAME](**rest)``. A ``PlannerError`` becomes the error reply; anything else is
    answered as ``internal`` with its traceback. User code finds an empty standard input.
    """
    die_with_parent()
    faulthandler.enable()
    replies = int(os.environ.pop(_REPLY_FD))
    os.set_inheritable(replies, False)
    requests = os.dup(0)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    with os.fdopen(requests, "rb") as lines:
        for line in lines:
            reply = json.dumps(answer(handlers, json.loads(line))).encode() + b"\n"
            while reply:
                reply = reply[os.write(replies, reply) :]
    os._exit(0)


def _trace() -> str:
    """The traceback of what was just caught, its end where a message in it is huge."""
    return traceback.format_exc()[-TAIL_BYTES:]


def answer(handlers: Mapping[str, Callable[..., Mapping[str, Any]]], message: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request: what the handler returned as ``ok``, or its error."""
    try:
        body = dict(handlers[message.pop("do")](**message))
        json.dumps(body)  # what cannot be sent is this handler's error
        return {"ok": body}
    except PlannerError as error:
        return {"error": {**error.as_dict(), "trace": _trace()}}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a defect or the user's sys.exit() must reach the parent
        return {"error": {"code": InternalError.code, "message": described(error), "trace": _trace()}}
