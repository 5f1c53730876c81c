"""The pages that people read: plans for each GPU type, and one job."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from planner.errors import InvalidArgument, NotFound
from planner.gpus import Gpu, find_gpu
from planner.store import PlanFilter, Store
from planner_api.memory import memory_view
from planner_api.routers.jobs import RecordId
from planner_api.routers.plans import every_plan
from planner_api.service import ServiceDep
from planner_api.templating import templates
from planner_api.views import PlanRow, chart, newest_answers, plan_row

router = APIRouter(include_in_schema=False)

_PLANS_READ: Final = 400
"""Newest plans of a GPU type that a page is made from."""
_ROWS_ON_FRONT: Final = 24
_JOBS_ON_FRONT: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSection:
    """What a page says about one GPU type."""

    name: str
    gpu: Gpu | None
    """``None`` for a type that was measured and is not in the catalogue."""
    num_plans: int
    """Stored plans, older answers to the same questions included."""
    rows: list[PlanRow]
    num_more: int
    chart: dict[str, Any] | None


@router.get("/")
def front(request: Request, service: ServiceDep) -> HTMLResponse:
    sections = [
        _section(service.store, count.gpu, count.num_plans, _ROWS_ON_FRONT) for count in service.store.count_plans()
    ]
    jobs = service.store.list_jobs(limit=_JOBS_ON_FRONT).items
    return templates.TemplateResponse(request, "front.html", {"sections": sections, "jobs": jobs})


@router.get("/gpus/{name}")
def gpu_page(name: str, request: Request, service: ServiceDep) -> HTMLResponse:
    """Raises ``NotFound`` for a name that is neither in the catalogue nor in the store."""
    counts = {count.gpu: count.num_plans for count in service.store.count_plans()}
    if name not in counts:
        try:
            name = find_gpu(name).name
        except InvalidArgument as error:
            raise NotFound(error.message, field="name", suggestion=error.suggestion) from error
    section = _section(service.store, name, counts.get(name, 0), _PLANS_READ)
    return templates.TemplateResponse(request, "gpu.html", {"section": section})


@router.get("/jobs/{job_id}")
def job_page(job_id: RecordId, request: Request, service: ServiceDep) -> HTMLResponse:
    job = service.store.get_job(job_id)
    plans = [service.store.get_plan(plan_id) for plan_id in job.plan_ids]
    context = {"job": job, "rows": [plan_row(plan) for plan in plans]}
    return templates.TemplateResponse(request, "job.html", context)


@router.get("/plans/{plan_id}")
def plan_page(plan_id: RecordId, request: Request, service: ServiceDep) -> HTMLResponse:
    plan = service.store.get_plan(plan_id)
    memory = memory_view(plan.details.get("explanation"), plan.batch_size)
    context = {"plan": plan, "rows": [plan_row(plan)], "memory": memory}
    return templates.TemplateResponse(request, "plan.html", context)


def _section(store: Store, name: str, num_plans: int, max_rows: int) -> GpuSection:
    try:
        gpu = find_gpu(name)
    except InvalidArgument:
        gpu = None
    plans = newest_answers(itertools.islice(every_plan(store, PlanFilter(gpu=name)), _PLANS_READ))
    return GpuSection(
        name=name,
        gpu=gpu,
        num_plans=num_plans,
        rows=[plan_row(plan) for plan in plans[:max_rows]],
        num_more=max(0, len(plans) - max_rows),
        chart=chart(plans[:max_rows]),
    )
