"""What the service does against what its OpenAPI document says, with generated requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from api_fakes import GPT2, store_plan
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from planner_api.app import create_app
from planner_api.settings import Settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from planner.jobs import JobKind, JobRequest
from planner.store import Store

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    response_headers_conformance, unsupported_method,
]  # fmt: skip


# The event stream of a job that is still queued would never end; preflight predicts, which takes seconds.
LEFT_OUT = ("/v1/jobs/{job_id}/events", "/v1/preflight")


@pytest.fixture
def app(sqlite_url: str) -> Iterator[FastAPI]:
    with Store.open(sqlite_url) as store:
        job, _ = store.create_job(JobRequest(kind=JobKind.PROBE, spec=GPT2, gpu="h200"))
        store.cancel_job(job.id)
        store_plan(store)
        yield create_app(store, Settings())


def test_answers_are_as_documented(app: FastAPI) -> None:
    checked = []
    for result in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():
        operation = result.ok()
        if operation.path not in LEFT_OUT:
            check(operation, GenerationMode.POSITIVE)
            if operation.query or operation.body or operation.path_parameters:
                check(operation, GenerationMode.NEGATIVE)
            checked.append(operation.label)
    assert {"POST /v1/jobs", "GET /v1/jobs/{job_id}", "GET /v1/plans", "GET /v1/capacity"} <= set(checked)


def check(operation: Any, mode: GenerationMode) -> None:
    """Requests that keep to the document (``POSITIVE``) or break it somewhere (``NEGATIVE``)."""

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def answer_conforms(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    answer_conforms()
