"""``POST /v1/preflight``: stored measurements first, else a prediction by the virtual GPU in its child process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from api_fakes import ONE_VARIANT
from fastapi.testclient import TestClient
from planner_api.app import create_app
from planner_api.settings import Settings

from planner.environment import predicted_environment
from planner.gpus import find_gpu
from planner.specs.document import parse_spec
from planner.store import Store
from planner.trials import Environment, Outcome, Peaks, Source, Trial
from planner.units import GIB

TINY: dict[str, Any] = {
    "model": {
        "source": "transformers",
        "model_type": "gpt2",
        "task": "causal-lm",
        "config": {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512, "use_cache": False},
    },
    "data": {"kind": "tokens", "sequence_length": 32},
}


@pytest.fixture
def store(sqlite_url: str) -> Iterator[Store]:
    with Store.open(sqlite_url) as store:
        yield store


@pytest.fixture
def client(store: Store) -> Iterator[TestClient]:
    with TestClient(create_app(store, Settings())) as client:
        yield client


def measured_environment() -> Environment:
    """As this machine's, but seen on a real H200."""
    here = predicted_environment(parse_spec(ONE_VARIANT), find_gpu("h200"))
    fields = {name: getattr(here, name) for name in here.__dataclass_fields__}
    return Environment(**{**fields, "source": Source.MEASURED, "gpu_name": "NVIDIA H200", "driver_version": "580.1"})


def store_trial(store: Store, batch_size: int, outcome: Outcome) -> None:
    spec = parse_spec(ONE_VARIANT)
    trial = Trial(
        batch_size=batch_size,
        outcome=outcome,
        source=Source.MEASURED,
        peaks=Peaks(allocated_bytes=14 * GIB, reserved_bytes=15 * GIB),
        fresh_process=True,
    )
    store.add_trial(spec, spec.variants.product()[0], measured_environment(), 16 * GIB, trial)


@pytest.mark.parametrize(
    ("batch_size", "verdict", "evidence"), [(8, "fits", 9), (9, "fits", 9), (11, "does_not_fit", 10)]
)
def test_a_stored_measurement_answers(
    client: TestClient, store: Store, batch_size: int, verdict: str, evidence: int
) -> None:
    store_trial(store, 9, Outcome.FITS)
    store_trial(store, 10, Outcome.OOM)
    reply = client.post(f"/v1/preflight?gpu=h200&capacity=16GiB&batch_size={batch_size}", json=ONE_VARIANT)
    assert reply.status_code == 200, reply.text
    document = reply.json()
    assert (document["verdict"], document["fits"]) == (verdict, verdict == "fits")
    assert (document["gpu"], document["batch_size"], document["capacity_bytes"]) == ("h200", batch_size, 16 * GIB)
    (variant,) = document["variants"]
    assert (variant["source"], variant["stored"], variant["evidence_batch_size"]) == ("measured", True, evidence)


def test_without_a_measurement_the_virtual_gpu_answers(client: TestClient) -> None:
    question = {"spec": TINY, "gpu": "h200", "batch_size": 2, "capacity": "16GiB"}
    document = client.post("/v1/preflight", json=question).json()
    assert document["verdict"] == "fits"
    (variant,) = document["variants"]
    assert (variant["source"], variant["evidence_batch_size"]) == ("predicted", 2)
    assert 0 < variant["peak_allocated_bytes"] <= variant["peak_reserved_bytes"] < GIB


def test_a_model_that_cannot_be_built_is_a_problem(client: TestClient) -> None:
    spec = {**TINY, "model": {**TINY["model"], "config": {"n_layerz": 2}}}
    reply = client.post("/v1/preflight", json={"spec": spec, "gpu": "h200", "batch_size": 2})
    assert reply.status_code == 422
    problem = reply.json()
    assert (problem["code"], problem["field"]) == ("invalid_spec", "model.config.n_layerz")
    assert problem["suggestion"] == "n_layer"


def test_a_prediction_that_takes_too_long_is_given_up(store: Store) -> None:
    with TestClient(create_app(store, Settings(preflight_timeout_s=0.05))) as client:
        reply = client.post("/v1/preflight", json={"spec": TINY, "gpu": "h200", "batch_size": 2})
    assert (reply.status_code, reply.json()["code"]) == (504, "timed_out")
