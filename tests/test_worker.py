"""The worker through the real planning code, on a device with a known threshold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from api_fakes import GPT2, MODEL_ERROR, ONE_VARIANT, USER_CODE, ThresholdDevice, choosing, raising, wait_until
from fastapi.testclient import TestClient
from planner_api.app import create_app
from planner_api.settings import Settings
from planner_workers.worker import Worker

from planner.errors import Conflict, StoreError
from planner.jobs import Claim, Job, JobKind, JobRequest, JobState
from planner.store import Store


def submit(store: Store, spec: dict[str, Any] = ONE_VARIANT, **changes: Any) -> str:
    request = JobRequest(**{"kind": JobKind.PROBE, "spec": spec, "gpu": "h200", **changes})
    return store.create_job(request)[0].id


@contextmanager
def working(store: Store, device: ThresholdDevice, **options: Any) -> Iterator[Worker]:
    """A worker in a thread, stopped and joined at the end."""
    worker = Worker(store, name="test", poll_s=0.02, choose=choosing(device), **options)
    stop = threading.Event()
    thread = threading.Thread(target=worker.run, args=(stop,), daemon=True)
    thread.start()
    try:
        yield worker
    finally:
        stop.set()
        thread.join(timeout=20)
        assert not thread.is_alive()


def finished(store: Store, job_id: str) -> Job:
    wait_until(lambda: store.get_job(job_id).state.is_final, 20)
    return store.get_job(job_id)


def test_a_job_from_submission_to_plans(store: Store) -> None:
    """Over HTTP, on both databases: submit, work, follow, read."""
    device = ThresholdDevice(largest=9)
    with TestClient(create_app(store, Settings(events_poll_s=0.05))) as client, working(store, device):
        reply = client.post("/v1/jobs", json={"spec": GPT2, "gpu": "h200", "capacity": "16GiB"})
        assert reply.status_code == 202
        job_id = reply.json()["id"]
        stream = client.get(f"/v1/jobs/{job_id}/events").text
        document = client.get(f"/v1/jobs/{job_id}").json()
        listed = client.get("/v1/plans?gpu=h200").json()["plans"]
    assert document["state"] == "succeeded"
    assert [plan["max_batch_size"] for plan in document["plans"]] == [9, 9, 9, 9]
    assert [plan["variant"]["precision"] for plan in document["plans"]] == ["fp32", "fp32", "bf16-amp", "bf16-amp"]
    assert all(plan["source"] == "predicted" and plan["first_oom_batch_size"] == 10 for plan in document["plans"])
    assert len(listed) == 4
    assert {"state", "note", "variant_started", "trial_started", "trial_finished", "variant_finished"} <= {
        line.removeprefix("event: ") for line in stream.splitlines() if line.startswith("event: ")
    }
    assert '"outcome":"oom"' in stream.replace(" ", "")


def test_one_batch_size(store: Store) -> None:
    with working(store, ThresholdDevice(largest=9)):
        yes, no = submit(store, batch_size=9), submit(store, batch_size=10)
        plans = [store.get_plan(finished(store, job_id).plan_ids[0]) for job_id in (yes, no)]
    assert [(plan.batch_size, plan.fits) for plan in plans] == [(9, True), (10, False)]


def test_a_repeated_job_is_answered_from_the_store(store: Store) -> None:
    device = ThresholdDevice()
    with working(store, device):
        first = finished(store, submit(store))
        trials = len(device.batch_sizes)
        again = finished(store, submit(store))
        assert len(device.batch_sizes) == trials
        assert again.plan_ids == first.plan_ids
        finished(store, submit(store, fresh=True))
        assert len(device.batch_sizes) > trials


def gate() -> tuple[threading.Event, threading.Event, Callable[[int], None]]:
    """``(entered, go, before)``: a device whose trials wait for ``go``."""
    entered, go = threading.Event(), threading.Event()

    def before(batch_size: int) -> None:
        entered.set()
        assert go.wait(20)

    return entered, go, before


def test_cancel_stops_after_the_running_trial(store: Store) -> None:
    entered, go, before = gate()
    device = ThresholdDevice(before=before)
    with working(store, device):
        job_id = submit(store, GPT2)
        assert entered.wait(10)
        assert store.cancel_job(job_id).cancel_requested
        go.set()
        assert finished(store, job_id).state is JobState.CANCELLED
    assert len(device.batch_sizes) == 1


def test_plans_that_were_finished_outlive_a_cancellation(store: Store) -> None:
    entered, go, wait = gate()
    device = ThresholdDevice(before=lambda batch_size: wait(batch_size) if store.count_plans() else None)
    with working(store, device):
        job_id = submit(store, GPT2)
        assert entered.wait(10), "the second variant was not begun"
        store.cancel_job(job_id)
        go.set()
        job = finished(store, job_id)
    assert job.state is JobState.CANCELLED
    (plan_id,) = job.plan_ids
    assert store.get_plan(plan_id).max_batch_size == 9


@pytest.mark.parametrize(
    ("error", "code"),
    [(MODEL_ERROR, "model_error"), (RuntimeError("a driver bug"), "planner_error")],
    ids=["known", "crash"],
)
def test_a_failing_job_does_not_end_the_worker(store: Store, error: Exception, code: str) -> None:
    device = ThresholdDevice(before=raising(error))
    with working(store, device):
        failed = finished(store, submit(store))
        device._before = None
        fine = finished(store, submit(store, batch_size=3))
    assert fine.state is JobState.SUCCEEDED
    assert failed.state is JobState.FAILED
    assert failed.error is not None
    assert failed.error["code"] == code


def test_the_worker_refuses_user_code_that_its_operator_did_not_allow(store: Store) -> None:
    device = ThresholdDevice()
    with working(store, device):
        job = finished(store, submit(store, USER_CODE))
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert (job.error["code"], job.error["field"]) == ("target_not_allowed", "model.target")
    assert device.batch_sizes == []
    with working(store, device, allowed_targets=["my_project"]):
        assert finished(store, submit(store, USER_CODE)).state is JobState.SUCCEEDED


def test_a_stopped_worker_gives_its_job_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner_workers.worker.STOP_GRACE_S", 0.2)
    entered, go, before = gate()
    stuck = ThresholdDevice(before=before)
    with working(store, stuck):
        job_id = submit(store)
        assert entered.wait(10)
    job = store.get_job(job_id)
    assert (job.state, job.attempt) == (JobState.QUEUED, 0)
    with working(store, ThresholdDevice(largest=9)):
        done = finished(store, job_id)
    go.set()
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)
    assert store.get_plan(done.plan_ids[0]).max_batch_size == 9


def test_a_worker_that_lost_its_claim_writes_nothing_more(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go, before = gate()
    with working(store, ThresholdDevice(before=before), lease_s=0.3):
        job_id = submit(store)
        assert entered.wait(10)
        with monkeypatch.context() as partition:
            partition.setattr(store, "heartbeat", raising(StoreError("the database does not answer")))
            partition.setattr(store, "claim_job", lambda *_, **__: None)
            other: list[Claim] = []
            wait_until(lambda: (claim := Store.claim_job(store, "other")) is not None and not other.append(claim))
        store.finish_job(other[0], JobState.SUCCEEDED)
        events = store.events_after(job_id)
        go.set()
    job = store.get_job(job_id)
    assert (job.state, job.worker, job.attempt) == (JobState.SUCCEEDED, "other", 2)
    assert store.events_after(job_id) == events


def test_a_store_that_is_away_for_a_moment_does_not_end_the_worker(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_job, failures = store.claim_job, [0]

    def flaky(*args: Any, **kwargs: Any):
        failures[0] += 1
        if failures[0] < 4:
            raise StoreError("the database does not answer")
        return claim_job(*args, **kwargs)

    monkeypatch.setattr(store, "claim_job", flaky)
    with working(store, ThresholdDevice()):
        assert finished(store, submit(store)).state is JobState.SUCCEEDED


def test_two_workers_share_the_jobs(store: Store) -> None:
    device = ThresholdDevice()
    jobs = [submit(store, batch_size=size) for size in range(1, 9)]
    with working(store, device), working(store, device):
        assert {finished(store, job_id).state for job_id in jobs} == {JobState.SUCCEEDED}
    assert sorted(device.batch_sizes) == sorted(set(device.batch_sizes)), "a job was worked twice"


def test_a_released_job_waits_again_and_its_old_claim_is_void(store: Store) -> None:
    job_id = submit(store)
    claim = store.claim_job("one")
    assert claim is not None
    released = store.release_job(claim)
    assert (released.state, released.attempt, released.worker) == (JobState.QUEUED, 0, None)
    with pytest.raises(Conflict):
        store.heartbeat(claim)
    again = store.claim_job("two")
    assert again is not None
    assert again.token > claim.token
    store.cancel_job(job_id)
    assert store.release_job(again).state is JobState.CANCELLED
