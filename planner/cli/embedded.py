"""Jobs and plans of a store, in the words of the HTTP service: what ``--store`` asks in place of ``--server``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

from planner.client import ServiceEvent
from planner.jobs import Job, JobKind, JobRequest, JobState
from planner.reports import plan_dict
from planner.store import PlanFilter, Store
from planner.summaries import summary

_POLL_S = 0.2


class EmbeddedService:
    """The methods of ``planner.client.ServiceClient`` over a store, which it closes; the same errors."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.url = store.url

    def submit(self, question: Mapping[str, Any], *, idempotency_key: str | None = None) -> dict[str, Any]:
        from planner.gpus import find_gpu
        from planner.selection import check_on

        gpu, on = question.get("gpu"), question.get("on")
        check_on(on, question["kind"] == JobKind.PREDICT)
        request = JobRequest(
            kind=JobKind(question["kind"]),
            spec=question["spec"],
            gpu=None if gpu is None else find_gpu(gpu).name,
            on=None if on is None else find_gpu(on, field="on").name,
            capacity_bytes=question.get("capacity_bytes"),
            batch_size=question.get("batch_size"),
            fresh=bool(question.get("fresh")),
        )
        job, _ = self._store.create_job(request, idempotency_key)
        return self._document(job)

    def job(self, job_id: str) -> dict[str, Any]:
        return self._document(self._store.get_job(job_id))

    def jobs(self, *, limit: int = 50, cursor: str | None = None, state: str | None = None) -> dict[str, Any]:
        page = self._store.list_jobs(limit=limit, cursor=cursor, state=None if state is None else JobState(state))
        return {"jobs": [_summary(job) for job in page.items], "next_cursor": page.next_cursor}

    def cancel(self, job_id: str) -> dict[str, Any]:
        return self._document(self._store.cancel_job(job_id))

    def plans(self, *, limit: int = 50, cursor: str | None = None, **filters: Any) -> dict[str, Any]:
        page = self._store.list_plans(PlanFilter(**filters), limit=limit, cursor=cursor)
        return {"plans": [plan_dict(plan) for plan in page.items], "next_cursor": page.next_cursor}

    def plan(self, plan_id: str) -> dict[str, Any]:
        return plan_dict(self._store.get_plan(plan_id))

    def events(self, job_id: str) -> Iterator[ServiceEvent]:
        """Every event from the first one, as it comes; ends with the job."""
        last = 0
        while True:
            # The state first: what a final job's events are is settled before they are read, so none is missed.
            final = self._store.get_job(job_id).state.is_final
            for event in self._store.events_after(job_id, last):
                last = event.sequence
                yield ServiceEvent(sequence=event.sequence, kind=event.kind, data=event.data)
            if final:
                return
            time.sleep(_POLL_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def _document(self, job: Job) -> dict[str, Any]:
        plans = [self._store.get_plan(plan_id) for plan_id in job.plan_ids]
        return {
            **_summary(job),
            "spec": dict(job.request.spec),
            "fresh": job.request.fresh,
            "error": None if job.error is None else dict(job.error),
            "plans": [plan_dict(plan) for plan in plans],
            "summary": summary(plans),
        }


def _summary(job: Job) -> dict[str, Any]:
    """As ``GET /v1/jobs`` shows a job."""
    from planner_api.schemas import JobSummary, summary_fields

    data: dict[str, Any] = json.loads(JobSummary(**summary_fields(job)).model_dump_json())
    return data
