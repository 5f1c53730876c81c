"""The real GPU as a ``Device``: each trial a fresh process under the capacity. The parent's side: no torch, no CUDA."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from planner.environment import measured_environment
from planner.errors import error_from_dict
from planner.gpus import Gpu, default_capacity_bytes
from planner.local_gpus import LocalGpu
from planner.processes import Child, ChildError
from planner.runtime.card import wait_until_idle
from planner.specs.document import spec_document
from planner.specs.model import Spec
from planner.specs.variants import Variant
from planner.trials import Environment, Outcome, Peaks, Source, Trial

OPEN_TIMEOUT_S = 900.0
"""For imports and building the model on one CPU thread: a minute for billions of parameters."""
TRIAL_TIMEOUT_S = 600.0
"""For three steps; with torch.compile for compilation too."""
_GRACE_S = 30.0
"""What the preloaded process gets on top to kill the trial that ran out of time and say so."""


class LocalDevice:
    """One GPU of this machine with ``capacity_bytes`` for the caching allocator.

    A preloaded process (``planner.runtime.child``) is kept for the spec in hand, and goes with this object.
    ``child_module`` and ``wait_idle`` are for tests.
    """

    def __init__(
        self,
        local: LocalGpu,
        capacity_bytes: int,
        *,
        trial_timeout_s: float = TRIAL_TIMEOUT_S,
        child_module: str = "planner.runtime.child",
        wait_idle: Callable[[str, int], None] = wait_until_idle,
    ) -> None:
        self.local = local
        self.gpu: Gpu = local.gpu
        self.capacity_bytes = capacity_bytes
        self.trial_timeout_s = trial_timeout_s
        self._child_module = child_module
        self._wait_idle = wait_idle
        self._preloaded: dict[str, Child] = {}  # by spec hash; one at most
        weakref.finalize(self, _kill_all, self._preloaded)

    def environment(self, spec: Spec) -> Environment:
        return measured_environment(spec, self.gpu, self.local)

    def open(self, spec: Spec, variant: Variant) -> LocalRunner:
        return LocalRunner(self, spec, variant)

    def close(self) -> None:
        """End the preloaded process; the next trial starts one again."""
        _kill_all(self._preloaded)

    def wait_until_idle(self) -> None:
        """Raises ``DeviceBusy``, ``DeviceLost``."""
        # What a process of ours will take in all; a capacity above the default one is the user's own risk.
        most = min(self.capacity_bytes, default_capacity_bytes(self.gpu))
        self._wait_idle(self.local.uuid, most + self.gpu.context_bytes + self.gpu.library_bytes)

    def preloaded(self, spec: Spec) -> Child:
        """The process that has built the model of ``spec``. Raises what building it raises."""
        child = self._preloaded.get(spec.hash)
        if child is not None and child.alive:
            return child
        self.close()
        # By its UUID, whatever order CUDA counts in; the trial then sees one GPU.
        child = Child.start(self._child_module, env={"CUDA_VISIBLE_DEVICES": self.local.uuid}, import_cwd=True)
        try:
            child.request({"do": "open", "spec": spec_document(spec)}, OPEN_TIMEOUT_S)
        except BaseException:
            child.kill()
            raise
        self._preloaded[spec.hash] = child
        return child


class LocalRunner:
    """One variant on one real GPU."""

    def __init__(self, device: LocalDevice, spec: Spec, variant: Variant) -> None:
        self._device, self._spec, self._variant = device, spec, variant

    def run(self, batch_size: int, *, fresh: bool = False) -> Trial:
        """Run one trial; every one is in a fresh process, asked for or not."""
        child = self._device.preloaded(self._spec)
        waiting = time.monotonic()
        self._device.wait_until_idle()
        idle_s = time.monotonic() - waiting
        started_at, start = datetime.now(UTC), time.monotonic()
        request = {
            "do": "trial",
            "variant": self._variant.as_dict(),
            "batch_size": batch_size,
            "capacity_bytes": self._device.capacity_bytes,
            "gpu_uuid": self._device.local.uuid,
            "timeout_s": self._device.trial_timeout_s,
        }
        try:
            reply = child.request(request, self._device.trial_timeout_s + _GRACE_S)
        except ChildError as error:
            reply = {"outcome": "failed", "error": str(error), "details": {"output": error.tail[-2000:]}}
        else:
            if "raised" in reply:
                raise _error_of(reply["raised"])
            if reply["outcome"] == Outcome.FAILED:
                reply["details"] = {**reply.get("details", {}), "output": child.tail()[-2000:]}
        reply.setdefault("details", {}).setdefault("timings", {})["idle_s"] = round(idle_s, 4)
        return _trial(batch_size, reply, started_at, time.monotonic() - start)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end: a trial's process ends with the trial, the preloaded one serves the next variant too."""


def _error_of(body: dict[str, Any]) -> BaseException:
    error = error_from_dict(body)
    error.add_note("In the trial's process:\n" + str(body.get("trace", "")))
    return error


def _trial(batch_size: int, reply: dict[str, Any], started_at: datetime, duration_s: float) -> Trial:
    peaks = reply.get("peaks")
    return Trial(
        batch_size=batch_size,
        outcome=Outcome(reply["outcome"]),
        source=Source.MEASURED,
        peaks=Peaks(**peaks) if peaks else None,
        num_alloc_retries=reply.get("num_alloc_retries", 0),
        step_times_s=tuple(reply.get("step_times_s", ())),
        fresh_process=True,
        error=reply.get("error"),
        details=reply.get("details", {}),
        duration_s=duration_s,
        started_at=started_at,
    )


def _kill_all(children: dict[str, Child]) -> None:
    while children:
        children.popitem()[1].kill()
