"""The catalogue of GPU types."""

from __future__ import annotations

from fastapi import APIRouter

from planner.gpus import list_gpus
from planner.reports import gpu_dict
from planner_api.problems import problem_responses
from planner_api.schemas import GpuDocument, GpuList

router = APIRouter(prefix="/v1", tags=["plans"])


@router.get("/gpus", summary="GPU types", response_model_exclude_unset=True, responses=problem_responses())
def read_gpus() -> GpuList:
    return GpuList(gpus=[GpuDocument(**gpu_dict(gpu)) for gpu in list_gpus()])
