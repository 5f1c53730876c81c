"""A client of the planner's HTTP service: the CLI's ``--server``, and anybody's Python.

Answers are the service's JSON documents as they are; its problem documents become ``PlannerError`` again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from planner.errors import InvalidArgument, PlannerError, ServiceError, error_from_dict

TIMEOUT_S = 30.0
PREFLIGHT_TIMEOUT_S = 180.0
"""A prediction takes seconds; the service gives up on one after its own PLANNER_PREFLIGHT_TIMEOUT_S (120)."""
EVENT_TIMEOUT_S = 60.0
"""The service sends a comment every 15 s on an event stream that has nothing to say."""
_RECONNECTS = 5
_RECONNECT_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceEvent:
    """One server-sent event of a job."""

    sequence: int
    kind: str
    data: Mapping[str, Any]


class ServiceClient:
    """One service. A context manager: leaving it closes its connections.

    ``transport`` takes the place of the network in a test. Every method raises the ``PlannerError`` that the service
    answered with, or ``ServiceError`` when it cannot be reached or answers nonsense.
    """

    def __init__(self, url: str, *, transport: httpx.BaseTransport | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidArgument(f"{url!r} is not the URL of a service", field="server", suggestion=f"http://{url}")
        self.url = url.rstrip("/")
        try:
            self._http = httpx.Client(base_url=self.url, transport=transport, timeout=TIMEOUT_S)
        except httpx.InvalidURL as error:
            raise InvalidArgument(f"{url!r} is not the URL of a service: {error}", field="server") from None

    def submit(self, question: Mapping[str, Any], *, idempotency_key: str | None = None) -> dict[str, Any]:
        """Queue a job: ``{"spec": {...}, "kind": "probe", "gpu": ..., ...}``. The same key gives the same job."""
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        return self._request("POST", "/v1/jobs", json=_given(question), headers=headers)

    def job(self, job_id: str) -> dict[str, Any]:
        """One job with its plans."""
        return self._request("GET", f"/v1/jobs/{_segment(job_id)}")

    def jobs(self, **filters: Any) -> dict[str, Any]:
        """A page of jobs, newest first: ``{"jobs": [...], "next_cursor": ...}``."""
        return self._request("GET", "/v1/jobs", params=_given(filters))

    def cancel(self, job_id: str) -> dict[str, Any]:
        return self._request("POST", f"/v1/jobs/{_segment(job_id)}/cancel")

    def plans(self, **filters: Any) -> dict[str, Any]:
        """A page of plans, newest first: ``{"plans": [...], "next_cursor": ...}``."""
        return self._request("GET", "/v1/plans", params=_given(filters))

    def plan(self, plan_id: str) -> dict[str, Any]:
        """One stored plan with its trials."""
        return self._request("GET", f"/v1/plans/{_segment(plan_id)}")

    def preflight(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The verdict on ``{"spec": {...}, "gpu": ..., "batch_size": ...}``."""
        return self._request("POST", "/v1/preflight", json=_given(question), timeout=PREFLIGHT_TIMEOUT_S)

    def events(self, job_id: str) -> Iterator[ServiceEvent]:
        """Every event of a job from the first one, as it happens; ends with the job.

        A stream that breaks off is taken up again after the last event that came.
        """
        last, failures = 0, 0
        while True:
            before = last
            try:
                for event in self._stream(job_id, last):
                    last = event.sequence
                    yield event
                return
            except httpx.TransportError as error:
                failures = 0 if last > before else failures + 1
                if failures > _RECONNECTS:
                    raise self._unreachable(error) from error
                time.sleep(_RECONNECT_PAUSE_S)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, job_id: str, after: int) -> Iterator[ServiceEvent]:
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": str(after)} if after else {})}
        path = f"/v1/jobs/{_segment(job_id)}/events"
        with self._http.stream(
            "GET", path, headers=headers, timeout=httpx.Timeout(TIMEOUT_S, read=EVENT_TIMEOUT_S)
        ) as reply:
            if reply.is_error:
                reply.read()
                raise self._problem(reply)
            yield from parse_events(reply.iter_lines())

    def _request(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            reply = self._http.request(method, path, **arguments)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        if reply.is_error:
            raise self._problem(reply)
        try:
            document = reply.json()
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise ServiceError(
                f"{self.url} answered {method} {path} with something that is no JSON object", field="server"
            )
        return document

    def _unreachable(self, error: Exception) -> ServiceError:
        return ServiceError(f"{self.url} cannot be reached: {error or type(error).__name__}", field="server")

    def _problem(self, reply: httpx.Response) -> PlannerError:
        try:
            problem = reply.json()
            data = {key: problem.get(key) for key in ("code", "field", "suggestion")}
            error = error_from_dict({**data, "message": problem["detail"]})
        except (ValueError, KeyError, AttributeError):
            return ServiceError(
                f"{self.url} answered {reply.status_code} {reply.reason_phrase}: is it a planner service?",
                field="server",
            )
        # A code of the service's own (too_busy, timed_out, ...) means that it could not answer now.
        return ServiceError(error.message, field="server") if type(error) is PlannerError else error


def parse_events(lines: Iterable[str]) -> Iterator[ServiceEvent]:
    """Server-sent events from the lines of a stream (WHATWG HTML, section 9.2.6), comments left out."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            if name:
                value = value.removeprefix(" ")
                fields[name] = f"{fields[name]}\n{value}" if name == "data" and name in fields else value
        elif fields:
            if "data" in fields and fields.get("id", "").isdigit():
                yield ServiceEvent(
                    sequence=int(fields["id"]), kind=fields.get("event", "message"), data=json.loads(fields["data"])
                )
            fields = {}


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _segment(record_id: str) -> str:
    """``record_id`` as one segment of a path: what a user typed must not reach another route."""
    return quote(record_id, safe="") or "-"
