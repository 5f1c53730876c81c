"""The contract of the store for jobs, on both databases: one worker at a time, and no word from an old one."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_fakes import json_objects, make_request, texts

from planner.errors import Conflict, InvalidArgument, NotFound
from planner.jobs import Claim, JobKind, JobState
from planner.store import Store

EXPIRED = -1.0
"""A lease that has run out when it is given."""


def claim(store: Store, worker: str = "w", **options: Any) -> Claim:
    taken = store.claim_job(worker, **options)
    assert taken is not None
    return taken


def states(store: Store, job_id: str) -> list[str]:
    return [event.data["state"] for event in store.events_after(job_id) if event.kind == "state"]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(JobKind), spec=json_objects, gpu=st.none() | texts,
    capacity_bytes=st.none() | st.integers(1), batch_size=st.none() | st.integers(1), fresh=st.booleans(),
)  # fmt: skip
def test_a_request_comes_back_equal(store: Store, **fields: Any) -> None:
    request = make_request(**fields)
    job, created = store.create_job(request)
    assert created
    assert job.request == request
    assert store.get_job(job.id) == job


def test_a_job_from_queue_to_success(store: Store) -> None:
    queued, _ = store.create_job(make_request())
    assert (queued.state, queued.attempt, queued.worker) == (JobState.QUEUED, 0, None)
    taken = claim(store, "w1")
    assert taken.job.id == queued.id
    assert (taken.job.state, taken.job.attempt, taken.job.worker) == (JobState.RUNNING, 1, "w1")
    assert store.claim_job("w2") is None
    assert store.heartbeat(taken) is False
    event = store.append_event(taken, "trial_started", {"batch_size": 8})
    done = store.finish_job(taken, JobState.SUCCEEDED, plan_ids=["P1", "P2"])
    assert (done.state, done.plan_ids, done.error) == (JobState.SUCCEEDED, ("P1", "P2"), None)
    assert done.started_at is not None
    assert done.finished_at is not None
    assert done.created_at <= done.finished_at
    assert store.get_job(queued.id) == done

    events = store.events_after(queued.id)
    assert [(e.sequence, e.kind) for e in events] == [
        (1, "state"), (2, "state"), (3, "trial_started"), (4, "state"),
    ]  # fmt: skip
    assert states(store, queued.id) == ["queued", "running", "succeeded"]
    assert events[2] == event
    assert [e.sequence for e in store.events_after(queued.id, 2)] == [3, 4]
    assert [e.sequence for e in store.events_after(queued.id, 1, limit=2)] == [2, 3]


def test_a_failed_job_says_why(store: Store) -> None:
    store.create_job(make_request())
    error = {"code": "model_error", "message": "no loss", "field": "model", "suggestion": None}
    job = store.finish_job(claim(store), JobState.FAILED, error=error)
    assert (job.state, job.error) == (JobState.FAILED, error)
    assert store.events_after(job.id)[-1].data["error"] == error


def test_a_job_cannot_end_running(store: Store) -> None:
    store.create_job(make_request())
    taken = claim(store)
    with pytest.raises(InvalidArgument, match=r"^state: a job cannot end as running"):
        store.finish_job(taken, JobState.RUNNING)
    assert store.get_job(taken.job.id).state is JobState.RUNNING


def test_jobs_are_taken_oldest_first(store: Store) -> None:
    ids = [store.create_job(make_request())[0].id for _ in range(3)]
    assert [claim(store).job.id for _ in ids] == ids


def test_the_same_key_and_request_is_the_same_job(store: Store) -> None:
    job, created = store.create_job(make_request(), "key-1")
    again, created_again = store.create_job(make_request(), "key-1")
    assert (created, created_again) == (True, False)
    assert again == job
    with pytest.raises(Conflict, match=rf"^Idempotency-Key: was used for another request before .*{job.id}"):
        store.create_job(make_request(batch_size=4), "key-1")
    assert store.create_job(make_request(), "key-2")[1]
    assert len(store.list_jobs().items) == 2


def test_the_same_key_at_once_makes_one_job(store: Store) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: store.create_job(make_request(), "key"), range(6)))
    assert len({job.id for job, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "a\0b"])
def test_a_bad_key_is_named(store: Store, key: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^Idempotency-Key: "):
        store.create_job(make_request(), key)
    assert store.list_jobs().items == ()


def test_workers_take_only_what_they_can_do(store: Store) -> None:
    predict, _ = store.create_job(make_request(kind=JobKind.PREDICT, gpu="a10g"))
    probe_h200, _ = store.create_job(make_request(gpu="h200"))
    probe_any, _ = store.create_job(make_request(gpu=None))
    assert store.claim_job("w", kinds=[]) is None
    assert store.claim_job("w", kinds=[JobKind.PROBE], gpus=["a100-80gb"], lease_s=EXPIRED) is not None  # probe_any
    assert claim(store, gpus=["h200"], kinds=[JobKind.PROBE]).job.id == probe_h200.id
    assert claim(store, gpus=["h200"], kinds=[JobKind.PREDICT]).job.id == predict.id
    again = claim(store, gpus=[])
    assert (again.job.id, again.job.attempt) == (probe_any.id, 2)
    assert store.claim_job("w") is None


def test_several_workers_take_each_job_once(store: Store) -> None:
    ids = {store.create_job(make_request())[0].id for _ in range(24)}
    start = threading.Barrier(6)

    def work(worker: int) -> list[str]:
        start.wait()
        taken = []
        while next_claim := store.claim_job(f"w{worker}"):
            taken.append(next_claim.job.id)
            store.finish_job(next_claim, JobState.SUCCEEDED)
        return taken

    with ThreadPoolExecutor(6) as pool:
        taken = [job_id for jobs in pool.map(work, range(6)) for job_id in jobs]
    assert Counter(taken) == Counter(ids)
    assert store.count_jobs() == {state: 24 if state is JobState.SUCCEEDED else 0 for state in JobState}


def test_a_worker_that_fell_silent_is_fenced_off(store: Store) -> None:
    store.create_job(make_request())
    old = claim(store, "old", lease_s=EXPIRED)
    new = claim(store, "new")
    assert (new.job.id, new.job.attempt, new.job.worker) == (old.job.id, 2, "new")
    assert new.token == old.token + 1
    for write in (
        lambda: store.heartbeat(old),
        lambda: store.append_event(old, "trial_started", {}),
        lambda: store.finish_job(old, JobState.SUCCEEDED, plan_ids=["P"]),
    ):
        with pytest.raises(Conflict, match=f"the claim on job {old.job.id} is void"):
            write()
    assert store.get_job(old.job.id) == new.job
    assert states(store, old.job.id) == ["queued", "running", "running"]
    assert store.finish_job(new, JobState.SUCCEEDED).plan_ids == ()
    with pytest.raises(Conflict):
        store.finish_job(new, JobState.FAILED)
    assert store.get_job(old.job.id).state is JobState.SUCCEEDED


def test_a_heartbeat_keeps_the_job(store: Store) -> None:
    store.create_job(make_request())
    taken = claim(store, lease_s=EXPIRED)
    store.heartbeat(taken)
    assert store.claim_job("other") is None
    store.heartbeat(taken, lease_s=EXPIRED)
    assert store.claim_job("other") is not None


def test_a_job_that_silences_every_worker_is_given_up(store: Store) -> None:
    deadly, _ = store.create_job(make_request())
    harmless, _ = store.create_job(make_request())
    for attempt in (1, 2, 3):
        taken = claim(store, lease_s=EXPIRED)
        assert (taken.job.id, taken.job.attempt) == (deadly.id, attempt)
    assert claim(store).job.id == harmless.id
    job = store.get_job(deadly.id)
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error["code"] == "device_lost"
    assert "3 workers in a row" in job.error["message"]
    assert job.finished_at is not None


def test_a_released_job_is_free_at_once_and_its_attempt_uncounted(store: Store) -> None:
    job, _ = store.create_job(make_request())
    old = claim(store, "old")
    released = store.release_job(old)
    assert (released.state, released.attempt, released.worker) == (JobState.QUEUED, 0, None)
    with pytest.raises(Conflict):
        store.release_job(old)
    new = claim(store, "new")
    assert (new.job.id, new.job.attempt, new.token) == (job.id, 1, old.token + 1)
    assert states(store, job.id) == ["queued", "running", "queued", "running"]
    store.cancel_job(job.id)
    assert store.release_job(new).state is JobState.CANCELLED


def test_cancelling_a_waiting_job_is_at_once_and_twice_is_once(store: Store) -> None:
    job, _ = store.create_job(make_request())
    cancelled = store.cancel_job(job.id)
    assert (cancelled.state, cancelled.cancel_requested) == (JobState.CANCELLED, True)
    assert store.cancel_job(job.id) == cancelled
    assert store.claim_job("w") is None
    assert states(store, job.id) == ["queued", "cancelled"]


def test_cancelling_a_running_job_asks_its_worker(store: Store) -> None:
    job, _ = store.create_job(make_request())
    taken = claim(store)
    asked = store.cancel_job(job.id)
    assert (asked.state, asked.cancel_requested) == (JobState.RUNNING, True)
    assert store.cancel_job(job.id) == asked
    assert store.heartbeat(taken) is True
    assert store.finish_job(taken, JobState.CANCELLED, plan_ids=["P1"]).plan_ids == ("P1",)
    assert states(store, job.id) == ["queued", "running", "running", "cancelled"]


def test_cancelling_an_abandoned_job_needs_no_worker(store: Store) -> None:
    job, _ = store.create_job(make_request())
    taken = claim(store, lease_s=EXPIRED)
    assert store.cancel_job(job.id).state is JobState.CANCELLED
    with pytest.raises(Conflict):
        store.heartbeat(taken)


def test_an_abandoned_job_with_a_wish_to_cancel_is_not_run_again(store: Store) -> None:
    job, _ = store.create_job(make_request())
    taken = claim(store)
    store.cancel_job(job.id)
    store.heartbeat(taken, lease_s=EXPIRED)
    assert store.claim_job("other") is None
    assert store.get_job(job.id).state is JobState.CANCELLED


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
def test_a_finished_job_cannot_be_cancelled(store: Store, state: JobState) -> None:
    store.create_job(make_request())
    job = store.finish_job(claim(store), state)
    with pytest.raises(Conflict, match=f"^id: the job has already {state}"):
        store.cancel_job(job.id)
    assert store.get_job(job.id) == job


def test_events_of_many_writers_are_numbered_without_gaps(store: Store) -> None:
    job, _ = store.create_job(make_request())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: store.append_event(job.id, "trial_started", {"i": i}), range(20)))
    events = store.events_after(job.id)
    assert [event.sequence for event in events] == list(range(1, 22))
    assert {event.data["i"] for event in events[1:]} == set(range(20))


def test_jobs_are_listed_in_pages_and_by_state(store: Store) -> None:
    ids = [store.create_job(make_request())[0].id for _ in range(3)]
    first = store.list_jobs(limit=2)
    second = store.list_jobs(limit=2, cursor=first.next_cursor)
    assert [job.id for job in (*first.items, *second.items)] == ids[::-1]
    assert second.next_cursor is None
    running = claim(store).job
    assert store.list_jobs(state=JobState.RUNNING).items == (running,)
    assert [job.id for job in store.list_jobs(state=JobState.QUEUED).items] == [ids[2], ids[1]]


def test_an_unknown_job_is_not_found(store: Store) -> None:
    for ask in (
        store.get_job,
        store.cancel_job,
        store.events_after,
        lambda job_id: store.append_event(job_id, "x", {}),
    ):
        with pytest.raises(NotFound, match=r"^id: there is no job 'nope'"):
            ask("nope")
        with pytest.raises(InvalidArgument, match=r"^id: "):
            ask("a\0")
