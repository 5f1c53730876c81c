"""The contract's JSON field by field, and sentences that claim only what is known."""

import json
import math
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_api.schemas import PlanDocument
from planner_api.views import plan_row

from planner.cli.wording import sizes_line
from planner.errors import ModelError
from planner.gpus import default_capacity_bytes, find_gpu, list_gpus
from planner.reports import ANSWERS, gpu_dict, plan_dict, trial_dict, verdict_dict
from planner.specs.variants import OptimizerImplementation
from planner.summaries import summary
from planner.trials import Interval, Outcome, Peaks, Plan, PlanStatus, Source
from planner.units import GIB
from planner.verdicts import VariantVerdict, Verdict, VerdictKind
from tests.planning_fakes import (
    BF16,
    BF16_FULL,
    FP32,
    FP32_FULL,
    make_environment,
    make_spec,
    make_trial,
)
from tests.store_fakes import plan_fields, trials

PEAKS = Peaks(allocated_bytes=14750318592, reserved_bytes=16703815680, device_bytes=17400000000)


def make_plan(variant=BF16, size=9, *, source=Source.MEASURED, step_time_s=0.25, gib=14, **changes):
    given = {
        "max_batch_size": size,
        "first_oom_batch_size": size + 1 if size is not None else None,
        "certified": source is Source.MEASURED,
        "peaks": Peaks(allocated_bytes=gib * GIB, reserved_bytes=15 * GIB) if size else None,
        "step_time_s": step_time_s if source is Source.MEASURED and size != 0 else None,
    }
    spec = make_spec()
    return Plan(
        spec_hash=spec.hash, spec_name=spec.name, model="gpt2", variant=variant, environment=make_environment(source),
        capacity_bytes=16 * GIB, source=source, **{**given, **changes},
    )  # fmt: skip


def test_a_search_in_the_contracts_words():
    trials = (make_trial(9, peaks=PEAKS), make_trial(10, Outcome.OOM))
    data = plan_dict(make_plan(size=9, peaks=PEAKS, trials=trials))
    contract = {
        "variant": {"precision": "bf16-amp", "checkpointing": "none", "compile": "off"},
        "gpu": "h200", "capacity_bytes": 17179869184,
        "source": "measured",
        "max_batch_size": 9, "first_oom_batch_size": 10, "certified": True,
        "peak_allocated_bytes": 14750318592, "peak_reserved_bytes": 16703815680,
        "num_trials": 2,
    }  # fmt: skip
    assert {key: data[key] for key in contract} == contract
    assert [(trial["batch_size"], trial["outcome"]) for trial in data["trials"]] == [(9, "fits"), (10, "oom")]
    assert "batch_size" not in data
    assert "fits" not in data
    assert data["peak_device_bytes"] == 17400000000
    assert data["samples_per_second"] == 36.0
    assert data["environment"]["driver_version"] == "580.1"
    assert (data["status"], data["stored"], data["error"], data["spec_name"]) == ("planned", False, None, "label")


def test_every_further_answer_is_in_the_json_and_described_by_the_service():
    answers = {name: {"batch_size": 8} for name in ANSWERS}
    data = plan_dict(make_plan(details={**answers, "explanation": None}))
    assert {name: data[name] for name in ANSWERS} == answers
    assert set(ANSWERS) <= set(PlanDocument.model_fields)
    assert PlanDocument(**data).model_dump()["fastest"] == {"batch_size": 8}
    assert all(plan_dict(make_plan())[name] is None for name in ANSWERS)


def test_one_batch_size_in_place_of_the_two():
    data = plan_dict(make_plan(batch_size=9, fits=True, max_batch_size=None, first_oom_batch_size=None))
    assert (data["batch_size"], data["fits"]) == (9, True)
    assert "max_batch_size" not in data
    assert "first_oom_batch_size" not in data


def test_a_failed_plan_says_why():
    error = ModelError("it raises", field="model").as_dict()
    plan = make_plan(size=0, max_batch_size=None, status=PlanStatus.FAILED, error=error, certified=False)
    data = plan_dict(plan)
    assert (data["status"], data["error"], data["peak_reserved_bytes"]) == ("failed", error, None)


def test_times_are_written_with_their_zone():
    moment = datetime(2026, 5, 1, 12, tzinfo=UTC)
    assert plan_dict(make_plan(created_at=moment))["created_at"] == "2026-05-01T12:00:00+00:00"
    assert trial_dict(make_trial(started_at=moment))["started_at"] == "2026-05-01T12:00:00+00:00"


