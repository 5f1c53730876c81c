"""Errors as RFC 9457 problem documents, or as a page for a browser, and the one table from an error's code to its HTTP
status."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from planner.errors import PlannerError, nearest
from planner_api.templating import templates

MEDIA_TYPE: Final = "application/problem+json"

STATUS_OF_CODE: Final[Mapping[str, int]] = {
    # The tree of planner.errors.
    "planner_error": 500,
    "invalid_input": 422,
    "invalid_spec": 422,
    "target_not_allowed": 422,
    "invalid_argument": 422,
    "model_error": 422,
    "not_found": 404,
    "conflict": 409,
    "store_error": 503,
    "device_error": 503,
    "device_unavailable": 503,
    "device_busy": 503,
    "device_lost": 503,
    "service_error": 502,
    "trial_failed": 500,
    # Of planner.processes.
    "child_error": 500,
    "child_died": 500,
    "child_garbled": 500,
    "internal": 500,
    "child_timeout": 504,
    # Of the service itself.
    "malformed_body": 400,
    "bad_request": 400,
    "method_not_allowed": 405,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "internal_error": 500,
    "not_ready": 503,
    "too_busy": 503,
    "timed_out": 504,
}

_CODE_OF_STATUS: Final[Mapping[int, str]] = {404: "not_found", 405: "method_not_allowed", 422: "invalid_input"}

_log = structlog.get_logger(__name__)


class Problem(BaseModel):
    """RFC 9457. ``code`` is stable; ``detail`` is for people."""

    type: str = Field(description="`urn:planner:problem:` and the code", examples=["urn:planner:problem:invalid_spec"])
    title: str
    status: int
    code: str = Field(description="Stable name of the kind of problem", examples=sorted(STATUS_OF_CODE))
    detail: str
    instance: str = Field(description="Path of the request")
    field: str | None = Field(default=None, description="Path of the field, parameter or header that was wrong")
    suggestion: str | None = Field(default=None, description="Nearest valid value")


class MalformedBody(PlannerError):
    code = "malformed_body"


class BodyTooLarge(PlannerError):
    code = "body_too_large"


class UnsupportedMediaType(PlannerError):
    code = "unsupported_media_type"


class NotReady(PlannerError):
    code = "not_ready"


class TooBusy(PlannerError):
    code = "too_busy"


class TimedOut(PlannerError):
    code = "timed_out"


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route: 500 always, and those that it names."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": content} for status in sorted({*statuses, 500})
    }


def problem_response(
    code: str,
    detail: str,
    *,
    request: Request,
    field: str | None = None,
    suggestion: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """One problem document; a code that the table lacks is the service's own fault (500)."""
    number = STATUS_OF_CODE.get(code, 500)
    problem = Problem(
        type=f"urn:planner:problem:{code}",
        title=code.replace("_", " ").capitalize(),
        status=number,
        code=code,
        detail=detail,
        instance=request.url.path,
        field=field,
        suggestion=suggestion,
    )
    if _is_page(request):
        context = {"problem": problem}
        return templates.TemplateResponse(request, "problem.html", context, status_code=number, headers=headers)
    return JSONResponse(
        problem.model_dump(exclude_none=True), status_code=number, media_type=MEDIA_TYPE, headers=dict(headers or {})
    )


def _is_page(request: Request) -> bool:
    """Whether a person waits for it in a browser: the interface under ``/v1`` answers with documents whoever asks."""
    return "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/v1/")


def response_for(error: PlannerError, request: Request) -> Response:
    retry = {"Retry-After": "5"} if STATUS_OF_CODE.get(error.code) == HTTPStatus.SERVICE_UNAVAILABLE else None
    return problem_response(
        error.code, error.message, request=request, field=error.field, suggestion=error.suggestion, headers=retry
    )


def install(app: FastAPI) -> None:
    """Answer every error of ``app``, the framework's own included, with a problem document, or a page in a browser."""

    async def planner_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, PlannerError)
        if STATUS_OF_CODE.get(error.code, 500) >= HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.warning("request failed", path=request.url.path, code=error.code, error=str(error))
        return response_for(error, request)

    async def invalid_request(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part not in ("query", "path", "header", "body")]
        valid = str(first.get("ctx", {}).get("expected", "")).replace(" or ", ", ").replace("'", "").split(", ")
        return problem_response(
            "invalid_argument",
            str(first["msg"]),
            request=request,
            field=".".join(where) or None,
            suggestion=nearest(str(first.get("input", "")), [name for name in valid if name]),
        )

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = _CODE_OF_STATUS.get(error.status_code, "bad_request" if error.status_code < 500 else "internal_error")
        detail = {
            404: f"there is nothing at {request.url.path}",
            405: f"{request.method} is not supported at {request.url.path}",
        }.get(error.status_code, str(error.detail))
        return problem_response(code, detail, request=request, headers=error.headers)

    async def unexpected(request: Request, error: Exception) -> Response:
        _log.error("unexpected error", path=request.url.path, exc_info=error)
        return problem_response("internal_error", "the service failed unexpectedly; its log says why", request=request)

    app.add_exception_handler(PlannerError, planner_error)
    app.add_exception_handler(RequestValidationError, invalid_request)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)
