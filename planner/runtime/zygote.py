"""A preloaded process that forks the processes of trials: fresh ones, and one that is kept warm between trials.

It has imported torch and the modelling library and built the model on the CPU, and has never touched CUDA. Which model
and which trial is the business of the functions that it is given; no torch here.

Beside a trial that leaves room for it the process of the next one is forked, starts CUDA and moves the model
(``ahead``). Whatever it was begun for and did not come is ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from planner.forks import Fork, Gate, adopt_orphans
from planner.processes import InternalError, answer, serve

Build = Callable[[Mapping[str, Any]], Any]
"""Of a spec document: whatever the trials need, ready in memory."""
Stage = Callable[..., Mapping[str, Any]]
"""Of what was built and the request's own fields: JSON data."""
START_S = 60.0
"""For a process to start CUDA beside a trial and move the model: half a second for one of some GiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """What a fork does, in this order."""

    start: Stage
    """Start CUDA: ``pids`` by which the driver lists this process, and ``used_before_bytes`` on the GPU without it.
    With ``room_bytes``, what another trial leaves, move the model too: ``bytes``, what the allocator has then reserved.
    Once that trial has gone, again, with its ``used_before_bytes``: measure what could not be told beside it."""
    run: Stage
    """The trial, with all that was not done before. It calls ``settle``, once its first step has ended, to wait for the
    process that is started beside it: ``num_contexts`` (0 or 1), its ``pids`` and ``bytes``. The result's ``warm``,
    taken out again, says whether the process is as good as new for the next trial of the same variant, its ``held``
    what such a one holds."""


@dataclass(slots=True)
class _Process:
    """A fork of a trial to come, or of one that may have another."""

    fork: Fork
    gate: Gate
    kind: Hashable
    """Of the trials that it can run."""
    held: dict[str, Any] = field(default_factory=lambda: {"pids": [], "bytes": 0})
    """On the GPU: ``pids``, all ids that it goes by, and ``bytes``."""
    is_ahead: bool = False

    def hold(self, *, pids: Sequence[int], bytes: int) -> None:
        self.held = {"pids": [self.fork.pid, *(pid for pid in pids if pid != self.fork.pid)], "bytes": bytes}

    def end(self) -> None:
        self.fork.end()
        self.gate.close()


class Zygote:
    """The handlers of the process: ``open`` once, then ``ready`` and ``trial`` as often as wanted, ``rest`` when enough
    is known."""

    def __init__(self, build: Build, stages: Stages) -> None:
        self._build = build
        self._stages = stages
        self._built: Any = None
        self._warm: _Process | None = None
        self._ahead: _Process | None = None
        self._used_before_bytes: int | None = None
        """On the GPU before the last trial's process; ``None`` where that did not tell."""

    def open(self, *, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        adopt_orphans()
        self._built = self._build(spec)
        return {}

    def ready(self, *, fresh: bool, **request: Any) -> Mapping[str, Any]:
        """End all processes but the one that can run this trial, where there is one. Returns the ``pids`` and ``bytes``
        that it holds on the GPU."""
        if self._warm is not None and (fresh or self._warm.kind != _kind(request)):
            self._warm.end()
            self._warm = None
        fits = self._warm is None and self._used_before_bytes is not None
        if self._ahead is not None and not (fits and self._ahead.kind == _kind(request)):
            self._ahead.end()
            self._ahead = None
        process = self._warm or self._ahead
        return {"pids": [], "bytes": 0} if process is None else process.held

    def trial(
        self, *, timeout_s: float, fresh: bool, ahead: Mapping[str, Any] | None, **request: Any
    ) -> Mapping[str, Any]:
        """One trial in a fork: its result, or ``{"raised": ...}`` with the ``PlannerError`` that it raised.

        ``fresh`` asks for a new process, which ends with the trial; otherwise the warm one is used, or the new one
        kept. ``ahead``: the ``variant`` of the trial that most likely comes next, whose process is begun beside this
        one, and the ``room_bytes`` for its model. A fork that dies, hangs or has a defect is the result
        ``{"outcome": "failed", "error": ...}``.
        """
        deadline = time.monotonic() + timeout_s
        self.ready(fresh=fresh, **request)
        process = self._warm or self._ahead or self._new(_kind(request))
        is_new, self._warm, self._ahead = self._warm is None, None, None
        fork = process.fork
        reply: dict[str, Any] | None = {"ok": {}}
        if ahead is not None or process.is_ahead:
            # First: a process that came to the GPU together with this one could not be told from a stranger, nor its
            # context from this one's.
            used = {"used_before_bytes": self._used_before_bytes} if process.is_ahead else {}
            reply = fork.ask({"do": "start", **request, **used}, timeout_s)
        if reply is not None and "ok" in reply:
            fork.send({"do": "trial", **request, "keep": not fresh})
            if ahead is not None:
                room_bytes = ahead["room_bytes"] - reply["ok"]["used_before_bytes"]
                self._ahead = self._begun_ahead({**request, **ahead, "room_bytes": room_bytes})
            held = {"pids": [], "bytes": 0} if self._ahead is None else self._ahead.held
            process.gate.open({"num_contexts": int(self._ahead is not None), **held})
            reply = fork.receive(deadline - time.monotonic())
        result = _result(fork, reply)
        details = result.setdefault("details", {})
        if process.is_ahead:
            details["started_ahead"] = True
        # What harmed a trial may have harmed the process beside it.
        self._used_before_bytes = None if result.get("outcome") == "failed" else details.get("used_before_bytes")
        if result.pop("warm", False):
            process.hold(**result.pop("held"))
            self._warm, process.is_ahead = process, False
        else:
            process.end()
        details.setdefault("timings", {})["leaving_s"] = round(fork.leaving_s, 4)
        return {"fresh_process": is_new, **result}

    def _new(self, kind: Hashable) -> _Process:
        gate = Gate()
        return _Process(Fork.start(lambda message: self._in_fork(gate, message)), gate, kind)

    def _begun_ahead(self, request: Mapping[str, Any]) -> _Process | None:
        """The process of the next trial, with CUDA started and the model moved; ``None`` where that failed: then the
        next trial tries."""
        try:
            process = self._new(_kind(request))
        except OSError:
            return None
        process.is_ahead = True
        reply = process.fork.ask({"do": "start", **request}, START_S) or {}
        # Where several processes came meanwhile, one is somebody else's: the next trial waits for it to go.
        if "ok" not in reply or len(reply["ok"]["pids"]) > 1:
            process.end()
            return None
        process.hold(pids=reply["ok"]["pids"], bytes=reply["ok"]["bytes"])
        return process

    def rest(self) -> Mapping[str, Any]:
        """End all processes, which gives the GPU back."""
        for process in (self._warm, self._ahead):
            if process is not None:
                process.end()
        self._warm = self._ahead = None
        return {}

    def _in_fork(self, gate: Gate, message: dict[str, Any]) -> Mapping[str, Any]:
        stages = self._stages
        return answer(
            {
                "start": lambda **request: stages.start(self._built, **request),
                "trial": lambda **request: stages.run(self._built, settle=gate.wait, **request),
            },
            message,
        )

    def serve(self) -> None:
        """Answer the parent until it goes. Never returns."""
        serve({"open": self.open, "ready": self.ready, "trial": self.trial, "rest": self.rest})


def _kind(request: Mapping[str, Any]) -> Hashable:
    """Equal for trials that one process can run, whatever their batch size."""
    variant, uuids = sorted(request["variant"].items()), request["gpu_uuids"]
    return repr(variant), request["capacity_bytes"], repr(uuids), request["accumulation_steps"]


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
