"""Jobs: submit, list, read, cancel, and follow as a stream of events."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request, Response, status
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from planner.jobs import Job, JobKind, JobRequest, JobState
from planner.reports import plan_dict
from planner.store import Store
from planner.summaries import summary
from planner.targets import check_targets
from planner_api.documents import JobQuestion, read_question
from planner_api.events import event_stream
from planner_api.openapi import question_body, question_parameters
from planner_api.problems import problem_responses
from planner_api.schemas import ErrorDocument, JobDocument, JobPage, JobSummary, PlanDocument, summary_fields
from planner_api.service import ServiceDep

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

RecordId = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Cursor = Annotated[str | None, Query(max_length=512, pattern=r"^[\x21-\x7e]+$", description="From the page before")]
PageSize = Annotated[int, Query(ge=1, le=200)]


@router.post(
    "",
    summary="Submit a job",
    status_code=status.HTTP_202_ACCEPTED,
    response_model=JobSummary,
    responses={
        202: {"headers": {"Location": {"description": "The job", "schema": {"type": "string"}}}},
        **problem_responses(400, 409, 413, 415, 422, 503),
    },
    openapi_extra={"requestBody": question_body(JobQuestion), "parameters": question_parameters(JobQuestion)},
)
async def submit(
    request: Request,
    response: Response,
    service: ServiceDep,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            pattern=r"^[\x21-\x7e]+$",
            description="The same key with the same body answers with the same job; with another body it is a conflict",
        ),
    ] = None,
) -> JobSummary:
    """The body is a spec document (then `gpu`, `capacity` and the rest are query parameters), or an object with the key
    `spec` and the rest beside it. The spec is checked before the job exists."""
    asked = await read_question(request, JobQuestion, service.settings.max_body_bytes)
    check_targets(asked.spec, service.settings.allowed_prefixes)
    job, _ = await run_in_threadpool(
        service.store.create_job,
        JobRequest(
            kind=JobKind(asked.kind),
            spec=asked.document,
            gpu=asked.gpu,
            on=asked.on,
            capacity_bytes=asked.capacity_bytes,
            batch_size=asked.batch_size,
            fresh=asked.fresh,
        ),
        idempotency_key,
    )
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return JobSummary(**summary_fields(job))


@router.get("", summary="List jobs, newest first", responses=problem_responses(422, 503))
def list_jobs(
    service: ServiceDep,
    limit: PageSize = 50,
    cursor: Cursor = None,
    state: Annotated[JobState | None, Query(description="Only jobs in this state")] = None,
) -> JobPage:
    page = service.store.list_jobs(limit=limit, cursor=cursor, state=state)
    return JobPage(jobs=[JobSummary(**summary_fields(job)) for job in page.items], next_cursor=page.next_cursor)


@router.get(
    "/{job_id}",
    summary="One job, with its plans",
    response_model_exclude_unset=True,
    responses=problem_responses(404, 422, 503),
)
def read_job(job_id: RecordId, service: ServiceDep) -> JobDocument:
    return _document(service.store, service.store.get_job(job_id))


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a job",
    response_model_exclude_unset=True,
    responses=problem_responses(404, 409, 422, 503),
)
def cancel_job(job_id: RecordId, service: ServiceDep) -> JobDocument:
    """A queued job ends at once; a running one after the trial that is running. What was finished stays."""
    return _document(service.store, service.store.cancel_job(job_id))


@router.get(
    "/{job_id}/events",
    summary="Follow a job",
    response_class=EventSourceResponse,
    responses={
        200: {"description": "Server-sent events", "content": {"text/event-stream": {"schema": {"type": "string"}}}},
        **problem_responses(404, 422, 503),
    },
)
async def follow_job(
    job_id: RecordId,
    service: ServiceDep,
    last_event_id: Annotated[
        int | None, Header(ge=0, le=2**31 - 1, description="Resume after this event (browsers send it themselves)")
    ] = None,
) -> EventSourceResponse:
    """`state`, `variant_started`, `trial_started`, `trial_finished` and `variant_finished` events, from the first one
    or from after `Last-Event-ID`; the stream ends with the job."""
    await run_in_threadpool(service.store.get_job, job_id)
    return EventSourceResponse(
        event_stream(
            service.store,
            job_id,
            after=last_event_id or 0,
            poll_s=service.settings.events_poll_s,
            stopping=service.stopping,
        ),
        ping=15,
    )


def _document(store: Store, job: Job) -> JobDocument:
    plans = [store.get_plan(plan_id) for plan_id in job.plan_ids]
    return JobDocument(
        **summary_fields(job),
        spec=dict(job.request.spec),
        fresh=job.request.fresh,
        error=None if job.error is None else ErrorDocument(**job.error),
        plans=[PlanDocument(**plan_dict(plan)) for plan in plans],
        summary=summary(plans),
    )