@given(plan_fields, st.booleans())
def test_any_plan_is_json_with_types_that_json_has(fields, stored):
    plan = Plan(spec_hash="0" * 64, stored=stored, **fields)
    data = plan_dict(plan)
    assert json.loads(json.dumps(data)) == data
    assert data["num_trials"] == len(data["trials"]) == len(plan.trials)


@given(trials)
def test_any_trial_is_json(trial):
    data = trial_dict(trial)
    assert json.loads(json.dumps(data)) == data
    assert data["outcome"] == trial.outcome.value


def test_gpus():
    for gpu in list_gpus():
        data = gpu_dict(gpu)
        assert json.loads(json.dumps(data)) == data
        assert data["default_capacity_bytes"] == default_capacity_bytes(find_gpu(data["name"]))


def test_a_verdict_is_that_of_its_worst_variant():
    def verdict(*kinds):
        found = [
            VariantVerdict(
                variant=BF16, kind=kind, reason="because", source=Source.PREDICTED,
                reserved_interval=Interval(low_bytes=1, high_bytes=2, basis="test"),
            )
            for kind in kinds
        ]  # fmt: skip
        return Verdict(
            spec_hash="0", spec_name=None, model="gpt2", gpu="h200", batch_size=4, capacity_bytes=GIB,
            variants=tuple(found),
        )  # fmt: skip

    fits, not_, unknown = VerdictKind
    assert verdict(fits, fits).kind is fits
    assert verdict(fits, unknown).kind is unknown
    assert verdict(unknown, not_, fits).kind is not_
    data = verdict_dict(verdict(fits, unknown))
    assert json.loads(json.dumps(data)) == data
    assert (data["verdict"], data["fits"], data["batch_size"]) == ("unknown", None, 4)
    assert [variant["fits"] for variant in data["variants"]] == [True, None]
    assert data["variants"][0]["reserved_interval"] == {"low_bytes": 1, "high_bytes": 2, "basis": "test"}


def test_the_largest_and_the_fastest():
    plans = [make_plan(FP32, 9, step_time_s=0.09), make_plan(BF16, 15, step_time_s=0.3)]
    largest, fastest = summary(plans)
    assert largest == "Largest batch size: 15 with bf16-amp (certified)."
    assert fastest == "Fastest: 100.0 samples per second with fp32 at batch size 9 (measured)."


FUSED = {"optimizer_implementation": OptimizerImplementation.FUSED}
CONSTRAINED = {"multiple_of": 8, "headroom": {"bytes": 0, "share": 0.05}}


def test_what_constraints_cost_is_said_in_samples_with_the_source_of_the_other_figure():
    unconstrained = {"max_batch_size": 27, "source": "predicted"}
    plan = make_plan(size=24, question=CONSTRAINED, details={"unconstrained": unconstrained})
    assert summary([plan])[1] == (
        "With multiples of 8 and a headroom of 5%: 24 in place of 27 (predicted) with bf16-amp."
    )
    assert plan_dict(plan)["question"] == CONSTRAINED
    assert plan_dict(plan)["unconstrained"] == unconstrained
    free = make_plan(size=24, details={"unconstrained": {"max_batch_size": 24, "source": "measured"}})
    assert len(summary([free])) == 2
    bytes_too = {"max_batch_size": 32, "headroom": {"bytes": 2 * GIB, "share": 0.0}}
    plan = make_plan(size=24, question=bytes_too, details={"unconstrained": unconstrained})
    assert summary([plan])[1].startswith("With at most 32 and a headroom of 2.00 GiB: 24 in place of 27")


def test_the_fastest_size_may_be_a_smaller_one_and_the_knee_is_named():
    fastest = {"batch_size": 24, "step_time_s": 0.1, "samples_per_second": 240.0, "source": "measured"}
    knee = {**fastest, "batch_size": 16, "samples_per_second": 230.0, "share": 0.9583}
    plans = [make_plan(FP32, 9, step_time_s=0.09), make_plan(BF16, 54, details={"fastest": fastest, "knee": knee})]
    assert summary(plans)[1] == (
        "Fastest: 240.0 samples per second with bf16-amp at batch size 24 (measured); 16 has 96% of it."
    )


