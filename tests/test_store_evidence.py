"""The contract of the store for trials and plans, on SQLite and on PostgreSQL."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_fakes import (
    BF16,
    FP32,
    GIB,
    environments,
    make_environment,
    make_plan,
    make_spec,
    make_trial,
    plan_fields,
    trials,
    variants,
)  # fmt: skip

from planner.errors import InvalidArgument, NotFound, StoreError
from planner.specs.variants import Variant
from planner.store import GpuPlans, PlanFilter, Store
from planner.trials import Environment, Outcome, Plan, PlanStatus, Source, Trial

# One store serves all examples of a test: each looks up its own record by id.
shared_store = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@shared_store
@given(variant=variants, environment=environments, capacity=st.integers(1, 2**63 - 1), trial=trials)
def test_a_trial_comes_back_equal(
    store: Store, variant: Variant, environment: Environment, capacity: int, trial: Trial
) -> None:
    spec = make_spec()
    trial_id = store.add_trial(spec, variant, environment, capacity, trial, worker="w1")
    (found,) = [stored for stored in store.find_trials(spec.hash, variant) if stored.id == trial_id]
    assert (found.trial, found.environment, found.capacity_bytes, found.worker) == (trial, environment, capacity, "w1")
    assert found.environment.key() == environment.key()
    if trial.started_at is not None:
        assert found.trial.started_at is not None
        assert found.trial.started_at.utcoffset() == timedelta(0)


@shared_store
@given(given_fields=plan_fields)
def test_a_plan_comes_back_equal_with_its_trials_in_order(store: Store, given_fields: dict[str, Any]) -> None:
    spec = make_spec()
    plan = Plan(spec_hash=spec.hash, **given_fields)
    trial_ids = [store.add_trial(spec, plan.variant, plan.environment, plan.capacity_bytes, t) for t in plan.trials]
    plan_id = store.add_plan(spec, plan, trial_ids)
    assert store.get_plan(plan_id) == replace(plan, id=plan_id, stored=True)


def test_strange_evidence_is_kept_rather_than_lost(store: Store) -> None:
    spec = make_spec()
    trial = make_trial(
        outcome=Outcome.FAILED, peaks=None, error="killed\0 \udcff", details={"loss": float("nan"), "text": "a\0b"}
    )
    store.add_trial(spec, FP32, make_environment(hostname="bo\0x"), GIB, trial)
    (found,) = store.find_trials(spec.hash, FP32)
    assert found.trial.error == "killed\N{REPLACEMENT CHARACTER} ?"
    assert found.trial.details == {"loss": "nan", "text": "a\0b"}
    assert found.environment.hostname == "bo\N{REPLACEMENT CHARACTER}x"


def test_a_time_without_zone_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="timezone-aware"):
        store.add_trial(make_spec(), FP32, make_environment(), GIB, make_trial(started_at=datetime(2026, 1, 1)))
    assert store.find_trials(make_spec().hash, FP32) == []


def test_find_trials_tells_work_variant_gpu_environment_and_source_apart(store: Store) -> None:
    spec, other = make_spec("gpt2"), make_spec("bert")
    h200, newer = make_environment("h200"), make_environment("h200", torch_version="2.14.0")
    virtual = make_environment("a10g", Source.PREDICTED)

    def add(spec_: Any, variant: Variant, environment: Environment) -> str:
        return store.add_trial(spec_, variant, environment, GIB, make_trial(source=environment.source))

    first, second, third = add(spec, FP32, h200), add(spec, FP32, newer), add(spec, FP32, virtual)
    add(other, FP32, h200)
    fourth = add(spec, BF16, h200)

    def found(variant: Variant = FP32, **filters: Any) -> list[str]:
        return [stored.id for stored in store.find_trials(spec.hash, variant, **filters)]

    assert found() == [third, second, first]
    assert found(BF16) == [fourth]
    assert found(gpu="h200") == [second, first]
    assert found(environment_key=h200.key()) == [first]
    assert found(source=Source.PREDICTED) == [third]
    assert found(gpu="h200", source=Source.PREDICTED) == []


def test_equal_work_and_environments_are_stored_once(store: Store) -> None:
    spec = make_spec()
    ids = [store.add_trial(spec, FP32, make_environment(), GIB, make_trial(size)) for size in (1, 2, 3)]
    assert sorted(ids) == ids
    assert store.get_spec(spec.hash)["model"] == {
        "source": "transformers", "name": "gpt2", "task": "causal-lm", "config": {"n_layer": 12},
    }  # fmt: skip
    with pytest.raises(NotFound, match="spec_hash"):
        store.get_spec("0" * 64)


def test_find_plan_answers_exactly_the_question_asked(store: Store) -> None:
    spec, environment = make_spec(), make_environment()
    plan_id = store.add_plan(spec, make_plan(spec, environment), [])
    key = environment.key()

    found = store.find_plan(spec.hash, FP32, key, 16 * GIB)
    assert found is not None
    assert (found.id, found.stored, found.max_batch_size) == (plan_id, True, 9)
    # Another card of the same type, in another host, is the same question ...
    assert store.find_plan(spec.hash, FP32, make_environment(gpu_uuid="GPU-2", hostname="b").key(), 16 * GIB) == found
    # ... and each of these is another one.
    assert store.find_plan(make_spec("bert").hash, FP32, key, 16 * GIB) is None
    assert store.find_plan(spec.hash, BF16, key, 16 * GIB) is None
    assert store.find_plan(spec.hash, FP32, make_environment(torch_version="2.14.0").key(), 16 * GIB) is None
    assert store.find_plan(spec.hash, FP32, key, 40 * GIB) is None
    assert store.find_plan(spec.hash, FP32, key, 16 * GIB, batch_size=9) is None


def test_find_plan_prefers_the_newest_and_ignores_failures(store: Store) -> None:
    spec, environment = make_spec(), make_environment()
    one_size = {"batch_size": 8, "max_batch_size": None, "first_oom_batch_size": None}
    store.add_plan(spec, make_plan(spec, environment, **one_size, fits=False), [])
    newest = store.add_plan(spec, make_plan(spec, environment, **one_size, fits=True), [])
    for status in (PlanStatus.FAILED, PlanStatus.UNSUPPORTED):
        store.add_plan(spec, make_plan(spec, environment, **one_size, status=status, error={"code": "x"}), [])
    found = store.find_plan(spec.hash, FP32, environment.key(), 16 * GIB, batch_size=8)
    assert found is not None
    assert (found.id, found.fits) == (newest, True)


def test_a_plan_of_unknown_trials_is_refused_whole(store: Store) -> None:
    spec = make_spec()
    with pytest.raises(NotFound, match="trial_ids: there is no trial '01'"):
        store.add_plan(spec, make_plan(spec), ["01"])
    assert store.list_plans().items == ()


def test_two_plans_may_rest_on_the_same_trial(store: Store) -> None:
    spec, environment, trial = make_spec(), make_environment(), make_trial()
    trial_id = store.add_trial(spec, FP32, environment, 16 * GIB, trial)
    for _ in range(2):
        store.add_plan(spec, make_plan(spec, environment, trials=(trial,)), [trial_id])
    assert [plan.trials for plan in store.list_plans().items] == [(trial,), (trial,)]


def test_pages_show_every_plan_once_newest_first_while_more_arrive(store: Store) -> None:
    spec = make_spec()
    ids = [store.add_plan(spec, make_plan(spec), []) for _ in range(5)]
    first = store.list_plans(limit=2)
    store.add_plan(spec, make_plan(spec), [])
    second = store.list_plans(limit=2, cursor=first.next_cursor)
    third = store.list_plans(limit=2, cursor=second.next_cursor)
    seen = [plan.id for page in (first, second, third) for plan in page.items]
    assert seen == ids[::-1]
    assert third.next_cursor is None


def test_plans_are_ordered_by_their_own_time(store: Store) -> None:
    spec, now = make_spec(), datetime.now(UTC)
    new = store.add_plan(spec, make_plan(spec, created_at=now), [])
    old = store.add_plan(spec, make_plan(spec, created_at=now - timedelta(days=1)), [])
    assert [plan.id for plan in store.list_plans().items] == [new, old]


def test_filters_of_list_plans(store: Store) -> None:
    gpt2, bert = make_spec("gpt2"), make_spec("bert")
    a10g = make_environment("a10g", Source.PREDICTED)
    first = store.add_plan(gpt2, make_plan(gpt2), [])
    second = store.add_plan(gpt2, make_plan(gpt2, a10g, BF16), [])
    one_size = {"batch_size": 9, "max_batch_size": None, "first_oom_batch_size": None, "fits": True}
    third = store.add_plan(bert, make_plan(bert, **one_size), [])

    def found(**wanted: Any) -> list[str | None]:
        return [plan.id for plan in store.list_plans(PlanFilter(**wanted)).items]

    assert found() == [third, second, first]
    assert found(model="gpt2") == [second, first]
    assert found(gpu="a10g") == [second]
    assert found(precision="bf16-amp") == found(checkpointing="full") == [second]
    assert found(compile="off") == [third, second, first]
    assert found(source="predicted") == [second]
    assert found(spec_hash=bert.hash) == [third]
    assert found(batch_size=9) == [third, second, first]
    assert found(batch_size=10) == found(batch_size=2**63 - 1) == []
    assert found(model="gpt2", gpu="h200") == [first]
    assert found(model="' OR 1=1 --") == []


@pytest.mark.parametrize("cursor", ["", "x", "01M7YFFDWD84B105R1BFSM780", "01M7YFFDWD84B105R1BFSM780SS", "' OR 1=1 --"])
def test_a_bad_cursor_is_named(store: Store, cursor: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^cursor: "):
        store.list_plans(cursor=cursor)
    with pytest.raises(InvalidArgument, match=r"^cursor: "):
        store.list_jobs(cursor=cursor)


@pytest.mark.parametrize("limit", [-1, 0, 201])
def test_a_bad_limit_is_named(store: Store, limit: int) -> None:
    with pytest.raises(InvalidArgument, match=r"^limit: "):
        store.list_plans(limit=limit)


@pytest.mark.parametrize(
    ("wanted", "field"),
    [({"model": "a\0"}, "model"), ({"gpu": "\ud800"}, "gpu"), ({"batch_size": -1}, "batch_size"),
     ({"batch_size": 2**63}, "batch_size")],
)  # fmt: skip
def test_a_filter_that_no_database_can_compare_is_named(wanted: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field}: "):
        PlanFilter(**wanted)


def test_an_unknown_plan_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound, match=r"^id: there is no plan '1'"):
        store.get_plan("1")
    with pytest.raises(InvalidArgument, match=r"^id: "):
        store.get_plan("a\0")


def test_plans_are_counted_by_gpu_type(store: Store) -> None:
    spec = make_spec()
    assert store.count_plans() == ()
    for environment in (make_environment(), make_environment(), make_environment("a10g", Source.PREDICTED)):
        store.add_plan(spec, make_plan(spec, environment), [])
    assert store.count_plans() == (
        GpuPlans(gpu="a10g", num_measured=0, num_predicted=1),
        GpuPlans(gpu="h200", num_measured=2, num_predicted=0),
    )
    assert [counted.num_plans for counted in store.count_plans()] == [1, 2]


def test_trials_are_counted_by_evidence_and_outcome(store: Store) -> None:
    spec, environment = make_spec(), make_environment()
    for outcome in (Outcome.FITS, Outcome.FITS, Outcome.OOM):
        store.add_trial(spec, FP32, environment, GIB, make_trial(outcome=outcome))
    store.add_trial(spec, FP32, environment, GIB, make_trial(source=Source.PREDICTED))
    assert store.count_trials() == {
        (Source.MEASURED, Outcome.FITS): 2,
        (Source.MEASURED, Outcome.OOM): 1,
        (Source.PREDICTED, Outcome.FITS): 1,
    }
