"""Server-sent events of a job, over a real server and a real socket."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from api_fakes import GPT2, ONE_VARIANT, serving
from fastapi.testclient import TestClient
from planner_api.app import create_app
from planner_api.settings import Settings

from planner.client import ServiceClient, ServiceEvent, parse_events
from planner.jobs import Claim, JobKind, JobRequest, JobState
from planner.store import Store


@pytest.fixture
def store(sqlite_url: str) -> Iterator[Store]:
    with Store.open(sqlite_url) as store:
        yield store


@pytest.fixture
def claim(store: Store) -> Claim:
    store.create_job(JobRequest(kind=JobKind.PROBE, spec=ONE_VARIANT, gpu="h200"))
    claim = store.claim_job("worker")
    assert claim is not None
    return claim


@pytest.fixture
def url(store: Store) -> Iterator[str]:
    with serving(create_app(store, Settings(events_poll_s=0.05))) as url:
        yield url


def read(url: str, claim: Claim, last: int | None = None) -> list[ServiceEvent]:
    headers = {} if last is None else {"Last-Event-ID": str(last)}
    with httpx.stream("GET", f"{url}/v1/jobs/{claim.job.id}/events", headers=headers, timeout=20) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        return list(parse_events(reply.iter_lines()))


def test_a_finished_job_is_told_from_the_start(store: Store, claim: Claim, url: str) -> None:
    store.append_event(claim, "trial_started", {"batch_size": 8})
    store.finish_job(claim, JobState.SUCCEEDED)
    events = read(url, claim)
    assert [event.sequence for event in events] == [1, 2, 3, 4]
    assert [event.kind for event in events] == ["state", "state", "trial_started", "state"]
    assert [event.data.get("state") for event in events] == ["queued", "running", None, "succeeded"]
    assert events[2].data["batch_size"] == 8
    assert events[2].data["at"].endswith("+00:00")


def test_a_stream_is_resumed_after_the_last_event(store: Store, claim: Claim, url: str) -> None:
    store.finish_job(
        claim, JobState.FAILED, {"code": "model_error", "message": "no", "field": None, "suggestion": None}
    )
    assert [event.sequence for event in read(url, claim, last=2)] == [3]
    assert read(url, claim, last=3) == []


def test_events_come_while_the_job_runs_and_end_with_it(store: Store, claim: Claim, url: str) -> None:
    arrived: list[tuple[float, ServiceEvent]] = []

    def follow() -> None:
        with ServiceClient(url) as client:
            arrived.extend((time.monotonic(), event) for event in client.events(claim.job.id))

    thread = threading.Thread(target=follow)
    thread.start()
    time.sleep(0.3)
    store.append_event(claim, "trial_started", {"batch_size": 8})
    time.sleep(0.6)
    finished = time.monotonic()
    store.finish_job(claim, JobState.SUCCEEDED)
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert [event.kind for _, event in arrived] == ["state", "state", "trial_started", "state"]
    assert arrived[2][0] < finished, "the event waited for the end of the job"


def follow_to_the_end(url: str, claim: Claim) -> None:
    with contextlib.suppress(httpx.TransportError):
        read(url, claim)


def test_a_server_that_stops_ends_its_streams(store: Store, claim: Claim) -> None:
    with serving(create_app(store, Settings(events_poll_s=0.05))) as url:
        thread = threading.Thread(target=follow_to_the_end, args=(url, claim), daemon=True)
        thread.start()
        time.sleep(0.3)
        started = time.monotonic()
    assert time.monotonic() - started < 8
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_an_idle_stream_asks_the_store_no_more_often_than_set(
    store: Store, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    events_after = store.events_after

    def counted(job_id: str, sequence: int = 0, limit: int | None = None):
        looks.append(time.monotonic())
        return events_after(job_id, sequence, limit)

    monkeypatch.setattr(store, "events_after", counted)
    timer = threading.Timer(1.0, lambda: store.finish_job(claim, JobState.SUCCEEDED))
    timer.start()
    with TestClient(create_app(store, Settings(events_poll_s=0.25))) as client:
        client.get(f"/v1/jobs/{claim.job.id}/events")
    assert 3 <= len(looks) <= 6


def test_two_followers_see_the_same(store: Store, claim: Claim, url: str) -> None:
    store.append_event(claim, "trial_started", {"batch_size": 8, "spec": GPT2["name"]})
    store.finish_job(claim, JobState.SUCCEEDED)
    assert read(url, claim) == read(url, claim)
