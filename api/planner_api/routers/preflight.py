"""The gate before hardware is rented: does this batch size fit? Answered at once, without a job."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Request

from planner.devices import Device
from planner.errors import InvalidArgument
from planner.gpus import Gpu
from planner.preflight import Verdict, preflight
from planner.reports import verdict_dict
from planner.specs.model import Spec
from planner.specs.variants import Variant
from planner.targets import check_targets
from planner.virtual.device import VirtualDevice, VirtualRunner
from planner_api.documents import PreflightQuestion, read_question
from planner_api.openapi import question_body, question_parameters
from planner_api.problems import TimedOut, problem_responses
from planner_api.schemas import VerdictDocument
from planner_api.service import ServiceDep

router = APIRouter(prefix="/v1", tags=["preflight"])


class _BoundedDevice(VirtualDevice):
    """A virtual GPU that begins no variant after its question was given up, so that its thread is soon free again."""

    def __init__(self, gpu: Gpu, capacity_bytes: int, timeout_s: float, should_stop: Callable[[], bool]) -> None:
        super().__init__(gpu, capacity_bytes, timeout_s=timeout_s)
        self._should_stop = should_stop

    def open(self, spec: Spec, variant: Variant, *, capacity_bytes: int | None = None) -> VirtualRunner:
        if self._should_stop():
            raise TimedOut("nobody waits for this prediction any more")
        return super().open(spec, variant, capacity_bytes=capacity_bytes)


@router.post(
    "/preflight",
    summary="Will this batch size fit?",
    response_model_exclude_unset=True,
    responses=problem_responses(400, 413, 415, 422, 503, 504),
    openapi_extra={
        "requestBody": question_body(PreflightQuestion),
        "parameters": question_parameters(PreflightQuestion),
    },
)
async def ask_preflight(request: Request, service: ServiceDep) -> VerdictDocument:
    """The body is as that of `POST /v1/jobs`; `gpu` and `batch_size` are required. A stored measurement of the same
    work answers first, else a prediction."""
    asked = await read_question(request, PreflightQuestion, service.settings.max_body_bytes)
    gpu, batch_size = asked.gpu, asked.batch_size
    if gpu is None:
        raise InvalidArgument("say which GPU type the run is for", field="gpu")
    if batch_size is None:
        raise InvalidArgument("say which batch size the run will use", field="batch_size")
    check_targets(asked.spec, service.settings.allowed_prefixes)

    def work(should_stop: Callable[[], bool]) -> Verdict:
        def predictor(kind: Gpu, capacity_bytes: int) -> Device:
            return _BoundedDevice(kind, capacity_bytes, service.settings.preflight_timeout_s, should_stop)

        return preflight(
            asked.spec,
            gpu,
            batch_size,
            capacity_bytes=asked.capacity_bytes,
            store=service.store,
            make_predictor=predictor,
        )

    return VerdictDocument(**verdict_dict(await service.predictions.run(work)))
