"""The virtual GPU as a ``Device``: the same search runs on it as on a real one, with no GPU and no weights."""

from __future__ import annotations

import signal
import threading
import time
import weakref
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from planner.devices import Limit
from planner.environment import allocator_conf, predicted_environment, torch_build
from planner.errors import DeviceUnavailable, ModelError
from planner.gpus import Gpu
from planner.processes import Child, ChildDied, describe_exit, kill_all
from planner.specs.model import Spec
from planner.specs.packing import packed
from planner.specs.variants import DEFAULT, Variant
from planner.trials import Environment, Interval, Outcome, Peaks, Source, Trial

TIMEOUT_S = 600.0
"""For one prediction: seconds as a rule, minutes for the largest models on a busy machine."""

OLDEST_TORCH = (2, 10)
"""The first release with ``torch.utils.backend_registration._setup_privateuseone_for_python_backend``."""

_MOST_PRELOADED = 2
"""Processes kept: of the spec in hand, and of one made from it (a search that accumulates gradients)."""


_ENVIRONMENT = {
    # Traces run in forks, and CUDA, once it was asked for a GPU, aborts in a fork.
    "CUDA_VISIBLE_DEVICES": "",
    # One order of each set of names: some models allocate in the order of one (ModernBERT, of its kinds of layers).
    "PYTHONHASHSEED": "0",
}


class VirtualDevice:
    """A GPU type of the catalogue that is not there, with ``capacity_bytes`` for the caching allocator.

    A process that has imported torch and built the model (``planner.virtual.child``) is kept for the spec in hand, and
    goes with this object. Threads may share it. ``timeout_s`` bounds each answer; the process is killed when it takes
    longer.
    """

    def __init__(self, gpu: Gpu, capacity_bytes: int, *, timeout_s: float = TIMEOUT_S) -> None:
        self.gpu = gpu
        self.capacity_bytes = capacity_bytes
        self.timeout_s = timeout_s
        self._preloaded: dict[str, Child] = {}  # by spec hash, at most _MOST_PRELOADED, the one used last at the end
        self._opening: set[str] = set()
        self._lock = threading.RLock()  # a later variant may be predicted while an earlier one is explained
        weakref.finalize(self, kill_all, self._preloaded)

    @property
    def limit(self) -> Limit | None:
        """None: nothing is measured here."""
        return None

    def environment(self, spec: Spec) -> Environment:
        return predicted_environment(spec, self.gpu)

    def prepare(self, spec: Spec, variants: Sequence[Variant]) -> None:
        """Have the preloaded process import and build while the caller does something else."""
        with self._lock:
            self._child(spec)

    def _child(self, spec: Spec) -> Child:
        child = self._preloaded.pop(spec.hash, None)
        if child is None or not child.alive:
            _check_torch()
            while len(self._preloaded) >= _MOST_PRELOADED:
                oldest = next(iter(self._preloaded))
                self._preloaded.pop(oldest).kill()
            child = Child.start("planner.virtual.child", env=_ENVIRONMENT, import_cwd=True)
            request = {
                "do": "open",
                "spec": packed(spec),
                "compute_capability": list(self.gpu.compute_capability),
                "num_sms": self.gpu.num_sms,
            }
            child.send(request)
            self._opening.add(spec.hash)
        self._preloaded[spec.hash] = child
        return child

    def open(self, spec: Spec, variant: Variant, *, capacity_bytes: int | None = None) -> VirtualRunner:
        return VirtualRunner(self, spec, variant, capacity_bytes or self.capacity_bytes)

    def rest(self) -> None:
        """Nothing is held but the preloaded process."""

    def close(self) -> None:
        """End the preloaded processes; the next trial starts one again. A thread that waits for an answer gets
        ``ChildDied``."""
        for child in list(self._preloaded.values()):
            child.process.kill()  # the thread that waits for its answer finds it dead, and lets go of the lock
        with self._lock:
            kill_all(self._preloaded)

    def ask(self, spec: Spec, request: dict[str, Any]) -> dict[str, Any]:
        """The reply of the process that has built the model of ``spec``. Raises what building or tracing it raises."""
        with self._lock:
            try:
                return self._opened(spec).request(request, self.timeout_s)
            except ChildDied as error:
                if error.returncode == -signal.SIGKILL:  # the kernel's, when the machine's memory runs out
                    raise
                message = f"the model ended the process that it ran in, which {describe_exit(error.returncode)}"
                raise ModelError(message, field="model") from error

    def wait(self, spec: Spec) -> None:
        """Wait until the preloaded process is ready. Raises what building the model raises."""
        with self._lock:
            self._opened(spec)

    def _opened(self, spec: Spec) -> Child:
        child = self._child(spec)
        if spec.hash in self._opening:
            self._opening.discard(spec.hash)
            try:
                child.receive(self.timeout_s)
            except BaseException:
                self._preloaded.pop(spec.hash).kill()
                raise
        return child