def test_thrashing_and_leaks_are_said_of_the_largest():
    calm = {"batch_size": 64, "first_thrashing_batch_size": 65, "source": "measured"}
    leak = {"batch_size": 77, "bytes_per_step": 12 << 20, "steps_left": 700}
    lines = summary([make_plan(size=77, details={"largest_without_thrashing": calm, "leak": leak}, certified=False)])
    assert lines[1] == "Without thrashing: 64 with bf16-amp (measured)."
    assert lines[2] == "bf16-amp leaks 12.0 MiB a step: memory runs out after about 700 more steps."
    said = summary([make_plan(size=77, details={"leak": leak | {"in_cycles": True}}, certified=False)])[1]
    assert said == "bf16-amp leaves 12.0 MiB a step in reference cycles until Python's garbage collector runs."


def test_a_leak_leaves_open_whether_one_batch_size_fits():
    leak = {"batch_size": 16, "bytes_per_step": 12 << 20, "steps_left": 700}
    asked = {"max_batch_size": None, "first_oom_batch_size": None, "batch_size": 16, "certified": False}
    leaking = make_plan(FP32, fits=None, details={"leak": leak}, **asked)
    said = (
        "Batch size 16 is not known to fit: fp32 leaks 12.0 MiB a step: memory runs out after about 700 more steps "
        "(measured)."
    )
    assert summary([leaking]) == [said]
    assert (plan_dict(leaking)["fits"], plan_row(leaking).answer) == (None, "16 is not known to fit")
    assert sizes_line(plan_dict(leaking)) == "batch size 16 is not known to fit"
    sound = make_plan(FP32_FULL, fits=True, **asked)
    lines = summary([leaking, sound])
    assert lines[:2] == ["Batch size 16 fits with fp32 + checkpointing full (measured).", said]
    assert not any("without it" in line for line in lines)  # as if it did not fit


def test_a_global_batch_size():
    def answer(size, rate, **changes):
        return {
            "global_batch_size": 512, "micro_batch_size": size, "accumulation_steps": size and 512 // size, "gpus": 1,
            "samples_per_second": rate, **changes,
        }  # fmt: skip

    slow = make_plan(FP32, 64, details={"accumulation": answer(64, 90.0)})
    fast = make_plan(BF16, 54, details={"accumulation": answer(32, 158.04)})
    assert summary([slow, fast])[2] == (
        "512 samples a step: 16 micro-batches of 32 with bf16-amp (158.0 samples per second, measured)."
    )
    whole = make_plan(BF16, 512, details={"accumulation": answer(512, None)})
    assert summary([whole])[2].startswith("512 samples a step: 1 micro-batch of 512 with")
    several = make_plan(BF16, 54, details={"accumulation": answer(32, None, gpus=2, accumulation_steps=8)})
    assert (
        "8 micro-batches of 32 on each of 2 GPUs with bf16-amp (predicted; its speed is not)" in summary([several])[2]
    )
    none = make_plan(BF16, 54, details={"accumulation": {"global_batch_size": 511, "micro_batch_size": None}})
    assert summary([none])[2] == "No micro-batch that fits makes exactly 511 samples a step."


def test_a_measured_largest_that_is_not_certified_is_not_called_so():
    (largest, _) = summary([make_plan(certified=False)])
    assert largest.endswith("(measured).")


def test_speed_is_never_predicted():
    plans = [make_plan(FP32, 9, source=Source.PREDICTED), make_plan(FP32_FULL, 21, source=Source.PREDICTED)]
    largest, fastest, checkpointing = summary(plans)
    assert largest == "Largest batch size: 21 with fp32 + checkpointing full (predicted)."
    assert "not known" in fastest
    assert "whether it pays cannot be said" in checkpointing
    assert "%" in checkpointing
    assert "certified" not in " ".join((largest, fastest, checkpointing))


def test_checkpointing_at_an_equal_batch_size():
    """14 GiB without it, 7 GiB with it, both at 9 samples; 0.1 s and 0.125 s per sample."""
    plain = make_plan(
        BF16,
        9,
        step_time_s=0.9,
        trials=(make_trial(9, peaks=Peaks(allocated_bytes=14 * GIB, reserved_bytes=15 * GIB)),),
    )
    full = make_plan(
        BF16_FULL,
        20,
        step_time_s=2.5,
        trials=(make_trial(9, peaks=Peaks(allocated_bytes=7 * GIB, reserved_bytes=8 * GIB)),),
    )
    sentence = summary([plain, full])[-1]
    assert "saves 50% of the allocated bytes at batch size 9 (7.00 GiB in place of 14.00 GiB)" in sentence
    assert "allows batch size 20 in place of 9" in sentence
    assert "adds 25% step time per sample (measured), and pays only where" in sentence


