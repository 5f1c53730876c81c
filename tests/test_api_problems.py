"""Every bad request gets one RFC 9457 problem document, and leaves nothing behind."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from typing import Any

import pytest
from api_fakes import GPT2, ONE_VARIANT
from fastapi.testclient import TestClient
from planner_api import problems
from planner_api.app import create_app
from planner_api.settings import Settings

from planner.errors import PlannerError, StoreError
from planner.processes import ChildError
from planner.store import Store

QUESTION = {"spec": ONE_VARIANT, "gpu": "h200", "batch_size": 4}


@pytest.fixture
def store(sqlite_url: str) -> Iterator[Store]:
    with Store.open(sqlite_url) as store:
        yield store


@pytest.fixture
def client(store: Store) -> Iterator[TestClient]:
    with TestClient(create_app(store, Settings(max_body_bytes=20_000)), raise_server_exceptions=False) as client:
        yield client


def spec_with(path: str, value: Any) -> dict[str, Any]:
    spec = json.loads(json.dumps(GPT2))
    *parents, last = path.split(".")
    node = spec
    for name in parents:
        node = node[name]
    node[last] = value
    return spec


def problem(reply: Any, status: int, code: str) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    document = reply.json()
    assert (document["status"], document["code"]) == (status, code)
    assert document["type"] == f"urn:planner:problem:{code}"
    assert document["title"]
    assert document["detail"]
    assert document["instance"].startswith("/")
    return document


BAD_QUESTIONS = [
    ({"gpu": "h2000"}, "invalid_argument", "gpu", "h200"),
    ({"gpu": 3}, "invalid_argument", "gpu", None),
    ({"capacity": "16 bananas"}, "invalid_argument", "capacity", None),
    ({"on": "h2000"}, "invalid_argument", "on", None),
    ({"on": "h200", "kind": "predict"}, "invalid_argument", "on", None),
    ({"capacity": "0GiB"}, "invalid_argument", "capacity", None),
    ({"capacity_bytes": -1}, "invalid_argument", "capacity_bytes", None),
    ({"capacity_bytes": 2**70}, "invalid_argument", "capacity_bytes", None),
    ({"capacity": "1GiB", "capacity_bytes": 5}, "invalid_argument", "capacity", None),
    ({"batch_size": 0}, "invalid_argument", "batch_size", None),
    ({"batch_size": "8"}, "invalid_argument", "batch_size", None),
    ({"batch_size": True}, "invalid_argument", "batch_size", None),
    ({"batch_size": 2**40}, "invalid_argument", "batch_size", None),
    ({"bach_size": 4}, "invalid_argument", "bach_size", "batch_size"),
    ({"spec": [1]}, "invalid_argument", "spec", None),
    ({"spec": None}, "invalid_argument", "spec", None),
    ({"spec": {}}, "invalid_spec", "model", None),
    ({"spec": spec_with("model.sauce", "timm")}, "invalid_spec", "model.sauce", "source"),
    ({"spec": spec_with("model.task", "causal-ml")}, "invalid_spec", "model.task", "causal-lm"),
    ({"spec": spec_with("variants.precision", ["bf16amp"])}, "invalid_spec", "variants.precision[0]", "bf16-amp"),
    ({"spec": spec_with("name", "a\x00b")}, "invalid_spec", None, None),
    ({"spec": spec_with("name", "\ud800")}, "invalid_spec", None, None),
]


@pytest.mark.parametrize("route", ["/v1/jobs", "/v1/preflight"])
@pytest.mark.parametrize(("change", "code", "field", "suggestion"), BAD_QUESTIONS)
def test_a_bad_question(
    client: TestClient,
    store: Store,
    route: str,
    change: dict[str, Any],
    code: str,
    field: str | None,
    suggestion: str | None,
) -> None:
    body = json.dumps({**QUESTION, **change})
    document = problem(client.post(route, content=body, headers={"Content-Type": "application/json"}), 422, code)
    if field is not None:
        assert document["field"] == field
    if suggestion is not None:
        assert document["suggestion"] == suggestion
    assert store.list_jobs().items == ()


def test_what_only_jobs_take(client: TestClient) -> None:
    wrong = client.post("/v1/jobs", json={**QUESTION, "kind": "prope"})
    assert problem(wrong, 422, "invalid_argument")["suggestion"] == "probe"
    assert (
        problem(client.post("/v1/jobs", json={**QUESTION, "fresh": "yes"}), 422, "invalid_argument")["field"] == "fresh"
    )
    assert problem(client.post("/v1/preflight", json={**QUESTION, "kind": "probe"}), 422, "invalid_argument")


@pytest.mark.parametrize("missing", ["gpu", "batch_size"])
def test_preflight_needs_a_gpu_and_a_batch_size(client: TestClient, missing: str) -> None:
    question = {key: value for key, value in QUESTION.items() if key != missing}
    assert problem(client.post("/v1/preflight", json=question), 422, "invalid_argument")["field"] == missing


@pytest.mark.parametrize(
    ("query", "field", "suggestion"),
    [
        ("gpu=h2000", "gpu", "h200"),
        ("batch_size=0", "batch_size", None),
        ("batch_size=1e3", "batch_size", None),
        ("batch_size=%C2%B2", "batch_size", None),
        ("batch_size=4&batch_size=5", "batch_size", None),
        ("batchsize=4", "batchsize", "batch_size"),
        ("capacity=", "capacity", None),
        ("fresh=maybe", "fresh", None),
        ("spec=x", "spec", None),
        ("kind=measure", "kind", None),
        ("capacity=9999999999999999TiB", "capacity", None),
    ],
)
def test_a_bad_query_beside_a_bare_spec(
    client: TestClient, store: Store, query: str, field: str, suggestion: str | None
) -> None:
    document = problem(client.post(f"/v1/jobs?{query}", json=ONE_VARIANT), 422, "invalid_argument")
    assert (document["field"], document.get("suggestion")) == (field, suggestion)
    assert store.list_jobs().items == ()


def test_a_value_given_twice(client: TestClient) -> None:
    assert problem(client.post("/v1/jobs?gpu=h200", json=QUESTION), 422, "invalid_argument")["field"] == "gpu"


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"[1]", "application/json"),
        (b"3", "application/json"),
        (b"\xff\xfe\x00", "application/json"),
        (b"[" * 9_000, "application/json"),
        (b'{"a": 1, "a": 2}', "application/json"),
        (b"a: [", "application/yaml"),
        (b"- 1", "application/yaml"),
        (b"!!python/object:os.system {}", "application/yaml"),
        (b"a: 1\na: 2", "application/yaml"),
    ],
)
def test_a_body_that_cannot_be_read(client: TestClient, body: bytes, content_type: str) -> None:
    problem(client.post("/v1/jobs", content=body, headers={"Content-Type": content_type}), 400, "malformed_body")


def test_a_yaml_bomb_is_refused_quickly(client: TestClient) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    reply = client.post("/v1/jobs", content="\n".join(lines), headers={"Content-Type": "application/yaml"})
    assert reply.status_code == 422


def test_a_large_body_is_refused_with_or_without_a_length(client: TestClient) -> None:
    large = json.dumps({**ONE_VARIANT, "name": "x" * 30_000})
    headers = {"Content-Type": "application/json"}
    problem(client.post("/v1/jobs", content=large, headers=headers), 413, "body_too_large")
    chunks = (large[start : start + 1000].encode() for start in range(0, len(large), 1000))
    problem(client.post("/v1/jobs", content=chunks, headers=headers), 413, "body_too_large")


def test_other_content_types(client: TestClient) -> None:
    reply = client.post("/v1/jobs", content=b"x", headers={"Content-Type": "application/x-pickle"})
    assert problem(reply, 415, "unsupported_media_type")["field"] == "content-type"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("DELETE", "/v1/jobs", 405, "method_not_allowed"),
        ("GET", "/v1/preflight", 405, "method_not_allowed"),
        ("GET", "/static/../app.py", 404, "not_found"),
        ("GET", "/v1/jobs/01ARZ3NDEKTSV4RRFFQ69G5FAV", 404, "not_found"),
        ("GET", "/v1/jobs/%00", 422, "invalid_argument"),
        ("GET", "/v1/jobs/01ARZ3NDEKTSV4RRFFQ69G5FAV/events", 404, "not_found"),
        ("POST", "/v1/jobs/01ARZ3NDEKTSV4RRFFQ69G5FAV/cancel", 404, "not_found"),
        ("GET", "/v1/jobs?limit=0", 422, "invalid_argument"),
        ("GET", "/v1/jobs?limit=x", 422, "invalid_argument"),
        ("GET", "/v1/jobs?cursor=nonsense", 422, "invalid_argument"),
        ("GET", "/v1/jobs?state=done", 422, "invalid_argument"),
        ("GET", "/v1/plans?gpu=h2000", 422, "invalid_argument"),
        ("GET", "/v1/plans?precision=bf16amp", 422, "invalid_argument"),
        ("GET", "/v1/plans?model=%00", 422, "invalid_argument"),
        ("GET", "/v1/capacity?batch_size=4", 422, "invalid_argument"),
        ("GET", "/v1/capacity?model=gpt2", 422, "invalid_argument"),
        ("GET", "/gpus/h2000", 404, "not_found"),
        ("GET", "/v1/plans?spec_hash=xyz", 422, "invalid_argument"),
    ],
)
def test_routes_and_parameters(client: TestClient, method: str, path: str, status: int, code: str) -> None:
    problem(client.request(method, path), status, code)


def test_the_nearest_value_of_a_parameter_is_named(client: TestClient) -> None:
    document = problem(client.get("/v1/plans?precision=bf16amp"), 422, "invalid_argument")
    assert (document["field"], document["suggestion"]) == ("precision", "bf16-amp")


def test_a_bad_last_event_id(client: TestClient) -> None:
    job_id = client.post("/v1/jobs", json=QUESTION).json()["id"]
    reply = client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": "seven"})
    assert problem(reply, 422, "invalid_argument")["field"] == "last-event-id"


def test_a_store_that_does_not_answer(client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StoreError("the database does not answer")

    for name in ("ping", "list_jobs", "count_jobs"):
        monkeypatch.setattr(store, name, fail)
    for path in ("/readyz", "/v1/jobs", "/metrics"):
        reply = client.get(path)
        problem(reply, 503, "store_error")
        assert reply.headers["retry-after"] == "5"
    assert client.get("/healthz").status_code == 200


def test_a_defect_is_a_problem_document_without_its_internals(
    client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(store, "list_jobs", fail)
    reply = client.get("/v1/jobs")
    problem(reply, 500, "internal_error")
    assert "secret" not in reply.text


def test_every_code_of_the_tree_has_a_status() -> None:
    def tree(kind: type[PlannerError]) -> set[str]:
        return {kind.code}.union(*map(tree, kind.__subclasses__()))

    assert {ChildError.code, StoreError.code} <= tree(PlannerError) <= set(problems.STATUS_OF_CODE)


def test_no_other_table_of_statuses() -> None:
    """The routes name statuses for their documentation only: nothing but ``problems`` raises an HTTP error."""
    from planner_api.routers import jobs, plans, preflight

    for module in (jobs, plans, preflight):
        names = {node.id for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Name)}
        assert "HTTPException" not in names


@pytest.mark.parametrize("path", ["/", "/docs", "/v1/gpus", "/v1/nothing"])
def test_security_headers_everywhere(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe-eval" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
