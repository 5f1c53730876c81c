"""Which single changes are tried, which are left out and why, and what they gain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.advice import Advice, advise, only, possible_changes
from planner.planning import plan_sweep
from planner.reports import advice_dict
from planner.specs.model import DataKind, DataSpec, ModelSource, ModelSpec, OptimizerSpec, Spec, TrainSpec
from planner.specs.variants import Checkpointing, Compile, Loss, OptimizerImplementation, Precision, Variant
from planner.trials import Plan, PlanStatus, Source
from tests.planning_fakes import ThresholdDevice, make_spec

HOPPER, TURING = (9, 0), (7, 5)
BF16_AMP = Variant(precision=Precision.BF16_AMP)


def _labels(spec: Spec, variant: Variant, conf: str = "", capability: tuple[int, int] = HOPPER) -> list[str]:
    return [change.label for change in possible_changes(spec, variant, conf, capability)[0]]


def _reasons(spec: Spec, variant: Variant, conf: str = "", capability: tuple[int, int] = HOPPER) -> dict[str, str]:
    return dict(possible_changes(spec, variant, conf, capability)[1])


def test_every_axis_that_can_help_a_language_model_is_tried() -> None:
    assert _labels(make_spec(), Variant()) == [
        "checkpointing selective",
        "checkpointing full",
        "precision bf16-amp",
        "precision fp16-amp",
        "precision bf16",
        "chunked loss",
        "optimizer sgd",
        "optimizer adafactor",
        "fused optimizer",
        "expandable_segments:True",
    ]
    assert _reasons(make_spec(), Variant()) == {}


def test_a_change_changes_one_thing() -> None:
    spec = make_spec(Precision.FP32, Precision.BF16_AMP)
    for change in possible_changes(spec, BF16_AMP, "", HOPPER)[0]:
        (variant,) = change.spec.variants.product()
        if change.axis == "optimizer":
            assert variant == BF16_AMP
            assert change.spec.train.optimizer == OptimizerSpec(name=change.value)
            assert replace(change.spec, train=spec.train, variants=spec.variants) == spec
        else:
            assert str(getattr(variant, change.axis)) == change.value
            assert replace(variant, **{change.axis: getattr(BF16_AMP, change.axis)}) == BF16_AMP
            assert replace(change.spec, variants=spec.variants) == spec


def test_what_is_done_already_is_not_advised() -> None:
    variant = Variant(
        precision=Precision.BF16,
        checkpointing=Checkpointing.FULL,
        loss=Loss.CHUNKED,
        optimizer_implementation=OptimizerImplementation.FUSED,
        allocator="expandable_segments:True",
    )
    spec = make_spec(train=TrainSpec(optimizer=OptimizerSpec(name="sgd")))
    assert _labels(spec, variant) == []
    assert _reasons(spec, variant) == {
        "checkpointing": "it is full already",
        "precision": "weights are in bf16 already",
        "chunked loss": "it is chunked already",
        "optimizer": "sgd keeps no state that another would save",
        "fused optimizer": "its implementation is chosen already",
        "expandable_segments:True": "segments are expandable already",
    }


@pytest.mark.parametrize(
    ("optimizer", "others"),
    [("adamw", ["sgd", "adafactor"]), ("sgd-momentum", ["sgd"]), ("adafactor", ["sgd"]), ("sgd", [])],
)
def test_only_optimizers_with_less_state_are_advised(optimizer: str, others: list[str]) -> None:
    spec = make_spec(train=TrainSpec(optimizer=OptimizerSpec(name=optimizer)))
    found = [change.value for change in possible_changes(spec, Variant(), "", HOPPER)[0] if change.axis == "optimizer"]
    assert found == others


def test_the_environments_allocator_settings_are_kept() -> None:
    assert "max_split_size_mb:64,expandable_segments:True" in _labels(make_spec(), Variant(), "max_split_size_mb:64")
    assert "expandable_segments:True" in _reasons(make_spec(), Variant(), "expandable_segments:True")


def test_gpus_without_bfloat16_are_not_advised_to_use_it() -> None:
    labels = _labels(make_spec(), Variant(), capability=TURING)
    assert [label for label in labels if label.startswith("precision")] == ["precision fp16-amp"]
    assert _reasons(make_spec(), Variant(), capability=TURING) == {
        f"precision {name}": "this GPU type has no bfloat16 arithmetic" for name in ("bf16-amp", "bf16")
    }


def test_a_loss_is_chunked_only_where_a_language_model_works_it_out() -> None:
    images = make_spec(
        model=ModelSpec(source=ModelSource.TIMM, name="resnet18"), data=DataSpec(kind=DataKind.IMAGES, size=64)
    )
    assert _reasons(images, Variant())["chunked loss"] == "it is for language models"
    own = make_spec(train=TrainSpec(optimizer=OptimizerSpec(name="adamw"), loss="mine:loss"))
    assert _reasons(own, Variant())["chunked loss"] == "the loss is your own"


def test_nothing_is_advised_for_what_cannot_be_predicted() -> None:
    variant = Variant(compile=Compile.ON)
    assert possible_changes(make_spec(), variant, "", HOPPER) == (
        [],
        [("any change", "compiled variants are not predicted")],
    )


def _advise(spec: Spec, largest: dict[str, int]) -> Advice:
    """Advice from a device whose largest batch sizes are known by what differs from bf16-amp with AdamW."""

    def predict(changed: Spec) -> Plan:
        (variant,) = changed.variants.product()
        name = variant.label().removeprefix("bf16-amp").removeprefix(" + ")
        if changed.train.optimizer.name != "adamw":
            name = changed.train.optimizer.name
        (plan,) = plan_sweep(changed, ThresholdDevice(largest.get(name, 9), source=Source.PREDICTED))
        if name == "checkpointing selective":
            return replace(plan, status=PlanStatus.UNSUPPORTED, max_batch_size=None, error={"message": "not offered"})
        return plan

    told: list[tuple[int, int, str]] = []
    base = predict(only(spec, BF16_AMP))
    advice = advise(
        base,
        spec,
        predict,
        compute_capability=HOPPER,
        on_change=lambda number, total, change: told.append((number, total, change.label)),
    )
    assert [number for number, _, _ in told] == list(range(1, 9))
    assert {total for _, total, _ in told} == {8}
    return advice


def test_gains_are_searched_and_sorted() -> None:
    advice = _advise(make_spec(), {"checkpointing full": 20, "chunked loss": 14, "sgd": 11, "fused optimizer": 8})
    assert [(gain.change.label, gain.samples) for gain in advice.gains[:3]] == [
        ("checkpointing full", 11),
        ("chunked loss", 5),
        ("optimizer sgd", 2),
    ]
    assert (advice.gains[-1].change.label, advice.gains[-1].samples) == ("fused optimizer", -1)
    assert advice.left_out == (("checkpointing selective", "not offered"),)
    data = advice_dict(advice)
    assert (data["source"], data["max_batch_size"]) == ("predicted", 9)
    assert data["changes"][0] | {"plan_id": None} == {
        "change": "checkpointing full",
        "axis": "checkpointing",
        "value": "full",
        "max_batch_size": 20,
        "gained_samples": 11,
        "effect": "same results; the forward pass of every block runs twice",
        "plan_id": None,
    }
    assert data["left_out"] == [{"change": "checkpointing selective", "reason": "not offered"}]


def test_where_nothing_fits_every_sample_is_gained() -> None:
    advice = _advise(make_spec(), dict.fromkeys(["", "precision bf16", "chunked loss", "sgd"], 0))
    gains = {gain.change.label: gain.samples for gain in advice.gains}
    assert gains["checkpointing full"] == 9
    assert gains["optimizer sgd"] == 0
