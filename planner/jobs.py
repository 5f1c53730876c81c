"""A job: a request for plans, worked on by one worker at a time, with the record of what happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class JobKind(StrEnum):
    PROBE = "probe"
    """Measure where a GPU of that type is at hand, else predict and say so."""
    PREDICT = "predict"
    """Virtual GPU only."""


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """What was asked for: the same question as ``planner probe`` or ``planner predict``."""

    kind: JobKind
    spec: Mapping[str, Any]
    """The spec document as the user wrote it, already checked."""
    gpu: str | None = None
    """Catalogue name; ``None`` = the GPU of whichever worker takes it."""
    capacity_bytes: int | None = None
    batch_size: int | None = None
    fresh: bool = False
    """Work it out again even where the store has an answer."""
    on: str | None = None
    """Catalogue name of the type that measures, in place of ``gpu``, under the capacity of ``gpu``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    id: str
    request: JobRequest
    state: JobState
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    attempt: int = 0
    """How many times a worker has claimed it."""
    worker: str | None = None
    cancel_requested: bool = False
    error: Mapping[str, Any] | None = None
    """``PlannerError.as_dict()`` of a failed job."""
    plan_ids: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A worker's right to a job: every write under it is refused once a newer claim exists."""

    job: Job
    token: int
    """Fencing token: grows by one with each claim of the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """One entry of a job's event stream."""

    sequence: int
    """1, 2, 3, ... within the job: the ``id`` of the server-sent event."""
    kind: str
    """``state``, ``variant_started``, ``trial_started``, ``trial_finished``, ``variant_finished``."""
    data: Mapping[str, Any]
    created_at: datetime