def test_checkpointing_without_an_equal_batch_size_compares_bytes_per_sample():
    plain, full = make_plan(BF16, 7, step_time_s=0.7, gib=14), make_plan(BF16_FULL, 14, step_time_s=1.12, gib=14)
    sentence = summary([plain, full])[-1]
    assert "saves 50% of the allocated bytes per sample, weights included, at batch sizes 14 and 7" in sentence
    assert "takes 20% less step time per sample (measured), and pays" in sentence


@pytest.mark.parametrize(
    ("step_time_s", "words"),
    [
        (1.0, "takes the same step time per sample (measured), and pays"),
        (1.003, "takes the same step time per sample (measured), and pays"),
        (0.997, "takes the same step time per sample (measured), and pays"),
        (0.99, "takes 1% less step time per sample (measured), and pays"),
        (1.01, "adds 1% step time per sample (measured), and pays only where"),
    ],
)
def test_a_cost_of_checkpointing_that_rounds_to_nothing_is_none(step_time_s, words):
    plans = [make_plan(BF16, 10, step_time_s=1.0), make_plan(BF16_FULL, 10, step_time_s=step_time_s)]
    assert words in summary(plans)[-1]


def test_checkpointing_is_not_judged_by_a_small_batch_size_that_both_happened_to_run():
    trials = (make_trial(2),)
    plain, full = make_plan(BF16, 9, trials=trials), make_plan(BF16_FULL, 20, trials=trials)
    assert "per sample, weights included, at batch sizes 20 and 9" in summary([plain, full])[-1]


def test_checkpointing_that_makes_it_fit_at_all():
    sentence = summary([make_plan(FP32, 0), make_plan(FP32_FULL, 3)])[-1]
    assert sentence == "Checkpointing full with fp32 is what makes it fit: without it one sample does not fit."


def test_checkpointing_is_compared_only_where_all_else_is_the_same():
    assert len(summary([make_plan(FP32, 9), make_plan(BF16_FULL, 20)])) == 2
    plain, fused = (make_plan(replace(FP32, **axis), 9) for axis in ({}, FUSED))
    full = make_plan(replace(FP32_FULL, **FUSED), 20)
    assert len(summary([plain, full])) == 2
    said = summary([plain, fused, full])[2:]
    assert [sentence.split(" saves ")[0] for sentence in said] == ["Checkpointing full with fp32 + fused optimizer"]


@pytest.mark.parametrize(
    ("one_size", "where"), [(None, "even at the smallest batch size that was asked about"), (8, "at batch size 8")]
)
def test_nothing_fits(one_size, where):
    plan = make_plan(FP32, 0, batch_size=one_size, fits=None if one_size is None else False)
    assert summary([plan]) == [f"Nothing fits: no variant runs {where}."]


def test_where_nothing_fits_the_constraint_or_the_evaluation_that_is_why_is_named():
    tight = {"headroom": {"bytes": 0, "share": 0.99}}
    unconstrained = {"max_batch_size": 108, "source": "predicted"}
    plan = make_plan(FP32, 0, question=tight, details={"unconstrained": unconstrained})
    assert summary([plan])[1:] == ["With a headroom of 99%: 0 in place of 108 (predicted) with fp32."]
    explained = {"fits": False, "peaks": {"allocated": {"when": "evaluation, forward"}}}
    plan = make_plan(FP32, 0, details={"explanation": explained})
    assert summary([plan])[1:] == ["The evaluation takes the most memory with fp32: see train.evaluation.batch_size."]
    for other in ({"fits": True}, {"peaks": {"allocated": {"when": "step 2, backward"}}}):
        plan = make_plan(FP32, 0, details={"explanation": {**explained, **other}})
        assert len(summary([plan])) == 1


def test_nothing_is_said_of_plans_that_were_not_answered():
    assert summary([]) == []
    assert summary([make_plan(status=PlanStatus.FAILED, max_batch_size=None)]) == []


def test_one_batch_size():
    plans = [
        make_plan(variant, None, batch_size=8, fits=fits, first_oom_batch_size=None)
        for variant, fits in ((FP32, False), (BF16, True))
    ]
    plans[1] = replace(plans[1], peaks=PEAKS, certified=False)
    first, fastest = summary(plans)
    assert first == "Batch size 8 fits with bf16-amp (measured)."
    assert math.isclose(float(fastest.split()[1]), 8 / 0.25)
