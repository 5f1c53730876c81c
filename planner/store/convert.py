"""The border between rows and the planner's own objects: one function each way for each kind of record."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from typing import Any, TypeVar

from planner.errors import StoreError
from planner.jobs import Job, JobEvent, JobKind, JobRequest, JobState
from planner.specs.variants import CONTRACT_AXES, Variant
from planner.store.pages import StoredTrial
from planner.store.schema import EnvironmentRow, Evidence, JobEventRow, JobRow, PlanRow, TrialRow
from planner.trials import Environment, Interval, Outcome, Peaks, Plan, PlanStatus, Source, Trial

Name = TypeVar("Name", bound=StrEnum)


def json_data(value: Any) -> Any:
    """``value`` as data that JSON can hold, equal to itself when read back: tuples become lists, keys strings, and the
    floats that JSON lacks (inf, nan) their names, since evidence with one strange figure in it must not be lost."""
    if isinstance(value, Mapping):
        return {str(key): json_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_data(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, StrEnum) else value


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``."""
    return hashlib.sha256(json.dumps(json_data(value), sort_keys=True).encode()).hexdigest()


def storable(text: str | None) -> str | None:
    """Text that both databases accept: a dying process's last words may hold NUL bytes or broken characters."""
    if text is None:
        return None
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


def _member(names: type[Name], value: str) -> Name:
    try:
        return names(value)
    except ValueError:
        kind = names.__name__.lower()
        raise StoreError(f"the store holds the {kind} {value!r}, which this version of planner does not know") from None


def variant_columns(variant: Variant) -> dict[str, str]:
    data = variant.as_dict()
    columns = {axis: data.pop(axis) for axis in CONTRACT_AXES}
    return {**columns, "axes": canonical(data)}


