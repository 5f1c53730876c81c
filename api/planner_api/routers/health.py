"""Liveness, readiness and metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from planner import __version__
from planner_api.problems import NotReady, problem_responses
from planner_api.schemas import Health, Readiness
from planner_api.service import ServiceDep

router = APIRouter(tags=["operation"])


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> Health:
    return Health(status="ok", version=__version__)


@router.get("/readyz", summary="Can it do its work?", responses=problem_responses(503))
def readyz(service: ServiceDep) -> Readiness:
    """503 while the store does not answer, or when the embedded dispatcher has died."""
    service.store.ping()
    if service.dispatcher is None:
        return Readiness(status="ready", store="ok", dispatcher="none")
    if not service.dispatcher.is_alive():
        raise NotReady("the embedded dispatcher is not running: queued jobs wait; restart the service")
    return Readiness(status="ready", store="ok", dispatcher="alive")


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={
        200: {"description": "Text format", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **problem_responses(503),
    },
)
def metrics(service: ServiceDep) -> Response:
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)
