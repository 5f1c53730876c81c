"""A preloaded process that forks the processes of trials: fresh ones, and one that is kept warm between trials.

It has imported torch and the modelling library and built the model on the CPU, and has never touched CUDA. Which model
and which trial is the business of the two functions that it is given; no torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planner.forks import Fork, adopt_orphans, shared_with_forks
from planner.processes import InternalError, answer, serve

Build = Callable[[str], Any]
"""Of a packed spec: whatever the trials need, ready in memory."""
RunTrial = Callable[..., Mapping[str, Any]]
"""Of what was built and the request's own fields: the trial's result as JSON data. Its ``warm``, taken out again, says
whether the process is as good as new for the next trial of the same variant."""


class Zygote:
    """The handlers of the process: ``open`` once, then ``trial`` as often as wanted, ``rest`` when enough is known."""

    def __init__(self, build: Build, run_trial: RunTrial) -> None:
        self._build = build
        self._run_trial = run_trial
        self._built: Any = None
        self._warm: Fork | None = None
        self._warm_for: Any = None

    def open(self, *, spec: str) -> Mapping[str, Any]:
        adopt_orphans()
        with shared_with_forks():
            self._built = self._build(spec)
        return {}

    def trial(self, *, timeout_s: float, fresh: bool, **request: Any) -> Mapping[str, Any]:
        """One trial in a fork: its result, or ``{"raised": ...}`` with the ``PlannerError`` that it raised.

        ``fresh`` asks for a new process, which ends with the trial; otherwise the warm one is used, or the new one
        kept. A fork that dies, hangs or has a defect is the result ``{"outcome": "failed", "error": ...}``.
        """
        kind = (request["variant"], request["capacity_bytes"])
        if fresh or self._warm_for != kind:
            self.rest()
        fork = self._warm or Fork.start(self._in_fork)
        is_new, self._warm = self._warm is None, None
        reply = fork.ask({"do": "trial", **request, "keep": not fresh}, timeout_s)
        result = _result(fork, reply)
        if result.pop("warm", False):
            self._warm, self._warm_for = fork, kind
        else:
            fork.end()
        details = result.setdefault("details", {})
        details.setdefault("timings", {})["leaving_s"] = round(fork.leaving_s, 4)
        return {"fresh_process": is_new, "warm_pid": fork.pid if self._warm else None, **result}

    def rest(self) -> Mapping[str, Any]:
        """End the warm process, which gives the GPU back."""
        if self._warm is not None:
            self._warm.end()
            self._warm = None
        return {}

    def _in_fork(self, message: dict[str, Any]) -> Mapping[str, Any]:
        return answer({"trial": lambda **request: self._run_trial(self._built, **request)}, message)

    def serve(self) -> None:
        """Answer the parent until it goes. Never returns."""
        serve({"open": self.open, "trial": self.trial, "rest": self.rest})


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