def canonical(data: Mapping[str, Any]) -> str:
    """JSON text that is equal for equal data, to be compared in a query."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def variant_of(row: Evidence) -> Variant:
    written = {axis: getattr(row, axis) for axis in CONTRACT_AXES} | json.loads(row.axes)
    try:
        return Variant.from_dict(written)
    except (ValueError, TypeError) as error:
        raise StoreError(f"the store holds a variant that this version of planner does not know: {error}") from None


def environment_columns(environment: Environment) -> dict[str, Any]:
    """The row of ``environments``; its ``id`` covers every field, its ``key`` only those that matter."""
    fields = asdict(environment)
    columns = {name: storable(value) if isinstance(value, str) else value for name, value in fields.items()}
    columns["source"] = str(environment.source)
    columns["library_versions"] = json_data(environment.library_versions)
    return {"id": fingerprint(fields), "key": environment.key(), **columns}


def environment_of(row: EnvironmentRow) -> Environment:
    return Environment(
        source=_member(Source, row.source), gpu=row.gpu, gpu_name=row.gpu_name, gpu_uuid=row.gpu_uuid,
        total_bytes=row.total_bytes, driver_version=row.driver_version, cuda_version=row.cuda_version,
        torch_version=row.torch_version, library_versions=row.library_versions, allocator_conf=row.allocator_conf,
        code_hash=row.code_hash, planner_version=row.planner_version, python_version=row.python_version,
        hostname=row.hostname,
    )  # fmt: skip


def _memory_columns(peaks: Peaks | None, interval: Interval | None) -> dict[str, Any]:
    return {
        "peak_allocated_bytes": peaks and peaks.allocated_bytes,
        "peak_reserved_bytes": peaks and peaks.reserved_bytes,
        "peak_device_bytes": peaks and peaks.device_bytes,
        "reserved_low_bytes": interval and interval.low_bytes,
        "reserved_high_bytes": interval and interval.high_bytes,
        "interval_basis": interval and storable(interval.basis),
    }


def _peaks_of(row: Evidence) -> Peaks | None:
    if row.peak_allocated_bytes is None or row.peak_reserved_bytes is None:
        return None
    return Peaks(
        allocated_bytes=row.peak_allocated_bytes,
        reserved_bytes=row.peak_reserved_bytes,
        device_bytes=row.peak_device_bytes,
    )


def _interval_of(row: Evidence) -> Interval | None:
    if row.reserved_low_bytes is None or row.reserved_high_bytes is None:
        return None
    return Interval(
        low_bytes=row.reserved_low_bytes, high_bytes=row.reserved_high_bytes, basis=row.interval_basis or ""
    )


def trial_columns(trial: Trial) -> dict[str, Any]:
    return {
        "source": str(trial.source),
        "batch_size": trial.batch_size,
        "outcome": str(trial.outcome),
        **_memory_columns(trial.peaks, trial.reserved_interval),
        "num_alloc_retries": trial.num_alloc_retries,
        "step_times_s": list(trial.step_times_s),
        "fresh_process": trial.fresh_process,
        "error": storable(trial.error),
        "details": json_data(trial.details),
        "duration_s": trial.duration_s,
        "started_at": trial.started_at,
    }


def trial_of(row: TrialRow) -> Trial:
    return Trial(
        batch_size=row.batch_size, outcome=_member(Outcome, row.outcome), source=_member(Source, row.source),
        peaks=_peaks_of(row), num_alloc_retries=row.num_alloc_retries, step_times_s=tuple(row.step_times_s),
        fresh_process=row.fresh_process, reserved_interval=_interval_of(row), error=row.error, details=row.details,
        duration_s=row.duration_s, started_at=row.started_at,
    )  # fmt: skip


def stored_trial_of(row: TrialRow) -> StoredTrial:
    return StoredTrial(
        id=row.id, environment=environment_of(row.environment), capacity_bytes=row.capacity_bytes, trial=trial_of(row),
        worker=row.worker, created_at=row.created_at,
    )  # fmt: skip


def plan_columns(plan: Plan) -> dict[str, Any]:
    return {
        "source": str(plan.source),
        "spec_name": storable(plan.spec_name),
        "model": storable(plan.model),
        "status": str(plan.status),
        "max_batch_size": plan.max_batch_size,
        "first_oom_batch_size": plan.first_oom_batch_size,
        "predicted_max_batch_size": plan.predicted_max_batch_size,
        "batch_size": plan.batch_size,
        "fits": plan.fits,
        "certified": plan.certified,
        **_memory_columns(plan.peaks, plan.reserved_interval),
        "step_time_s": plan.step_time_s,
        "num_alloc_retries": plan.num_alloc_retries,
        "error": json_data(plan.error),
        "notes": list(plan.notes),
        "question": canonical(plan.question),
        "details": json_data(plan.details) or None,
        "worker": storable(plan.worker),
    }


def plan_of(row: PlanRow) -> Plan:
    return Plan(
        spec_hash=row.spec_hash, spec_name=row.spec_name, model=row.model, variant=variant_of(row),
        environment=environment_of(row.environment), capacity_bytes=row.capacity_bytes,
        status=_member(PlanStatus, row.status), source=_member(Source, row.source), max_batch_size=row.max_batch_size,
        first_oom_batch_size=row.first_oom_batch_size, predicted_max_batch_size=row.predicted_max_batch_size,
        batch_size=row.batch_size, fits=row.fits,
        certified=row.certified, peaks=_peaks_of(row), reserved_interval=_interval_of(row), step_time_s=row.step_time_s,
        num_alloc_retries=row.num_alloc_retries, trials=tuple(trial_of(link.trial) for link in row.trial_links),
        error=row.error, notes=tuple(row.notes), question=json.loads(row.question), details=row.details or {},
        worker=row.worker, created_at=row.created_at, stored=True, id=row.id,
    )  # fmt: skip


def request_data(request: JobRequest) -> dict[str, Any]:
    data: dict[str, Any] = json_data({name: getattr(request, name) for name in JobRequest.__dataclass_fields__})
    return data


def job_of(row: JobRow) -> Job:
    return Job(
        id=row.id, request=JobRequest(**{**row.request, "kind": _member(JobKind, row.kind)}),
        state=_member(JobState, row.state), created_at=row.created_at, started_at=row.started_at,
        finished_at=row.finished_at, attempt=row.attempt, worker=row.worker, cancel_requested=row.cancel_requested,
        error=row.error, plan_ids=tuple(row.plan_ids),
    )  # fmt: skip


def event_of(row: JobEventRow) -> JobEvent:
    return JobEvent(sequence=row.sequence, kind=row.kind, data=row.data, created_at=row.created_at)
