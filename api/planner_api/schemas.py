"""The JSON that the service answers with, as OpenAPI shows it.

Plans, trials and verdicts are written by ``planner.reports``, the same for the CLI; the models here describe them and
let further fields through.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from planner.jobs import Job, JobState

Bytes = Annotated[int, Field(ge=0)]


class VariantDocument(BaseModel):
    """One combination of the sweep's axes."""

    model_config = ConfigDict(extra="allow")

    precision: str
    checkpointing: str
    compile: str


class PlanDocument(BaseModel):
    """The answer for one variant of one spec on one GPU type: as ``planner probe --json`` prints it."""

    model_config = ConfigDict(extra="allow")

    variant: VariantDocument
    gpu: str
    capacity_bytes: Bytes
    source: Literal["measured", "predicted"]
    measured_under_limit: bool | None = Field(default=None, description="On a GPU that was held to less than it has")
    stands_for: str | None = Field(
        default=None, description="The GPU type whose capacity it was held to, where it is not `gpu`"
    )
    max_batch_size: int | None = Field(default=None, description="Of a search; 0 when not even one sample fits")
    first_oom_batch_size: int | None = None
    predicted_max_batch_size: int | None = Field(
        default=None, description="Of a measured search: the answer that had been predicted before it"
    )
    batch_size: int | None = Field(default=None, description="Of a question about one batch size")
    fits: bool | None = Field(
        default=None, description="Of a question about one batch size; null: it fits for a few steps, but leaks"
    )
    certified: bool | None = Field(
        default=None, description="Both batch sizes were run, each in a fresh process on a real GPU"
    )
    peak_allocated_bytes: Bytes | None = None
    peak_reserved_bytes: Bytes | None = None
    unconstrained: dict[str, Any] | None = Field(
        default=None, description="The largest batch size without the spec's search section, and where it comes from"
    )
    headroom: dict[str, Any] | None = Field(default=None, description="Bytes kept free, and what trials could reserve")
    fastest: dict[str, Any] | None = Field(
        default=None, description="The timed batch size with most samples per second"
    )
    knee: dict[str, Any] | None = Field(default=None, description="The smallest timed one with 95% of that speed")
    thrashing: dict[str, Any] | None = Field(
        default=None,
        description="Of `max_batch_size`, where it fits but is far slower than a smaller one",
    )
    largest_without_thrashing: dict[str, Any] | None = None
    leak: dict[str, Any] | None = Field(default=None, description="Allocated bytes that grow with every step")
    accumulation: dict[str, Any] | None = Field(
        default=None, description="The micro-batch and accumulation steps that reach `train.global_batch_size` exactly"
    )
    not_monotone: dict[str, Any] | None = Field(
        default=None, description="Batch sizes below `max_batch_size` that ran out of memory"
    )
    extra_trials: dict[str, Any] | None = Field(
        default=None, description="How many trials the answers beside the largest took, and how long"
    )
    explanation: dict[str, Any] | None = Field(
        default=None, description="What takes the memory: always predicted, for the batch size that it names"
    )
    num_trials: int | None = None
    trials: list[Any] | None = None


class PlanPage(BaseModel):
    plans: list[PlanDocument]
    next_cursor: str | None = Field(default=None, description="`cursor` of the next page; null on the last one")


class ErrorDocument(BaseModel):
    """Why a job failed."""

    model_config = ConfigDict(extra="allow")

    code: str
    message: str
    field: str | None = None
    suggestion: str | None = None


class JobSummary(BaseModel):
    """A job without its spec and plans, as lists show it."""

    id: str
    state: JobState
    kind: str
    name: str | None = Field(default=None, description="The spec's own label")
    gpu: str | None
    on: str | None = Field(default=None, description="GPU type that measures, held to the capacity of `gpu`")
    capacity_bytes: int | None
    batch_size: int | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempt: int = Field(description="How many times a worker has claimed it")
    worker: str | None
    cancel_requested: bool


class JobDocument(JobSummary):
    spec: dict[str, Any] = Field(description="The spec document as it was sent")
    fresh: bool
    error: ErrorDocument | None
    plans: list[PlanDocument] = Field(description="Answers; a cancelled or failed job keeps those that it finished")
    summary: list[str] = Field(description="The plans in a few sentences, as `planner probe` prints them")


class JobPage(BaseModel):
    jobs: list[JobSummary]
    next_cursor: str | None = Field(default=None, description="`cursor` of the next page; null on the last one")


VerdictWord = Literal["fits", "does_not_fit", "unknown"]


class VariantVerdictDocument(BaseModel):
    """The verdict on one variant."""

    model_config = ConfigDict(extra="allow")

    variant: VariantDocument
    verdict: VerdictWord
    fits: bool | None
    reason: str = Field(description="One sentence: which evidence decided, with its figures")
    source: Literal["measured", "predicted"] | None
    evidence_batch_size: int | None
    peak_allocated_bytes: Bytes | None
    peak_reserved_bytes: Bytes | None


class VerdictDocument(BaseModel):
    """That of the worst variant: as ``planner preflight --json`` prints it."""

    model_config = ConfigDict(extra="allow")

    verdict: VerdictWord
    fits: bool | None = Field(description="null: not enough evidence")
    gpu: str
    batch_size: int
    capacity_bytes: Bytes
    variants: list[VariantVerdictDocument]


class GpuDocument(BaseModel):
    """One GPU type of the catalogue."""

    model_config = ConfigDict(extra="allow")

    name: str
    driver_names: list[str]
    compute_capability: list[int]
    total_bytes: Bytes
    default_capacity_bytes: Bytes = Field(description="What the caching allocator may reserve by default")


class GpuList(BaseModel):
    gpus: list[GpuDocument]


class CapacityAnswer(BaseModel):
    """What the stored plans say about one batch size of one variant on one GPU type under one capacity."""

    gpu: str
    capacity_bytes: Bytes
    model: str
    spec_hash: str
    variant: VariantDocument
    fits: bool | None = Field(description="null: the stored evidence does not reach this batch size")
    evidence_batch_size: int | None = Field(description="The batch size that the answer rests on")
    source: Literal["measured", "predicted"]
    certified: bool
    peak_reserved_bytes: Bytes | None = Field(description="At the evidence batch size")
    samples_per_second: float | None


class CapacityReport(BaseModel):
    batch_size: int
    fits_on: list[str] = Field(description="GPU types with at least one plan that fits")
    answers: list[CapacityAnswer]


class Health(BaseModel):
    status: Literal["ok"]
    version: str


class Readiness(BaseModel):
    status: Literal["ready"]
    store: Literal["ok"]
    dispatcher: Literal["alive", "none"] = Field(description="`none`: workers run elsewhere")


def summary_fields(job: Job) -> dict[str, Any]:
    """The fields of ``JobSummary``."""
    name = job.request.spec.get("name")
    return {
        "id": job.id,
        "state": job.state,
        "kind": job.request.kind,
        "name": name if isinstance(name, str) else None,
        "gpu": job.request.gpu,
        "on": job.request.on,
        "capacity_bytes": job.request.capacity_bytes,
        "batch_size": job.request.batch_size,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "attempt": job.attempt,
        "worker": job.worker,
        "cancel_requested": job.cancel_requested,
    }
