"""What was run and what came of it: trials, peaks, the environment that they were seen in, and plans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from statistics import median_low
from typing import Any

from planner.specs.variants import Variant


class Outcome(StrEnum):
    """How one trial ended."""

    FITS = "fits"
    OOM = "oom"
    """The caching allocator refused: data, never an exception past the trial."""
    FAILED = "failed"
    """Anything else (the process died, hung, raised): says nothing about memory."""


class Source(StrEnum):
    """Where a figure comes from. Never shown one as the other."""

    MEASURED = "measured"
    PREDICTED = "predicted"


class PlanStatus(StrEnum):
    PLANNED = "planned"
    """The question was answered, even when the answer is that nothing fits."""
    UNSUPPORTED = "unsupported"
    """This GPU, model or torch cannot run this variant; ``error`` says why."""
    FAILED = "failed"
    """The variant could not be answered; ``error`` says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """The three layers of memory of one trial, in bytes, largest value over its steps."""

    allocated_bytes: int
    """Bytes in blocks that tensors held (``torch.cuda.max_memory_allocated``)."""
    reserved_bytes: int
    """Bytes that the caching allocator held from the driver (``torch.cuda.max_memory_reserved``)."""
    device_bytes: int | None = None
    """Bytes in use on the whole device (NVML), context and libraries included; ``None`` where not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """The range that a predicted number of bytes is expected in, with where its width comes from."""

    low_bytes: int
    high_bytes: int
    basis: str
    """One sentence: which measured cases the width comes from, and what widened it."""

    def is_around(self, capacity_bytes: int) -> bool:
        """Whether the capacity may or may not suffice: the gate then says "not enough evidence"."""
        return self.low_bytes <= capacity_bytes < self.high_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One batch size, run once for ``num_steps`` training steps."""

    batch_size: int
    outcome: Outcome
    source: Source
    peaks: Peaks | None
    """``None`` only when the trial failed before anything was measured."""
    num_alloc_retries: int = 0
    """``torch.cuda.memory_stats()["num_alloc_retries"]``: cached segments were given back to go on."""
    step_times_s: tuple[float, ...] = ()
    """Wall time of each step, synchronised; empty for predictions."""
    fresh_process: bool = False
    """Run in a process whose GPU had been used for nothing else."""
    reserved_interval: Interval | None = None
    """Predictions only: the smallest capacity that the trial is expected to run under; between the peaks of allocated
    and of reserved bytes, since the allocator gives cached memory back before it refuses."""
    error: str | None = None
    """Why the trial failed, or the allocator's own words on OOM."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further evidence as JSON data (compile time, the virtual GPU's notes, ...)."""
    duration_s: float = 0.0
    started_at: datetime | None = None

    @property
    def fits(self) -> bool:
        return self.outcome is Outcome.FITS

    @property
    def step_time_s(self) -> float | None:
        """The median of the steps after the first (which also loads kernels and creates optimizer state), in seconds;
        the lower one of two.

        Not the fastest: *measured*, the U-Net in bf16 under 16 GiB at 73 samples took 0.15 s for its second step and
        0.36 s for every later one.
        """
        later = self.step_times_s[1:] or self.step_times_s
        return median_low(later) if later else None

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step: those of all micro-batches on all GPUs."""
        return int(self.details.get("samples_per_step", self.batch_size))

    @property
    def seconds_per_sample(self) -> float | None:
        return self.step_time_s / self.samples_per_step if self.step_time_s else None

    @property
    def samples_per_second(self) -> float | None:
        """As measured; ``None`` where no speed was."""
        if self.source is not Source.MEASURED or not self.step_time_s:
            return None
        return self.samples_per_step / self.step_time_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Everything outside the spec that can change the outcome of a trial."""

    source: Source
    gpu: str
    """Catalogue name, e.g. ``h200``."""
    gpu_name: str | None
    """As the driver says it, e.g. ``NVIDIA H200``; ``None`` on the virtual GPU."""
    gpu_uuid: str | None
    total_bytes: int
    """Bytes of the whole card."""
    driver_version: str | None
    cuda_version: str | None
    """The CUDA that torch was built for; ``None`` for a CPU build."""
    torch_version: str
    library_versions: Mapping[str, str] = field(default_factory=dict)
    """The modelling libraries that the spec uses, e.g. ``{"transformers": "5.17.0"}``."""
    allocator_conf: str = ""
    """``PYTORCH_ALLOC_CONF`` (or ``PYTORCH_CUDA_ALLOC_CONF``), normalised: sorted, without spaces."""
    code_hash: str | None = None
    """SHA-256 of the user's own code behind ``source: python``, a custom loss or step; ``None`` without any."""
    planner_version: str = ""
    python_version: str = ""
    hostname: str = ""

    def key(self) -> str:
        """SHA-256 over what must be equal for a stored answer to stand in for a new one.

        Which card of a type, which host and which Python are recorded but do not matter. The planner's version matters
        only to predictions: it decides what the virtual GPU models.
        """
        matter: dict[str, Any] = {
            "source": self.source, "gpu": self.gpu, "gpu_name": self.gpu_name, "total_bytes": self.total_bytes,
            "driver_version": self.driver_version, "cuda_version": self.cuda_version,
            "torch_version": self.torch_version,
            "library_versions": dict(sorted(self.library_versions.items())), "allocator_conf": self.allocator_conf,
            "code_hash": self.code_hash,
        }  # fmt: skip
        if self.source is Source.PREDICTED:
            matter["planner_version"] = self.planner_version
        return hashlib.sha256(json.dumps(matter, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer for one variant of one spec on one GPU type under one capacity.

    Of a search: ``max_batch_size`` and ``first_oom_batch_size``. Of a question about one size (``batch_size`` is set):
    ``fits``. Peaks, step time and retries are those of ``max_batch_size`` or ``batch_size``.
    """

    spec_hash: str
    spec_name: str | None
    model: str
    """What is trained, for people and filters, e.g. ``gpt2`` or ``my_project.models:UNet``."""
    variant: Variant
    environment: Environment
    capacity_bytes: int
    status: PlanStatus = PlanStatus.PLANNED
    source: Source
    max_batch_size: int | None = None
    first_oom_batch_size: int | None = None
    predicted_max_batch_size: int | None = None
    """Of a measured search: where the virtual GPU had said that it would end; ``None`` where it could not say."""
    batch_size: int | None = None
    fits: bool | None = None
    """``None`` of one size: it leaks, so that the few steps which fitted are no evidence that training will."""
    certified: bool = False
    """``max_batch_size`` ran and ``first_oom_batch_size`` ran out of memory, each in a fresh process on a real GPU."""
    peaks: Peaks | None = None
    reserved_interval: Interval | None = None
    step_time_s: float | None = None
    num_alloc_retries: int = 0
    trials: tuple[Trial, ...] = ()
    error: Mapping[str, Any] | None = None
    """``PlannerError.as_dict()`` where ``status`` is not ``planned``."""
    question: Mapping[str, Any] = field(default_factory=dict)
    """``Spec.question()``: what was asked beyond the largest batch size."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further answers as JSON data, by name (the explanation of the peak, the fastest batch size, ...)."""
    notes: tuple[str, ...] = ()
    """Sentences that a reader must see beside the figures (an unmodelled operator, a stated assumption, ...)."""
    worker: str | None = None
    created_at: datetime | None = None
    stored: bool = False
    """Read back from the store rather than worked out now."""
    id: str | None = None
    """Of the stored record; ``None`` before it was stored."""

    @property
    def gpu(self) -> str:
        return self.environment.gpu

    @property
    def is_under_limit(self) -> bool:
        """Measured on a GPU that was held to less than it has."""
        return "limit" in self.details

    @property
    def stands_for(self) -> str | None:
        """Of a plan that was measured under the capacity of another GPU type: which."""
        limit = self.details.get("limit")
        return limit.get("stands_for") if isinstance(limit, Mapping) else None

    @property
    def samples_per_second(self) -> float | None:
        size = self.batch_size if self.batch_size is not None else self.max_batch_size
        if not size or not self.step_time_s:
            return None
        ran = next((trial.samples_per_step for trial in self.trials if trial.batch_size == size), size)
        return ran / self.step_time_s
