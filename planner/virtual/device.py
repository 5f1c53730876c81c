"""The virtual GPU as a ``Device``: the same search runs on it as on a real one, with no GPU and no weights."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from planner.devices import Limit
from planner.environment import allocator_conf, predicted_environment
from planner.errors import ModelError
from planner.gpus import Gpu
from planner.processes import Child, ChildDied, describe_exit
from planner.specs.document import spec_document
from planner.specs.model import Spec
from planner.specs.variants import Variant
from planner.trials import Environment, Interval, Outcome, Peaks, Source, Trial

TIMEOUT_S = 600.0
"""For one prediction: seconds as a rule, minutes for the largest models on a busy machine."""


class VirtualDevice:
    """A GPU type of the catalogue that is not there, with ``capacity_bytes`` for the caching allocator.

    ``timeout_s`` bounds each answer of its tracing process, which is killed when it takes longer.
    """

    def __init__(self, gpu: Gpu, capacity_bytes: int, *, timeout_s: float = TIMEOUT_S) -> None:
        self.gpu = gpu
        self.capacity_bytes = capacity_bytes
        self.timeout_s = timeout_s

    @property
    def limit(self) -> Limit | None:
        """None: nothing is measured here."""
        return None

    def environment(self, spec: Spec) -> Environment:
        return predicted_environment(spec, self.gpu)

    def prepare(self, spec: Spec, variants: Sequence[Variant]) -> None:
        """Nothing: a tracing process starts with its first trial."""

    def open(self, spec: Spec, variant: Variant, *, capacity_bytes: int | None = None) -> VirtualRunner:
        return VirtualRunner(self.gpu, capacity_bytes or self.capacity_bytes, spec, variant, self.timeout_s)


class VirtualRunner:
    """One variant in a tracing process of its own, started with the first trial."""

    def __init__(self, gpu: Gpu, capacity_bytes: int, spec: Spec, variant: Variant, timeout_s: float) -> None:
        self._gpu, self._capacity_bytes, self._spec, self._variant = gpu, capacity_bytes, spec, variant
        self._timeout_s = timeout_s
        self._child: Child | None = None

    def run(self, batch_size: int, *, fresh: bool = False) -> Trial:
        """Predict ``batch_size``. ``fresh`` changes nothing: a replay starts from an empty allocator each time."""
        started_at, start = datetime.now(UTC), time.monotonic()
        reply = self._request({"do": "trial", "batch_size": batch_size})
        return self._trial(batch_size, reply, started_at, time.monotonic() - start)

    def explain(self, batch_size: int) -> dict[str, Any]:
        """What takes the memory at ``batch_size`` (``planner.virtual.explanation.explain``); raises what ``run``
        raises."""
        outside = self._gpu.context_bytes + self._gpu.library_bytes
        return self._request({"do": "explain", "batch_size": batch_size, "outside_bytes": outside})

    def write_snapshot(self, batch_size: int, path: Path) -> int:
        """Write what ``batch_size`` does to the allocator as a file for PyTorch's memory viewer; returns its bytes.

        Raises what ``run`` raises, and ``InvalidArgument`` (``snapshot``) where ``path`` cannot be written.
        """
        reply = self._request({"do": "snapshot", "batch_size": batch_size, "path": str(path.resolve())})
        return int(reply["bytes"])

    def _request(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._child is None:
            self._child = self._start()
        try:
            return self._child.request(message, self._timeout_s)
        except ChildDied as error:
            if error.returncode == -signal.SIGKILL:  # the kernel's, when the machine's memory runs out
                raise
            ended = f"the model ended the process that it ran in, which {describe_exit(error.returncode)}"
            raise ModelError(ended, field="model") from error

    def _start(self) -> Child:
        child = Child.start("planner.virtual.child", import_cwd=True)
        try:
            child.request(
                {
                    "do": "open",
                    "spec": spec_document(self._spec),
                    "variant": self._variant.as_dict(),
                    "compute_capability": list(self._gpu.compute_capability),
                    "num_sms": self._gpu.num_sms,
                    "capacity_bytes": self._capacity_bytes,
                    "device_total_bytes": self._gpu.total_bytes,
                    "allocator_conf": allocator_conf(),
                },
                self._timeout_s,
            )
        except BaseException:
            child.kill()
            raise
        return child

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
            reserved_interval=Interval(
                low_bytes=needed["low_bytes"], high_bytes=needed["high_bytes"], basis=needed["basis"]
            ),
            error=reply.get("error"),
            details={
                "samples_per_step": batch_size * self._spec.train.accumulation_steps,
                "needed_bytes": needed["bytes"],
                "traced": reply["traced"],
                "traced_batch_sizes": reply["traced_batch_sizes"],
                "unmodelled": reply["unmodelled"],
            },
            duration_s=duration_s,
            started_at=started_at,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None:
            self._child.kill()
