"""The HTTP service over a real store: jobs, plans, planning queries, operation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from api_fakes import GPT2, ONE_VARIANT, USER_CODE, store_plan
from fastapi.testclient import TestClient
from planner_api.app import create_app
from planner_api.settings import Settings

from planner.jobs import JobState
from planner.store import Store
from planner.trials import Source
from planner.units import GIB


@pytest.fixture
def store(sqlite_url: str) -> Iterator[Store]:
    with Store.open(sqlite_url) as store:
        yield store


@pytest.fixture
def client(store: Store) -> Iterator[TestClient]:
    with TestClient(create_app(store, Settings())) as client:
        yield client


def submit(client: TestClient, **question: Any) -> dict[str, Any]:
    reply = client.post("/v1/jobs", json={"spec": GPT2, "gpu": "h200", **question})
    assert reply.status_code == 202, reply.text
    return reply.json()


# Jobs


def test_a_job_names_the_gpu_type_that_stands_in_for_another(client: TestClient, store: Store) -> None:
    response = client.post("/v1/jobs?gpu=a10g&on=H200", json=GPT2)
    assert (response.status_code, response.json()["gpu"], response.json()["on"]) == (202, "a10g", "h200")
    assert store.claim_job("w", gpus=["a10g"]) is None
    claim = store.claim_job("w", gpus=["h200"])
    assert claim is not None
    assert (claim.job.request.gpu, claim.job.request.on) == ("a10g", "h200")


def test_the_page_of_a_failed_job_shows_the_whole_error(client: TestClient, store: Store) -> None:
    job_id = submit(client)["id"]
    claim = store.claim_job("w")
    assert claim is not None
    error = {"code": "invalid_spec", "message": "unknown key", "field": "model.config.a", "suggestion": "n_layer"}
    store.finish_job(claim, JobState.FAILED, error=error)
    page = client.get(f"/jobs/{job_id}").text
    assert "<code>model.config.a</code>: unknown key (did you mean <code>n_layer</code>?)" in page


def test_a_submitted_job_waits_in_the_store(client: TestClient, store: Store) -> None:
    reply = client.post(
        "/v1/jobs",
        json={"spec": GPT2, "gpu": "H200", "capacity": "16GiB", "batch_size": 8, "kind": "predict", "fresh": True},
    )
    assert reply.status_code == 202
    job = store.get_job(reply.json()["id"])
    assert reply.headers["location"] == f"/v1/jobs/{job.id}"
    assert job.state is JobState.QUEUED
    assert (job.request.kind, job.request.gpu, job.request.batch_size, job.request.fresh) == (
        "predict",
        "h200",
        8,
        True,
    )
    assert job.request.capacity_bytes == 16 * GIB
    assert job.request.spec == GPT2
    assert client.get(reply.headers["location"]).json()["spec"] == GPT2


def test_the_spec_alone_is_a_body_and_the_query_asks(client: TestClient, store: Store) -> None:
    reply = client.post("/v1/jobs?gpu=h200&capacity=16GiB&batch_size=4&kind=predict&fresh=true", json=GPT2)
    assert reply.status_code == 202
    request = store.get_job(reply.json()["id"]).request
    assert (request.gpu, request.capacity_bytes, request.batch_size) == ("h200", 16 * GIB, 4)
    assert (request.kind, request.fresh, request.spec) == ("predict", True, GPT2)


@pytest.mark.parametrize("content_type", ["application/yaml", "text/yaml; charset=utf-8", "application/x-yaml"])
def test_yaml_says_the_same(client: TestClient, store: Store, content_type: str) -> None:
    text = yaml.safe_dump({"spec": GPT2, "gpu": "h200", "capacity_bytes": GIB})
    reply = client.post("/v1/jobs", content=text, headers={"Content-Type": content_type})
    assert reply.status_code == 202
    request = store.get_job(reply.json()["id"]).request
    assert (request.spec, request.capacity_bytes) == (GPT2, GIB)


def test_an_idempotency_key_makes_one_job(client: TestClient, store: Store) -> None:
    send = {"spec": ONE_VARIANT, "gpu": "h200"}
    first = client.post("/v1/jobs", json=send, headers={"Idempotency-Key": "ci-17"})
    again = client.post("/v1/jobs", json=send, headers={"Idempotency-Key": "ci-17"})
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]
    other = client.post("/v1/jobs", json={**send, "batch_size": 2}, headers={"Idempotency-Key": "ci-17"})
    assert (other.status_code, other.json()["code"]) == (409, "conflict")
    assert len(store.list_jobs().items) == 1


def test_jobs_come_in_pages_newest_first(client: TestClient) -> None:
    ids = [submit(client, batch_size=size)["id"] for size in range(1, 6)]
    seen, cursor = [], None
    for _ in range(3):
        page = client.get("/v1/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [job["id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
    assert (seen, cursor) == (ids[::-1], None)
    assert "spec" not in page["jobs"][0]
    assert client.get("/v1/jobs?state=running").json()["jobs"] == []
    assert len(client.get("/v1/jobs?state=queued").json()["jobs"]) == 5


def test_a_finished_job_holds_its_plans_as_the_cli_prints_them(client: TestClient, store: Store) -> None:
    job_id = submit(client)["id"]
    plan = store_plan(store, largest=9)
    claim = store.claim_job("worker")
    assert claim is not None
    assert plan.id is not None
    store.finish_job(claim, JobState.SUCCEEDED, None, [plan.id])
    document = client.get(f"/v1/jobs/{job_id}").json()
    assert document["state"] == "succeeded"
    (shown,) = document["plans"]
    assert shown["variant"] == {"precision": "fp32", "checkpointing": "none", "compile": "off"}
    assert (shown["gpu"], shown["capacity_bytes"], shown["source"]) == ("h200", 16 * GIB, "predicted")
    assert (shown["max_batch_size"], shown["first_oom_batch_size"], shown["certified"]) == (9, 10, False)
    assert shown["peak_reserved_bytes"] == 15 * GIB
    assert "fits" not in shown


def test_a_queued_job_is_cancelled_at_once(client: TestClient) -> None:
    job_id = submit(client)["id"]
    assert client.post(f"/v1/jobs/{job_id}/cancel").json()["state"] == "cancelled"
    assert client.post(f"/v1/jobs/{job_id}/cancel").status_code == 200


def test_a_running_job_is_asked_to_stop_and_a_finished_one_refuses(client: TestClient, store: Store) -> None:
    job_id = submit(client)["id"]
    claim = store.claim_job("worker")
    assert claim is not None
    reply = client.post(f"/v1/jobs/{job_id}/cancel").json()
    assert (reply["state"], reply["cancel_requested"]) == ("running", True)
    store.finish_job(claim, JobState.SUCCEEDED)
    refused = client.post(f"/v1/jobs/{job_id}/cancel")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")


# User code


def test_user_code_is_refused_unless_the_operator_lists_it(client: TestClient, store: Store) -> None:
    refused = client.post("/v1/jobs", json={"spec": USER_CODE, "gpu": "h200"})
    assert refused.status_code == 422
    assert (refused.json()["code"], refused.json()["field"]) == ("target_not_allowed", "model.target")
    assert store.list_jobs().items == ()
    for allowed, status in [("other, my_project", 202), ("my_project.models", 202), ("my_proj", 422)]:
        with TestClient(create_app(store, Settings(allowed_targets=allowed))) as service:
            assert service.post("/v1/jobs", json={"spec": USER_CODE, "gpu": "h200"}).status_code == status


@pytest.mark.parametrize("key", ["loss", "step"])
def test_a_loss_or_step_of_the_users_own_is_user_code(client: TestClient, key: str) -> None:
    spec = {**ONE_VARIANT, "train": {key: "os.path:join"}}
    reply = client.post("/v1/preflight", json={"spec": spec, "gpu": "h200", "batch_size": 1})
    assert (reply.status_code, reply.json()["field"]) == (422, f"train.{key}")


# Plans


def test_plans_are_filtered(client: TestClient, store: Store) -> None:
    store_plan(store, variant=0)
    store_plan(store, variant=2, largest=20)
    store_plan(store, variant=2, gpu="a100-80gb", source=Source.MEASURED)
    for query, count in [
        ("", 3), ("model=gpt2", 3), ("model=bert", 0), ("gpu=h200", 2), ("gpu=A100-80GB", 1), ("precision=bf16-amp", 2),
        ("checkpointing=full", 0), ("compile=off", 3), ("source=measured", 1), ("batch_size=20", 1), ("limit=1", 1),
    ]:  # fmt: skip
        reply = client.get(f"/v1/plans?{query}")
        assert reply.status_code == 200
        assert len(reply.json()["plans"]) == count, query


def test_one_plan_by_its_id(client: TestClient, store: Store) -> None:
    plan = store_plan(store, largest=7)
    assert client.get(f"/v1/plans/{plan.id}").json()["max_batch_size"] == 7
    assert client.get("/v1/plans/01ARZ3NDEKTSV4RRFFQ69G5FAV").status_code == 404


def test_capacity_says_which_gpus_a_batch_size_fits_on(client: TestClient, store: Store) -> None:
    store_plan(store, gpu="h200", largest=20)
    store_plan(store, gpu="a100-80gb", largest=9)
    store_plan(store, gpu="rtx-4090", largest=9, first_oom_batch_size=None)
    report = client.get("/v1/capacity?model=gpt2&batch_size=12").json()
    assert report["fits_on"] == ["h200"]
    answers = {answer["gpu"]: (answer["fits"], answer["evidence_batch_size"]) for answer in report["answers"]}
    assert answers == {"h200": (True, 20), "a100-80gb": (False, 10), "rtx-4090": (None, None)}


def test_capacity_prefers_the_measurement(client: TestClient, store: Store) -> None:
    store_plan(store, largest=20, source=Source.MEASURED)
    store_plan(store, largest=10, source=Source.PREDICTED)
    (answer,) = client.get("/v1/capacity?model=gpt2&batch_size=12").json()["answers"]
    assert (answer["fits"], answer["source"], answer["certified"]) == (True, "measured", True)
    assert answer["samples_per_second"] == pytest.approx(20 / 0.271)


def test_the_catalogue(client: TestClient) -> None:
    names = [gpu["name"] for gpu in client.get("/v1/gpus").json()["gpus"]]
    assert {"h200", "a100-80gb", "rtx-4090"} <= set(names)


# Operation


class Dead:
    def is_alive(self) -> bool:
        return False


def test_health_and_readiness(client: TestClient, store: Store) -> None:
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get("/readyz").json() == {"status": "ready", "store": "ok", "dispatcher": "none"}
    with TestClient(create_app(store, Settings(), dispatcher=Dead())) as service:
        reply = service.get("/readyz")
        assert (reply.status_code, reply.json()["code"]) == (503, "not_ready")
        assert service.get("/healthz").status_code == 200


def test_metrics_count_requests_jobs_and_trials(client: TestClient) -> None:
    submit(client)
    client.get("/v1/jobs/01ARZ3NDEKTSV4RRFFQ69G5FAV")
    client.get("/no/such/path")
    text = client.get("/metrics").text
    assert 'planner_http_requests_total{method="POST",route="/v1/jobs",status="202"} 1.0' in text
    assert 'planner_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"} 1.0' in text
    assert 'route="other",status="404"} 1.0' in text
    assert 'planner_jobs{state="queued"} 1.0' in text
    assert "no/such/path" not in text


def test_the_docs_need_no_other_host(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    assert "://" not in page.text
    for asset in ["/assets/docs/swagger-ui-bundle.js", "/assets/docs/swagger-ui.css", "/static/docs.js"]:
        assert asset in page.text
        assert client.get(asset).status_code == 200


def test_the_openapi_document_is_complete(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    text = json.dumps(document)
    for reference in set(_references(document)):
        assert reference.rpartition("/")[2] in document["components"]["schemas"], reference
    assert "HTTPValidationError" not in text
    body = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "application/yaml"}
    for path, method in [("/v1/jobs", "post"), ("/v1/capacity", "get"), ("/v1/jobs/{job_id}/events", "get")]:
        answer = document["paths"][path][method]["responses"]["422"]
        assert list(answer["content"]) == ["application/problem+json"]


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def test_the_web_process_imports_no_torch() -> None:
    code = (
        "import sys, planner_api.app, planner_workers.worker\n"
        "heavy = {'torch', 'transformers', 'timm', 'torchvision', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    path = json.dumps(sys.path)
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:] = {path}\n{code}"], check=True, timeout=60)
