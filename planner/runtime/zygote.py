"""A preloaded process that forks the processes of trials: fresh ones, and one that is kept warm between trials.

It has imported torch and the modelling library and built the model on the CPU, and has never touched CUDA. Which model
and which trial is the business of the functions that it is given; no torch here.

Beside a trial the process of the next one may be forked, to start CUDA while the model of this one is moved. It then
waits, and has allocated nothing, until the trial has gone and its own comes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from planner.forks import Fork, Latch, adopt_orphans, shared_with_forks
from planner.processes import InternalError, answer, serve

Build = Callable[[str], Any]
"""Of a packed spec: whatever the trials need, ready in memory."""
Start = Callable[..., Mapping[str, Any]]
"""Of what was built and the request's own fields: starts CUDA. ``listed_bytes`` are what the driver lists for this
process, ``None`` where it does not; ``used_before_bytes`` were in use on the device before."""
RunTrial = Callable[..., Mapping[str, Any]]
"""Of what was built and the request's own fields: the trial's result as JSON data. Its ``warm``, taken out again, says
whether the process is as good as new for the next trial of the same variant."""
START_S = 30.0
"""For CUDA's start: 0.1 to 0.5 s, more on a machine of eight GPUs."""


SETTLE_S = 15.0
"""For which a trial waits for that beside it: longer than it was ever seen to take, shorter than a trial's timeout."""


@dataclass(frozen=True, slots=True)
class _Next:
    """A process that was begun for the next trial: it has started CUDA."""

    fork: Fork
    kind: Any
    """Of the trials that it can run."""
    listed_bytes: int
    used_before_bytes: int
    """On the device, without any process of ours."""


