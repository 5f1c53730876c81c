"""The client of the service: what it asks, what it makes of answers, and of a service that is not there."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from planner.client import ServiceClient, parse_events
from planner.errors import InvalidArgument, InvalidSpec, NotFound, ServiceError

Handler = Callable[[httpx.Request], httpx.Response]


def client(handler: Handler) -> ServiceClient:
    return ServiceClient("http://planner.test/", transport=httpx.MockTransport(handler))


def test_submit_leaves_out_what_was_not_asked() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(202, json={"id": "j1"})

    with client(answer) as service:
        assert service.submit({"spec": {"model": {}}, "gpu": None, "fresh": False}, idempotency_key="k") == {"id": "j1"}
    assert (seen[0].method, seen[0].url.path, seen[0].headers["Idempotency-Key"]) == ("POST", "/v1/jobs", "k")
    assert json.loads(seen[0].content) == {"spec": {"model": {}}, "fresh": False}


def test_a_problem_document_becomes_the_error_it_was() -> None:
    problem = {
        "code": "invalid_spec",
        "detail": "unknown key",
        "field": "model.config.n_layerz",
        "suggestion": "n_layer",
    }
    with client(lambda _: httpx.Response(422, json=problem)) as service, pytest.raises(InvalidSpec) as caught:
        service.preflight({"spec": {}})
    assert str(caught.value) == "model.config.n_layerz: unknown key (did you mean 'n_layer'?)"


def test_a_code_of_the_service_alone_is_a_service_error() -> None:
    # A code that no class here has, whatever the process has imported: a newer service's.
    problem = {"code": "of_a_newer_service", "detail": "try again"}
    with client(lambda _: httpx.Response(503, json=problem)) as service, pytest.raises(ServiceError, match="try again"):
        service.preflight({"spec": {}})


@pytest.mark.parametrize(
    "reply", [httpx.Response(502, text="<html>"), httpx.Response(200, text="hello"), httpx.Response(200, json=[1])]
)
def test_nonsense_is_a_service_error(reply: httpx.Response) -> None:
    with client(lambda _: reply) as service, pytest.raises(ServiceError):
        service.jobs()


def test_an_unreachable_service() -> None:
    with (
        ServiceClient("http://127.0.0.1:1") as service,
        pytest.raises(ServiceError, match="cannot be reached") as caught,
    ):
        service.plans()
    assert caught.value.field == "server"


def test_a_url_without_a_scheme_gets_a_suggestion() -> None:
    with pytest.raises(InvalidArgument) as caught:
        ServiceClient("localhost:8000")
    assert caught.value.suggestion == "http://localhost:8000"


def test_a_url_that_cannot_be_read_names_the_field() -> None:
    with pytest.raises(InvalidArgument, match="is not the URL of a service: Invalid port") as caught:
        ServiceClient("http://localhost:80x")
    assert caught.value.field == "server"


def test_an_id_is_one_segment_of_the_path() -> None:
    paths: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.raw_path.decode())
        return httpx.Response(404, json={"code": "not_found", "detail": "no such job"})

    with client(answer) as service, pytest.raises(NotFound):
        service.job("../plans?x=1")
    assert paths == ["/v1/jobs/..%2Fplans%3Fx%3D1"]


def test_events_are_read_with_their_kinds_and_comments_left_out() -> None:
    lines = [
        ": ping",
        "",
        "id: 1",
        "event: state",
        'data: {"state": "queued"}',
        "",
        "id: 2",
        "event: note",
        "data: {",
        "data: }",
        "",
    ]
    events = list(parse_events(lines))
    assert [(event.sequence, event.kind, event.data) for event in events] == [
        (1, "state", {"state": "queued"}),
        (2, "note", {}),
    ]


class Breaking(httpx.SyncByteStream):
    """A stream that sends one event and breaks off."""

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield b'id: 1\nevent: state\ndata: {"state": "running"}\n\n'
        raise httpx.ReadError("reset")


def test_a_broken_stream_goes_on_after_the_last_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.client._RECONNECT_PAUSE_S", 0)
    asked_after: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked_after.append(request.headers.get("Last-Event-ID"))
        if len(asked_after) == 1:
            return httpx.Response(200, stream=Breaking())
        return httpx.Response(200, text='id: 2\nevent: state\ndata: {"state": "succeeded"}\n\n')

    with client(answer) as service:
        assert [event.data["state"] for event in service.events("j1")] == ["running", "succeeded"]
    assert asked_after == [None, "1"]
