"""A preloaded process that forks one process for each trial: every trial is fresh, and imports are paid once.

It has imported torch and the modelling library and built the model on the CPU, and has never touched CUDA. Which model
and which trial is the business of the two functions that it is given; no torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planner.processes import InternalError, answer, serve
from planner.runtime.fork import run_forked

Build = Callable[[Mapping[str, Any]], Any]
"""Of a spec document: whatever the trials need, ready in memory."""
RunTrial = Callable[..., Mapping[str, Any]]
"""Of what was built and the request's own fields: the trial's result as JSON data."""


class Zygote:
    """The handlers of the process: ``open`` once, then ``trial`` as often as wanted."""

    def __init__(self, build: Build, run_trial: RunTrial) -> None:
        self._build = build
        self._run_trial = run_trial
        self._built: Any = None

    def open(self, *, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        self._built = self._build(spec)
        return {}

    def trial(self, *, timeout_s: float, **request: Any) -> Mapping[str, Any]:
        """One trial in a fork: its result, or ``{"raised": ...}`` with the ``PlannerError`` that it raised.

        A fork that dies, hangs or has a defect is the result ``{"outcome": "failed", "error": ...}``.
        """
        message = {"do": "trial", **request}
        forked = run_forked(lambda: answer({"trial": self._in_fork}, message), timeout_s)
        if forked.reply is None:
            return {"outcome": "failed", "error": f"the trial's process {forked.description}"}
        if "ok" in forked.reply:
            body: dict[str, Any] = forked.reply["ok"]
            body.setdefault("details", {}).setdefault("timings", {})["leaving_s"] = round(forked.leaving_s, 4)
            return body
        error = forked.reply["error"]
        if error["code"] == InternalError.code:
            return {"outcome": "failed", "error": error["message"], "details": {"trace": error["trace"]}}
        return {"raised": error}

    def _in_fork(self, **request: Any) -> Mapping[str, Any]:
        return self._run_trial(self._built, **request)

    def serve(self) -> None:
        """Answer the parent until it goes. Never returns."""
        serve({"open": self.open, "trial": self.trial})