class Zygote:
    """The handlers of the process: ``open`` once, then ``trial`` as often as wanted, ``rest`` when enough is known."""

    def __init__(self, build: Build, start: Start, run_trial: RunTrial) -> None:
        self._build = build
        self._start = start
        self._run_trial = run_trial
        self._built: Any = None
        self._warm: Fork | None = None
        self._warm_for: Any = None
        self._warm_holds: dict[str, Any] = _NOTHING
        self._next: _Next | None = None
        self._begins_next = True
        self._latch = Latch()

    def open(self, *, spec: str) -> Mapping[str, Any]:
        adopt_orphans()
        with shared_with_forks():
            self._built = self._build(spec)
        return {}

    def trial(self, *, timeout_s: float, fresh: bool, begins_next: bool, **request: Any) -> Mapping[str, Any]:
        """One trial in a fork: its result, or ``{"raised": ...}`` with the ``PlannerError`` that it raised.

        ``fresh`` asks for a new process, which ends with the trial; otherwise the warm one is used, or the new one
        kept. ``begins_next``, of a fresh one: another trial will follow, and the GPU has room for one more context.
        ``holds`` is what ``rest`` would return. A fork that dies, hangs or has a defect is the result
        ``{"outcome": "failed", "error": ...}``.
        """
        kind = (request["variant"], request["capacity_bytes"])
        if fresh or self._warm_for != kind:
            self._end_warm()
        if self._warm is not None or (self._next and self._next.kind != _started_for(request)):
            self._end_next()
        begun, self._next = self._next, None
        fork = self._warm or (begun.fork if begun else Fork.start(lambda message: self._in_fork(message, [])))
        is_new, self._warm = self._warm is None, None
        following: Fork | None = None
        try:
            deadline = time.monotonic() + timeout_s
            reply: dict[str, Any] | None = {"ok": {}}
            if begun or begins_next:
                # First: what a context takes cannot be told beside another one that starts.
                used_before_bytes = begun and begun.used_before_bytes
                reply = fork.ask({"do": "start", **request, "used_before_bytes": used_before_bytes}, timeout_s)
            started = reply["ok"] if reply and "ok" in reply else None
            if started is not None:
                if begins_next and self._begins_next and started["listed_bytes"] is not None:
                    following = self._begun(request)
                beside = following and following.pid
                fork.send({"do": "trial", **request, "keep": not fresh, "beside": beside})
                reply = fork.receive(deadline - time.monotonic())
            result = _result(fork, reply)
            if result.pop("warm", False):
                self._warm, self._warm_for = fork, kind
                held = result.pop("held")
                self._warm_holds = {"pids": [fork.pid, *held["pids"]], "bytes": held["bytes"]}
            else:
                fork.end()
            is_sound = result.get("outcome") in ("fits", "oom")
            if following is not None and started is not None and is_sound:
                self._next = _started(following, request, started)
            # The one may have harmed the other: a trial that failed is run once more alone.
            self._begins_next = following is None or is_sound
        finally:
            for process in (fork, following):
                if process and process is not self._warm and not (self._next and process is self._next.fork):
                    process.kill()
        details = result.setdefault("details", {})
        details.setdefault("timings", {})["leaving_s"] = round(fork.leaving_s, 4)
        if begun:
            details["started_ahead"] = True
        return {"fresh_process": is_new, "holds": self._holds(), **result}

    def _begun(self, request: Mapping[str, Any]) -> Fork | None:
        """A process that starts CUDA; ``None`` where there can be no more processes."""
        closed = self._latch.close()
        if closed is None:
            return None
        copies = [closed]
        try:
            fork = Fork.start(lambda message: self._in_fork(message, copies))
        except OSError:
            return None
        finally:
            os.close(closed)  # the fork has its own copy
        fork.send({"do": "start", **request, "used_before_bytes": None})
        return fork

    def rest(self, *, next_too: bool) -> Mapping[str, Any]:
        """End the warm process, and that of the next trial, which gives the GPU back. Returns the ``pids`` of processes
        that still hold some of it, and the ``bytes``."""
        self._end_warm()
        if next_too:
            self._end_next()
        return self._holds()

    def _holds(self) -> dict[str, Any]:
        if self._warm is not None:
            return self._warm_holds
        return {"pids": [self._next.fork.pid], "bytes": self._next.listed_bytes} if self._next else _NOTHING

    def _end_warm(self) -> None:
        if self._warm is not None:
            self._warm.end()
            self._warm = None

    def _end_next(self) -> None:
        if self._next is not None:
            self._next.fork.end()
            self._next = None

    def _in_fork(self, message: dict[str, Any], closed: list[int]) -> Mapping[str, Any]:
        """``closed`` keeps the latch closed until CUDA has started here."""

        def start(**request: Any) -> Mapping[str, Any]:
            try:
                return self._start(self._built, **request)
            finally:
                while closed:
                    os.close(closed.pop())

        def trial(**request: Any) -> Mapping[str, Any]:
            return self._run_trial(self._built, settle=lambda: self._latch.wait(SETTLE_S), **request)

        return answer({"start": start, "trial": trial}, message)

    def serve(self) -> None:
        """Answer the parent until it goes. Never returns."""
        serve({"open": self.open, "trial": self.trial, "rest": self.rest})


_NOTHING: dict[str, Any] = {"pids": [], "bytes": 0}


def _started(fork: Fork, request: Mapping[str, Any], before: Mapping[str, Any]) -> _Next | None:
    """The process that was begun beside a trial, whose own start gave ``before``; ``None`` where it failed to start, or
    where another process came to the GPU together with it: then the next trial begins anew."""
    reply = fork.receive(START_S)
    if not reply or "ok" not in reply or reply["ok"]["listed_bytes"] is None:
        return None
    return _Next(fork, _started_for(request), reply["ok"]["listed_bytes"], before["used_before_bytes"])


def _started_for(request: Mapping[str, Any]) -> Any:
    """Equal for trials that one process which has started CUDA can run: its allocator has read its settings."""
    return request["variant"].get("allocator"), list(request["gpu_uuids"])


def _result(fork: Fork, reply: dict[str, Any] | None) -> dict[str, Any]:
    if reply is None:
        return {"outcome": "failed", "error": f"the trial's process {fork.ending}"}
    if "ok" in reply:
        body: dict[str, Any] = reply["ok"]
        return body
    error = reply["error"]
    if error["code"] == InternalError.code:
        return {"outcome": "failed", "error": error["message"], "details": {"trace": error["trace"]}}
    return {"raised": error}
