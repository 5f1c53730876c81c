"""The real GPU as a ``Device``: trials in processes of their own, under the capacity. The parent's side: no torch."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from planner.devices import Limit
from planner.environment import measured_environment
from planner.errors import InvalidSpec, error_from_dict
from planner.gpus import Gpu, default_capacity_bytes
from planner.local_gpus import LocalGpu
from planner.processes import Child, ChildError, kill_all
from planner.runtime.card import Held, wait_until_idle
from planner.specs.model import Spec
from planner.specs.packing import packed
from planner.specs.variants import Variant
from planner.trials import Environment, Outcome, Peaks, Source, Trial
from planner.units import GIB

OPEN_TIMEOUT_S = 900.0
"""For imports and building the model on one CPU thread: a minute for billions of parameters."""
TRIAL_TIMEOUT_S = 600.0
"""For three steps; with torch.compile for compilation too."""
_ROOM_BYTES = 2 * GIB
"""To be free beside all that two processes are expected to take."""
_GRACE_S = 30.0
"""What the preloaded process gets on top to kill the trial that ran out of time and say so."""

WaitIdle = Callable[[str, int, Held], None]
"""Of a card's UUID, the bytes that must be free, and what the process that is kept warm holds."""


class LocalDevice:
    """One GPU of this machine with ``capacity_bytes`` for the caching allocator.

    A preloaded process (``planner.runtime.child``) is kept for the spec in hand, and goes with this object.
    ``peers`` are further cards of the same type, for variants on several GPUs.
    ``stands_for`` is the GPU type whose capacity that is, where it is not this one's.
    ``child_module`` and ``wait_idle`` are for tests.
    """

    def __init__(
        self,
        local: LocalGpu,
        capacity_bytes: int,
        *,
        peers: Sequence[LocalGpu] = (),
        stands_for: Gpu | None = None,
        trial_timeout_s: float = TRIAL_TIMEOUT_S,
        child_module: str = "planner.runtime.child",
        wait_idle: WaitIdle = wait_until_idle,
    ) -> None:
        self.local = local
        self.peers = tuple(peers)
        self.gpu: Gpu = local.gpu
        self.capacity_bytes = capacity_bytes
        self.stands_for = stands_for
        self.trial_timeout_s = trial_timeout_s
        self._child_module = child_module
        self._wait_idle = wait_idle
        self._preloaded: dict[str, Child] = {}  # by what was built; one at most
        self._is_opening = False
        self._held = Held()
        self._num_later = 0
        """Variants that ``prepare`` was told of beside the first of them."""
        weakref.finalize(self, kill_all, self._preloaded)

    @property
    def limit(self) -> Limit | None:
        most = default_capacity_bytes(self.gpu)
        if self.capacity_bytes >= most and self.stands_for is None:
            return None
        limit = Limit(gpu=self.gpu.name, capacity_bytes=self.capacity_bytes, unlimited_capacity_bytes=most)
        if self.stands_for is None:
            return limit
        # A smaller card has less left beside NCCL, which this one has room for.
        of_rank = min(self.capacity_bytes, default_capacity_bytes(self.stands_for, num_ranks=2))
        return replace(
            limit,
            stands_for=self.stands_for.name,
            capacity_of_rank_bytes=of_rank if of_rank < self.capacity_bytes else None,
        )

    def environment(self, spec: Spec) -> Environment:
        return measured_environment(spec, self.gpu, self.local)

    def prepare(self, spec: Spec, variants: Sequence[Variant]) -> None:
        """Have the preloaded process import and build while the caller does something else. While there are later
        ``variants`` the next trial's process is kept from one to the next, until ``rest``."""
        self._num_later = len(variants[1:])
        self._prepare(spec)

    def _prepare(self, spec: Spec) -> None:
        child = self._preloaded.get(_build_key(spec))
        if child is None or not child.alive:
            self.close()
            # By its UUID, whatever order CUDA counts in; the trial then sees one GPU.
            child = Child.start(self._child_module, env={"CUDA_VISIBLE_DEVICES": self.local.uuid}, import_cwd=True)
            self._preloaded[_build_key(spec)] = child
            child.send({"do": "open", "spec": packed(spec)})
            self._is_opening = True

    def open(self, spec: Spec, variant: Variant, *, capacity_bytes: int | None = None) -> LocalRunner:
        here = 1 + len(self.peers)
        if variant.gpus > here:
            counted = "only 1 is" if here == 1 else f"only {here} are"
            raise InvalidSpec(
                f"{variant.gpus} GPUs of type {self.gpu.name} are needed, and {counted} here", field="variants.gpus"
            )
        return LocalRunner(self, spec, variant, capacity_bytes or self.capacity_bytes)

    def close(self) -> None:
        """End the preloaded process; the next trial starts one again."""
        kill_all(self._preloaded)
        self._held = Held()

    def wait_until_idle(self, uuids: Sequence[str]) -> None:
        """Raises ``DeviceBusy``, ``DeviceLost``."""
        # What a process of ours will take in all; a capacity above the default one is the user's own risk.
        most = min(self.capacity_bytes, default_capacity_bytes(self.gpu))
        for uuid in uuids:
            self._wait_idle(uuid, most + self.gpu.context_bytes + self.gpu.library_bytes, self._held)

    def preloaded(self, spec: Spec) -> Child:
        """The process that has built the model of ``spec``. Raises what building it raises."""
        self._prepare(spec)
        child = self._preloaded[_build_key(spec)]
        if self._is_opening:
            try:
                child.receive(OPEN_TIMEOUT_S)
            except BaseException:
                self.close()
                raise
            self._is_opening = False
        return child

    def rest(self, *, keeps_next: bool = False) -> None:
        """End the processes that are kept, which gives the GPU back, but for that of the next trial where it
        ``keeps_next``."""
        held, self._held = self._held, Held()
        for child in self._preloaded.values() if held.pids else ():
            with contextlib.suppress(ChildError):  # it has died: nothing is held
                left = child.request({"do": "rest", "next_too": not keeps_next}, _GRACE_S)
                self._held = Held(pids=tuple(left["pids"]), bytes=left["bytes"])

    @property
    def expects_more(self) -> bool:
        """Whether further variants follow the present one."""
        return self._num_later > 0

    def has_room_beside(self, capacity_bytes: int) -> bool:
        """Whether the CUDA context of the next trial's process fits beside a trial that takes all it may."""
        outside_bytes = self.gpu.context_bytes + self.gpu.library_bytes
        return capacity_bytes + 2 * outside_bytes + _ROOM_BYTES <= self.local.total_bytes

    def ask(self, child: Child, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one trial, after the GPU was found idle: a failure of its processes is a reply too."""
        if request["fresh"]:
            self.rest(keeps_next=True)
        waiting = time.monotonic()
        self.wait_until_idle(request["gpu_uuids"])
        idle_s = round(time.monotonic() - waiting, 4)
        try:
            reply = child.request(request, self.trial_timeout_s + _GRACE_S)
        except ChildError as error:
            reply = {"outcome": "failed", "error": str(error), "details": {"output": error.tail[-2000:]}}
        if "raised" in reply:
            self._held = Held()
            raise _error_of(reply["raised"])
        holds = reply.pop("holds", None)
        self._held = Held(pids=tuple(holds["pids"]), bytes=holds["bytes"]) if holds else Held()
        details = reply.setdefault("details", {})
        if reply["outcome"] == Outcome.FAILED:
            details.setdefault("output", child.tail()[-2000:])
        details.setdefault("timings", {})["idle_s"] = idle_s
        return reply


class LocalRunner:
    """One variant on one real GPU."""

    def __init__(self, device: LocalDevice, spec: Spec, variant: Variant, capacity_bytes: int) -> None:
        self._device, self._spec, self._variant = device, spec, variant
        self._capacity_bytes = capacity_bytes
        self._num_fresh = 0

    def run(self, batch_size: int, *, fresh: bool = False) -> Trial:
        """Run one trial, in a process of its own where it is ``fresh``, else in one that is kept for the next."""
        child = self._device.preloaded(self._spec)
        is_fresh = fresh or self._variant.gpus > 1  # what NCCL holds is given back by ending alone
        self._num_fresh += is_fresh
        started_at, start = datetime.now(UTC), time.monotonic()
        reply = self._device.ask(
            child,
            {
                "do": "trial",
                "variant": self._variant.as_dict(),
                "batch_size": batch_size,
                "capacity_bytes": self._capacity_bytes,
                "gpu_uuids": [card.uuid for card in (self._device.local, *self._device.peers)][: self._variant.gpus],
                "accumulation_steps": self._spec.train.accumulation_steps,
                "timeout_s": self._device.trial_timeout_s,
                "fresh": is_fresh,
                "begins_next": is_fresh and self._begins_next(),
            },
        )
        return _trial(batch_size, reply, started_at, time.monotonic() - start)

    def _begins_next(self) -> bool:
        """Whether the next trial's process is begun beside this one: two fresh trials decide as a rule, and the next
        variant's follow."""
        expected = self._num_fresh == 1 or self._device.expects_more
        return expected and self._variant.gpus == 1 and self._device.has_room_beside(self._capacity_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The preloaded process serves the next variant too."""
        self._device.rest(keeps_next=error is None and self._device.expects_more)


def _build_key(spec: Spec) -> str:
    """Equal for specs that the same built model serves: accumulating does not change it, and a trial is told of it."""
    return replace(spec, train=replace(spec.train, accumulation_steps=1)).hash


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
        fresh_process=reply.get("fresh_process", True),
        error=reply.get("error"),
        details=reply.get("details", {}),
        duration_s=duration_s,
        started_at=started_at,
    )
