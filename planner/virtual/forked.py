"""Traces in forks of the preloaded process: side by side, and what a model does to itself or its process stays there.

No torch here.
"""

from __future__ import annotations

import base64
import pickle
import signal
from collections.abc import Callable, Iterable
from typing import Any

from planner.errors import ModelError, error_from_dict
from planner.forks import Fork
from planner.processes import ChildDied, answer
from planner.virtual.trace import Trace


class ForkedTracer:
    """Traces at any batch size, each in a fork of its own. ``trace(batch_size)`` runs there."""

    def __init__(self, trace: Callable[[int], Trace]) -> None:
        self._trace = trace
        self._running: dict[int, Fork] = {}

    def start(self, batch_sizes: Iterable[int]) -> None:
        """Begin these traces and return at once."""
        for batch_size in batch_sizes:
            if batch_size not in self._running:
                fork = self._running[batch_size] = Fork.start(self._in_fork)
                fork.send({"do": "trace", "batch_size": batch_size})

    def is_done(self, batch_size: int) -> bool:
        """Whether the trace that was begun at ``batch_size`` has ended, and nobody asked for it yet."""
        return batch_size in self._running and self._running[batch_size].has_answered()

    def __call__(self, batch_size: int) -> Trace:
        """The trace at ``batch_size``. Raises what tracing raised, and ``ModelError`` for a model that ended its
        process; then the other traces are given up."""
        self.start([batch_size])
        fork = self._running.pop(batch_size)
        try:
            reply = fork.receive()
            if reply is None:
                raise _died(fork)
            if "error" in reply:
                error = error_from_dict(reply["error"])
                error.add_note("In the tracing process:\n" + str(reply["error"].get("trace", "")))
                raise error
            trace: Trace = pickle.loads(base64.b64decode(reply["ok"]["trace"]))  # noqa: S301 - from this very program
        except BaseException:
            self.close()
            raise
        finally:
            fork.kill()  # it has answered or died: leaving properly would give nothing back
        return trace

    def close(self) -> None:
        """Give up the traces that nobody asked for yet."""
        while self._running:
            self._running.popitem()[1].kill()

    def _in_fork(self, message: dict[str, Any]) -> dict[str, Any]:
        def trace(batch_size: int) -> dict[str, str]:
            return {"trace": base64.b64encode(pickle.dumps(self._trace(batch_size))).decode()}

        return answer({"trace": trace}, message)


def _died(fork: Fork) -> Exception:
    if fork.returncode == -signal.SIGKILL:  # the kernel's, when the machine's memory runs out
        return ChildDied(f"the process {fork.ending} before it answered")
    return ModelError(f"the model ended the process that it ran in, which {fork.ending}", field="model")
