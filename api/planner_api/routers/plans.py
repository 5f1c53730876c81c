"""Stored plans, and planning queries over them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, Final

from fastapi import APIRouter, Query

from planner.errors import InvalidArgument
from planner.gpus import find_gpu
from planner.reports import plan_dict
from planner.specs.variants import Checkpointing, Compile, Precision
from planner.store import PlanFilter, Store
from planner.trials import Plan, Source
from planner.units import MAX_BATCH_SIZE
from planner_api.fitting import best_answers, gpus_that_fit
from planner_api.problems import problem_responses
from planner_api.routers.jobs import Cursor, PageSize, RecordId
from planner_api.schemas import CapacityAnswer, CapacityReport, PlanDocument, PlanPage, VariantDocument
from planner_api.service import ServiceDep

router = APIRouter(prefix="/v1", tags=["plans"])

_PLANS_LOOKED_AT: Final = 2000
"""A planning query reads this many of the newest plans that match: enough for every variant on every GPU type."""

ModelName = Annotated[
    str | None, Query(max_length=200, pattern=r"^[^\x00-\x1f]+$", description="e.g. `gpt2` or `my_project.models:UNet`")
]
GpuName = Annotated[str | None, Query(max_length=64, description="GPU type, as `GET /v1/gpus` names it")]
SpecHash = Annotated[str | None, Query(pattern=r"^[0-9a-f]{64}$", description="Canonical hash of a spec's work")]
BatchSize = Annotated[int, Query(ge=1, le=MAX_BATCH_SIZE)]


@router.get(
    "/plans",
    summary="List plans, newest first",
    response_model_exclude_unset=True,
    responses=problem_responses(422, 503),
)
def list_plans(
    service: ServiceDep,
    model: ModelName = None,
    gpu: GpuName = None,
    precision: Precision | None = None,
    checkpointing: Checkpointing | None = None,
    compile: Compile | None = None,
    batch_size: BatchSize | None = None,
    source: Source | None = None,
    spec_hash: SpecHash | None = None,
    limit: PageSize = 50,
    cursor: Cursor = None,
) -> PlanPage:
    """`batch_size` selects the plans that answer for exactly that batch size."""
    chosen = PlanFilter(
        model=model,
        gpu=_canonical(gpu),
        precision=precision,
        checkpointing=checkpointing,
        compile=compile,
        batch_size=batch_size,
        source=source,
        spec_hash=spec_hash,
    )
    page = service.store.list_plans(chosen, limit=limit, cursor=cursor)
    return PlanPage(plans=[PlanDocument(**plan_dict(plan)) for plan in page.items], next_cursor=page.next_cursor)


@router.get(
    "/plans/{plan_id}",
    summary="One plan, with its trials",
    response_model_exclude_unset=True,
    responses=problem_responses(404, 422, 503),
)
def read_plan(plan_id: RecordId, service: ServiceDep) -> PlanDocument:
    return PlanDocument(**plan_dict(service.store.get_plan(plan_id)))


@router.get("/capacity", summary="Which GPU types does a batch size fit on?", responses=problem_responses(422, 503))
def capacity(
    service: ServiceDep,
    batch_size: BatchSize,
    model: ModelName = None,
    spec_hash: SpecHash = None,
    gpu: GpuName = None,
    precision: Precision | None = None,
    checkpointing: Checkpointing | None = None,
    compile: Compile | None = None,
    source: Source | None = None,
) -> CapacityReport:
    """Answered from stored plans alone: the best evidence for each GPU type, capacity and variant. A size at most as
    large as one that fits is said to fit, and one at least as large as one that ran out is said not to; between them,
    `fits` is null. One of `model` and `spec_hash` is required."""
    if model is None and spec_hash is None:
        raise InvalidArgument("say which plans to look at: model or spec_hash", field="model")
    chosen = PlanFilter(
        model=model,
        gpu=_canonical(gpu),
        precision=precision,
        checkpointing=checkpointing,
        compile=compile,
        source=source,
        spec_hash=spec_hash,
    )
    plans = itertools.islice(every_plan(service.store, chosen), _PLANS_LOOKED_AT)
    answers = best_answers(plans, batch_size)
    return CapacityReport(
        batch_size=batch_size,
        fits_on=list(gpus_that_fit(answers)),
        answers=[
            CapacityAnswer(
                gpu=fit.plan.gpu,
                capacity_bytes=fit.plan.capacity_bytes,
                model=fit.plan.model,
                spec_hash=fit.plan.spec_hash,
                variant=VariantDocument(**fit.plan.variant.as_dict()),
                fits=fit.fits,
                evidence_batch_size=fit.evidence_batch_size,
                source=fit.plan.source.value,
                certified=fit.plan.certified,
                peak_reserved_bytes=fit.plan.peaks.reserved_bytes if fit.fits and fit.plan.peaks else None,
                samples_per_second=fit.plan.samples_per_second if fit.fits else None,
            )
            for fit in answers
        ],
    )


def every_plan(store: Store, chosen: PlanFilter) -> Iterator[Plan]:
    """All matching plans, newest first, read a page at a time."""
    cursor: str | None = None
    while True:
        page = store.list_plans(chosen, limit=200, cursor=cursor)
        yield from page.items
        cursor = page.next_cursor
        if cursor is None:
            return


def _canonical(gpu: str | None) -> str | None:
    return None if gpu is None else find_gpu(gpu).name
