"""Reading what clients send: a spec alone, or a spec with the question about it, as JSON or YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError
from starlette.concurrency import run_in_threadpool

from planner.errors import InvalidArgument, InvalidSpec, nearest
from planner.gpus import find_gpu
from planner.selection import check_on
from planner.specs.document import parse_spec
from planner.specs.files import parse_text
from planner.specs.model import Spec
from planner.specs.plain import plain
from planner.units import MAX_BATCH_SIZE, parse_bytes
from planner_api.problems import BodyTooLarge, MalformedBody, UnsupportedMediaType

_YAML_TYPES: Final = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml")
_JSON_TYPES: Final = ("application/json", "text/json")

MAX_CAPACITY_BYTES: Final = 2**53 - 1
"""The largest integer that every JSON reader keeps exactly."""


class Question(BaseModel):
    """What is asked about a spec; each field can also be a query parameter when the body is the spec alone."""

    model_config = ConfigDict(extra="forbid")

    gpu: Annotated[StrictStr, Field(max_length=64)] | None = Field(
        default=None, description="GPU type, as `GET /v1/gpus` names it", examples=["h200"]
    )
    capacity: Annotated[StrictStr, Field(max_length=40)] | None = Field(
        default=None, description="The most that the caching allocator may reserve", examples=["16GiB"]
    )
    capacity_bytes: Annotated[StrictInt, Field(gt=0, le=MAX_CAPACITY_BYTES)] | None = Field(
        default=None, description="The same as a number of bytes"
    )
    batch_size: Annotated[StrictInt, Field(gt=0, le=MAX_BATCH_SIZE)] | None = Field(
        default=None, description="One batch size in place of the search"
    )


class PreflightQuestion(Question):
    spec: dict[str, Any] = Field(description="The spec document")


class JobQuestion(Question):
    spec: dict[str, Any] = Field(description="The spec document")
    kind: Literal["probe", "predict"] = "probe"
    on: Annotated[StrictStr, Field(max_length=64)] | None = Field(
        default=None, description="GPU type to measure on, held to the capacity of `gpu`", examples=["h200"]
    )
    fresh: StrictBool = Field(default=False, description="Work it out again even where the store has an answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A checked question: the document as sent, the spec that it means, canonical GPU name, bytes."""

    document: Mapping[str, Any]
    spec: Spec
    gpu: str | None
    capacity_bytes: int | None
    batch_size: int | None
    kind: Literal["probe", "predict"] = "probe"
    on: str | None = None
    fresh: bool = False


async def read_question(request: Request, model: type[JobQuestion] | type[PreflightQuestion], limit: int) -> Asked:
    """The question in ``request``'s body (at most ``limit`` bytes) and query.

    A body with the key ``spec`` is the whole question; any other body is the spec alone and the query says the rest.
    Raises ``PlannerError`` for whatever is wrong with it.
    """
    document = await _read_document(request, limit)
    question = dict(document) if "spec" in document else {"spec": document}
    for name, value in _query(request, model).items():
        if name in question:
            raise InvalidArgument("given both in the body and in the query", field=name)
        question[name] = value
    return _check(question, model)


async def _read_document(request: Request, limit: int) -> dict[str, Any]:
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type not in (*_YAML_TYPES, *_JSON_TYPES) and not media_type.endswith("+json"):
        raise UnsupportedMediaType(
            f"{media_type!r} is not a content type of a spec; send application/json or application/yaml",
            field="content-type",
        )
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise BodyTooLarge(f"the body is larger than {limit} bytes")
    suffix = ".yaml" if media_type in _YAML_TYPES else ".json"
    try:
        return await run_in_threadpool(parse_text, bytes(body), suffix, field="body")
    except InvalidSpec as error:
        raise MalformedBody(error.message, field=error.field) from error


def _query(request: Request, model: type[BaseModel]) -> dict[str, Any]:
    """The query parameters as values of ``model``'s fields; the numbers and truth values in them are text."""
    found: dict[str, Any] = {}
    for name, text in request.query_params.multi_items():
        if name not in model.model_fields or name == "spec":
            known = [field for field in model.model_fields if field != "spec"]
            raise InvalidArgument("unknown query parameter", field=name, suggestion=nearest(name, known))
        if name in found:
            raise InvalidArgument("given more than once", field=name)
        found[name] = _from_text(name, text)
    return found


def _from_text(name: str, text: str) -> Any:
    if name in ("batch_size", "capacity_bytes"):
        # Digits only: int() also takes "1_0" and " 7 ". Twenty of them hold any size there is.
        if not (text.isascii() and text.isdigit() and len(text) <= 20):
            raise InvalidArgument(f"{text[:40]!r} is not a whole number above 0", field=name)
        return int(text)
    if name == "fresh":
        if text.lower() not in ("true", "false", "1", "0"):
            raise InvalidArgument(f"{text[:40]!r} is neither true nor false", field=name)
        return text.lower() in ("true", "1")
    return text


def _capacity_bytes(text: str | int) -> int:
    count = parse_bytes(text)
    if count > MAX_CAPACITY_BYTES:
        raise InvalidArgument(f"{text} is more than any GPU has", field="capacity")
    return count


def _check(data: dict[str, Any], model: type[JobQuestion] | type[PreflightQuestion]) -> Asked:
    try:
        question = model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise InvalidArgument(
                "unknown key beside 'spec'", field=name, suggestion=nearest(name, model.model_fields)
            ) from error
        suggestion = nearest(str(data.get(name)), ("probe", "predict")) if name == "kind" else None
        raise InvalidArgument(first["msg"].lower(), field=name, suggestion=suggestion) from error
    if question.capacity is not None and question.capacity_bytes is not None:
        raise InvalidArgument("give either capacity or capacity_bytes", field="capacity")
    on = _on(question)
    capacity = question.capacity if question.capacity is not None else question.capacity_bytes
    return Asked(
        document=plain(question.spec),
        spec=parse_spec(question.spec),
        gpu=None if question.gpu is None else find_gpu(question.gpu).name,
        capacity_bytes=None if capacity is None else _capacity_bytes(capacity),
        batch_size=question.batch_size,
        kind=question.kind if isinstance(question, JobQuestion) else "probe",
        on=on,
        fresh=question.fresh if isinstance(question, JobQuestion) else False,
    )


def _on(question: Question) -> str | None:
    if not isinstance(question, JobQuestion) or question.on is None:
        return None
    check_on(question.on, question.kind == "predict")
    return find_gpu(question.on, field="on").name
