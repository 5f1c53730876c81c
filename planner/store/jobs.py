"""Jobs in the store: a queue that hands each job to one worker at a time.

A claim carries a fencing token and a lease. The worker renews the lease with heartbeats; when it does not, the job can
be claimed anew with a higher token, and whatever the old worker still writes is refused. Every change of state is also
an event of kind ``state``, written in the same transaction, so that whoever follows the events misses none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from planner.errors import Conflict, DeviceLost, InvalidArgument, NotFound
from planner.jobs import Claim, Job, JobEvent, JobKind, JobRequest, JobState
from planner.store import convert
from planner.store.engine import Database
from planner.store.ids import new_id
from planner.store.pages import Page, check_page, check_text, make_page
from planner.store.schema import JobEventRow, JobRow

LEASE_S: Final = 60.0
"""How long a worker may be silent before its job is given to another. Heartbeats come several times within it."""

MAX_ATTEMPTS: Final = 3
"""Claims of one job. A job that kills each worker that takes it must not take down the fleet one by one."""

MAX_KEY_LENGTH: Final = 255


class JobStore(Database):
    """What was asked for, who works on it, and what happened."""

    def create_job(self, request: JobRequest, idempotency_key: str | None = None) -> tuple[Job, bool]:
        """Queue a job; ``(job, True)``. The same key with the same request answers the job of the first time, and
        ``False``.

        Raises ``Conflict`` when the key came with another request, ``InvalidArgument`` for a key that is no key,
        ``StoreError``.
        """
        if idempotency_key is not None:
            check_text(idempotency_key, field="Idempotency-Key", max_length=MAX_KEY_LENGTH)
        now = datetime.now(UTC)
        data = convert.request_data(request)
        job_id, request_hash = new_id(now), convert.fingerprint(data)
        dialect = sqlite if self._address.is_sqlite else postgresql
        insert = dialect.insert(JobRow).values(
            id=job_id, kind=data["kind"], gpu=convert.storable(request.on or request.gpu), request=data,
            request_hash=request_hash, idempotency_key=idempotency_key, state=JobState.QUEUED, attempt=0, token=0,
            cancel_requested=False, plan_ids=[], num_events=0, created_at=now,
        )  # fmt: skip
        with self._writing() as session:
            # Waits for a transaction that is inserting the same key, then does nothing.
            session.execute(insert.on_conflict_do_nothing(index_elements=[JobRow.idempotency_key]))
            row = session.get(JobRow, job_id)
            if row is not None:
                _add_state_event(session, row)
                return convert.job_of(row), True
            row = session.scalars(select(JobRow).where(JobRow.idempotency_key == idempotency_key)).one()
            if row.request_hash != request_hash:
                raise Conflict(f"was used for another request before (job {row.id})", field="Idempotency-Key")
            return convert.job_of(row), False

    def get_job(self, job_id: str) -> Job:
        """Raises ``NotFound`` (field ``id``), ``StoreError``."""
        with self._reading() as session:
            return convert.job_of(_job(session, job_id))

    def list_jobs(self, limit: int = 50, cursor: str | None = None, state: JobState | None = None) -> Page[Job]:
        """A page of jobs, newest first. Raises ``InvalidArgument`` (``limit``, ``cursor``), ``StoreError``."""
        check_page(limit, cursor)
        query = select(JobRow).order_by(JobRow.id.desc()).limit(limit + 1)
        if state is not None:
            query = query.where(JobRow.state == state)
        if cursor is not None:
            query = query.where(JobRow.id < cursor)
        with self._reading() as session:
            jobs = [convert.job_of(row) for row in session.scalars(query)]
        return make_page(jobs, limit, lambda job: job.id)

    def claim_job(
        self,
        worker: str,
        kinds: Collection[JobKind] | None = None,
        gpus: Collection[str] | None = None,
        lease_s: float = LEASE_S,
    ) -> Claim | None:
        """Take the oldest job that waits, or whose worker fell silent; ``None`` when there is none. No two workers get
        the same.

        ``kinds``: only these (``None`` = all). ``gpus``: the GPU types that this worker can measure on (``None`` =
        all); a job of kind ``predict`` needs no GPU, so ``gpus`` does not restrict it. On the way, abandoned jobs
        whose cancellation was requested are cancelled, and those claimed ``MAX_ATTEMPTS`` times are failed. Raises
        ``StoreError``.
        """
        with self._writing() as session:
            now = self._now(session)
            wanted = [_available(now)]
            if kinds is not None:
                wanted.append(JobRow.kind.in_(kinds))
            if gpus is not None:
                wanted.append(or_(JobRow.kind == JobKind.PREDICT, JobRow.gpu.is_(None), JobRow.gpu.in_(gpus)))
            # PostgreSQL passes over rows that another claim holds; SQLite has one writer at a time and ignores the
            # clause.
            oldest = select(JobRow).where(*wanted).order_by(JobRow.id).limit(1).with_for_update(skip_locked=True)
            while row := session.scalars(oldest).first():
                if row.cancel_requested:
                    _end(session, row, JobState.CANCELLED, now)
                elif row.attempt >= MAX_ATTEMPTS:
                    error = DeviceLost(
                        f"given up: {row.attempt} workers in a row stopped answering while working on this job"
                    )
                    _end(session, row, JobState.FAILED, now, error=error.as_dict())
                else:
                    row.state, row.worker = JobState.RUNNING, convert.storable(worker)
                    row.attempt, row.token = row.attempt + 1, row.token + 1
                    row.lease_until, row.started_at = now + timedelta(seconds=lease_s), row.started_at or now
                    _add_state_event(session, row)
                    return Claim(job=convert.job_of(row), token=row.token)
            return None

    def heartbeat(self, claim: Claim, lease_s: float = LEASE_S) -> bool:
        """Renew the lease; ``True`` when the job is to be cancelled. Raises ``Conflict`` when the claim is void,
        ``StoreError``."""
        with self._writing() as session:
            row = _claimed(session, claim)
            row.lease_until = self._now(session) + timedelta(seconds=lease_s)
            return row.cancel_requested

    def append_event(self, target: Claim | str, kind: str, data: Mapping[str, Any]) -> JobEvent:
        """Add an event to the job of a claim, or to the job with this id, and answer it with its number.

        Raises ``Conflict`` when the claim is void, ``NotFound`` (field ``id``), ``StoreError``.
        """
        with self._writing() as session:
            row = _claimed(session, target) if isinstance(target, Claim) else _job(session, target, lock=True)
            return convert.event_of(_add_event(session, row, kind, data))

    def events_after(self, job_id: str, sequence: int = 0, limit: int | None = None) -> list[JobEvent]:
        """The events that came after number ``sequence``, oldest first. Raises ``NotFound`` (field ``id``),
        ``StoreError``."""
        query = select(JobEventRow).where(JobEventRow.job_id == job_id, JobEventRow.sequence > sequence)
        with self._reading() as session:
            _job(session, job_id)
            rows = session.scalars(query.order_by(JobEventRow.sequence).limit(limit))
            return [convert.event_of(row) for row in rows]

    def finish_job(
        self, claim: Claim, state: JobState, error: Mapping[str, Any] | None = None, plan_ids: Sequence[str] = ()
    ) -> Job:
        """End a claimed job in one of the final states. ``error`` is ``PlannerError.as_dict()``.

        Raises ``Conflict`` when the claim is void, ``InvalidArgument`` (field ``state``), ``StoreError``.
        """
        if not state.is_final:
            raise InvalidArgument(f"a job cannot end as {state}", field="state")
        with self._writing() as session:
            row = _claimed(session, claim)
            row.plan_ids = list(plan_ids)
            _end(session, row, state, self._now(session), error=error)
            return convert.job_of(row)

    def release_job(self, claim: Claim) -> Job:
        """Give a claimed job back to the queue at once, as a worker does that is told to stop; the attempt is not
        counted.

        A job whose cancellation was requested ends instead. Raises ``Conflict`` when the claim is void,
        ``StoreError``.
        """
        with self._writing() as session:
            row = _claimed(session, claim)
            if row.cancel_requested:
                _end(session, row, JobState.CANCELLED, self._now(session))
            else:
                row.state, row.attempt, row.worker, row.lease_until = JobState.QUEUED, row.attempt - 1, None, None
                _add_state_event(session, row)
            return convert.job_of(row)

    def cancel_job(self, job_id: str) -> Job:
        """Cancel a job that waits (or whose worker fell silent) at once; ask the worker of a running one to stop.

        Cancelling again changes nothing. Raises ``Conflict`` for a job that succeeded or failed, ``NotFound`` (field
        ``id``), ``StoreError``.
        """
        with self._writing() as session:
            row = _job(session, job_id, lock=True)
            now = self._now(session)
            state = JobState(row.state)
            if state.is_final and state is not JobState.CANCELLED:
                raise Conflict(f"the job has already {state}", field="id")
            if state is JobState.QUEUED or (state is JobState.RUNNING and row.lease_until and row.lease_until <= now):
                _end(session, row, JobState.CANCELLED, now)
            elif state is JobState.RUNNING and not row.cancel_requested:
                row.cancel_requested = True
                _add_state_event(session, row)
            return convert.job_of(row)

    def count_jobs(self) -> dict[JobState, int]:
        """How many jobs are in each state; a state without jobs counts 0. Raises ``StoreError``."""
        query = select(JobRow.state, func.count()).group_by(JobRow.state)
        with self._reading() as session:
            counts = dict(session.execute(query).all())
        return {state: counts.get(state, 0) for state in JobState}


def _available(now: datetime) -> ColumnElement[bool]:
    return or_(
        JobRow.state == JobState.QUEUED,
        and_(JobRow.state == JobState.RUNNING, JobRow.lease_until <= now),
    )


def _job(session: Session, job_id: str, *, lock: bool = False) -> JobRow:
    check_text(job_id, field="id")
    row = session.get(JobRow, job_id, with_for_update=lock)
    if row is None:
        raise NotFound(f"there is no job {job_id!r}", field="id")
    return row


def _claimed(session: Session, claim: Claim) -> JobRow:
    """The claim's job, locked, if the claim still holds. Every write of a worker goes through here."""
    row = session.get(JobRow, claim.job.id, with_for_update=True)
    if row is None or row.token != claim.token or row.state != JobState.RUNNING:
        raise Conflict(
            f"the claim on job {claim.job.id} is void: the job ended, or another worker took it over", field="id"
        )
    return row


def _end(
    session: Session, row: JobRow, state: JobState, now: datetime, *, error: Mapping[str, Any] | None = None
) -> None:
    row.state, row.error, row.finished_at, row.lease_until = state, convert.json_data(error), now, None
    row.cancel_requested = row.cancel_requested or state is JobState.CANCELLED
    _add_state_event(session, row)


def _add_state_event(session: Session, row: JobRow) -> None:
    data = {"state": row.state, "attempt": row.attempt, "worker": row.worker, "cancel_requested": row.cancel_requested}
    _add_event(session, row, "state", data if row.error is None else {**data, "error": row.error})


def _add_event(session: Session, row: JobRow, kind: str, data: Mapping[str, Any]) -> JobEventRow:
    row.num_events += 1
    event = JobEventRow(
        job_id=row.id, sequence=row.num_events, kind=kind, data=convert.json_data(data), created_at=datetime.now(UTC)
    )
    session.add(event)
    session.flush()
    return event