def _check_torch() -> None:
    """Raise ``DeviceUnavailable`` for a torch that lets no backend be written in Python yet, or without torch."""
    build = torch_build()
    if build.release < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise DeviceUnavailable(f"predictions need torch {oldest} or newer; torch {build.version} is installed here")


class VirtualRunner:
    """One variant on a virtual GPU."""

    def __init__(self, device: VirtualDevice, spec: Spec, variant: Variant, capacity_bytes: int) -> None:
        self._device, self._spec, self._variant, self._capacity_bytes = device, spec, variant, capacity_bytes
        self._gpu = device.gpu

    def run(self, batch_size: int, *, fresh: bool = False) -> Trial:
        """Predict ``batch_size``. A ``fresh`` trial is checked by a trace and has an interval; any other one only
        narrows a search."""
        started_at, start = datetime.now(UTC), time.monotonic()
        reply = self._ask("trial", batch_size, fresh=fresh, multiple_of=self._spec.search.multiple_of)
        return self._trial(batch_size, reply, started_at, time.monotonic() - start)

    def explain(self, batch_size: int) -> dict[str, Any]:
        """What takes the memory at ``batch_size`` (``planner.virtual.explanation.explain``); raises what ``run``
        raises."""
        return self._ask("explain", batch_size, outside_bytes=self._gpu.context_bytes + self._gpu.library_bytes)

    def write_snapshot(self, batch_size: int, path: Path) -> int:
        """Write what ``batch_size`` does to the allocator as a file for PyTorch's memory viewer; returns its bytes.

        Raises what ``run`` raises, and ``InvalidArgument`` (``snapshot``) where ``path`` cannot be written.
        """
        reply = self._ask("snapshot", batch_size, path=str(path.resolve()))
        return int(reply["bytes"])

    def _ask(self, what: str, batch_size: int, **options: Any) -> dict[str, Any]:
        own_allocator = self._variant.allocator
        return self._device.ask(
            self._spec,
            {
                "do": what,
                "variant": self._variant.as_dict(),
                "batch_size": batch_size,
                "capacity_bytes": self._capacity_bytes,
                "device_total_bytes": self._gpu.total_bytes,
                "allocator_conf": allocator_conf() if own_allocator == DEFAULT else own_allocator,
                **options,
            },
        )

    def _trial(self, batch_size: int, reply: dict[str, Any], started_at: datetime, duration_s: float) -> Trial:
        needed = reply["needed"]
        return Trial(
            batch_size=batch_size,
            outcome=Outcome.FITS if reply["fits"] else Outcome.OOM,
            source=Source.PREDICTED,
            peaks=Peaks(
                allocated_bytes=reply["peak_allocated_bytes"],
                reserved_bytes=reply["peak_reserved_bytes"],
                device_bytes=reply["peak_reserved_bytes"] + self._gpu.context_bytes + self._gpu.library_bytes,
            ),
            num_alloc_retries=reply["num_alloc_retries"],
            reserved_interval=needed
            and Interval(low_bytes=needed["low_bytes"], high_bytes=needed["high_bytes"], basis=needed["basis"]),
            error=reply.get("error"),
            details={
                "samples_per_step": batch_size * self._spec.train.accumulation_steps * self._variant.gpus,
                **({"needed_bytes": needed["bytes"]} if needed else {}),
                "num_steps": reply["num_steps"],
                "allocated_after_step_bytes": reply.get("allocated_after_step_bytes", []),
                **({"in_cycles": True} if reply.get("in_cycles") else {}),
                "traced": reply["traced"],
                "traced_batch_sizes": reply["traced_batch_sizes"],
                "unmodelled": reply["unmodelled"],
                "num_events": reply["num_events"],
                "num_replays": reply["num_replays"],
                "timings": reply["timings"],
                **({"notes": reply["notes"]} if reply["notes"] else {}),
            },
            duration_s=duration_s,
            started_at=started_at,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The preloaded process serves the next variant too."""
