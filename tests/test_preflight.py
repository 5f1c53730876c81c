"""The gate: stored measurements decide first, predictions only with their whole interval, near matches never."""

import pytest

from planner.errors import InvalidArgument, InvalidSpec, ModelError
from planner.gpus import default_capacity_bytes, find_gpu
from planner.preflight import preflight
from planner.processes import ChildTimeout
from planner.specs.model import Headroom, SearchSpec
from planner.specs.variants import Precision
from planner.store import Store
from planner.trials import Interval, Outcome, Source
from planner.units import GIB, MIB
from planner.verdicts import VerdictKind
from tests.planning_fakes import BF16, FP32, MemoryStore, ThresholdDevice, make_environment, make_spec, make_trial

FITS, NOT, UNKNOWN = VerdictKind.FITS, VerdictKind.DOES_NOT_FIT, VerdictKind.UNKNOWN
CAPACITY = 16 * GIB


def ask(
    batch_size=9, *, store=None, interval=(20 * GIB, 30 * GIB), spec=None, capacity=CAPACITY, made=None, script=None
):
    """Without a measurement the answer is "does not fit": the interval is above the capacity."""

    def make(gpu, capacity_bytes):
        device = ThresholdDevice(
            9, source=Source.PREDICTED, capacity_bytes=capacity_bytes, script=script,
            interval=Interval(low_bytes=interval[0], high_bytes=interval[1], basis="test"),
        )  # fmt: skip
        if made is not None:
            made.append((gpu, device))
        return device

    return preflight(spec or make_spec(), "h200", batch_size, capacity_bytes=capacity, store=store, make_predictor=make)


def store_with(*trials, capacity=CAPACITY, **environment):
    store = MemoryStore()
    for trial in trials:
        store.add_trial(make_spec(), FP32, make_environment(**environment), capacity, trial)
    return store


@pytest.mark.parametrize(
    ("interval", "kind"),
    [
        ((10 * GIB, 15 * GIB), FITS),
        ((10 * GIB, CAPACITY), FITS),
        ((10 * GIB, CAPACITY + 1), UNKNOWN),
        ((CAPACITY, 20 * GIB), UNKNOWN),
        ((CAPACITY + 1, 20 * GIB), NOT),
    ],
)
def test_a_prediction_decides_only_with_its_whole_interval(interval, kind):
    verdict = ask(interval=interval)
    assert verdict.kind is kind
    (variant,) = verdict.variants
    assert (variant.source, variant.stored, variant.reserved_interval.basis) == (Source.PREDICTED, False, "test")
    assert variant.reason.startswith("predicted: needs")
    assert "an assumption" in variant.notes


@pytest.mark.parametrize(
    ("trials", "kind", "evidence"),
    [
        ([make_trial(9)], FITS, 9),
        ([make_trial(9, Outcome.OOM)], NOT, 9),
        ([make_trial(20)], FITS, 20),
        ([make_trial(4, Outcome.OOM)], NOT, 4),
        ([make_trial(20), make_trial(12), make_trial(21, Outcome.OOM)], FITS, 12),
    ],
)
def test_a_stored_measurement_answers_without_a_prediction(trials, kind, evidence):
    made = []
    verdict = ask(store=store_with(*trials), made=made)
    (variant,) = verdict.variants
    assert (verdict.kind, variant.source, variant.stored) == (kind, Source.MEASURED, True)
    assert variant.evidence_batch_size == evidence
    assert f"batch size {evidence}" in variant.reason
    assert "driver 580.1" in variant.reason
    assert made[0][1].sizes() == ([9] if 9 < evidence < 18 else [])  # only a larger size near by needs a second look


def test_a_larger_size_that_fitted_does_not_decide_where_the_asked_one_is_predicted_to_run_out():
    store = store_with(make_trial(12), make_trial(13, Outcome.OOM))
    (variant,) = ask(11, store=store).variants
    assert (variant.kind, variant.source, variant.evidence_batch_size) == (UNKNOWN, Source.MEASURED, 12)
    assert "measured: batch size 12 fitted in 16.00 GiB" in variant.reason
    assert "but predicted: needs 20.00 GiB to 30.00 GiB, more than 16.00 GiB" in variant.reason
    assert ask(12, store=store).kind is FITS  # it ran itself
    assert ask(6, store=store).kind is FITS  # half of the samples
    failing = {(FP32, 11): [Outcome.FAILED]}
    assert ask(11, store=store, script=failing).kind is FITS  # nothing predicted, nothing contradicts


@pytest.mark.parametrize(
    "trial",
    [
        make_trial(8),
        make_trial(10, Outcome.OOM),
        make_trial(9, Outcome.FAILED),
        make_trial(9, fresh_process=False),
        make_trial(9, source=Source.PREDICTED),
    ],
)
def test_what_a_measurement_does_not_say_is_predicted(trial):
    (variant,) = ask(store=store_with(trial)).variants
    assert variant.source is Source.PREDICTED


def test_capacities_count_in_one_direction_only():
    assert ask(store=store_with(make_trial(9), capacity=8 * GIB)).variants[0].source is Source.MEASURED
    assert ask(store=store_with(make_trial(9), capacity=80 * GIB)).variants[0].source is Source.PREDICTED
    assert ask(store=store_with(make_trial(9, Outcome.OOM), capacity=80 * GIB)).kind is NOT
    assert ask(store=store_with(make_trial(9, Outcome.OOM), capacity=8 * GIB)).variants[0].source is Source.PREDICTED


def test_the_exact_run_wins_over_a_contradiction_elsewhere_and_a_plain_contradiction_decides_nothing():
    assert ask(store=store_with(make_trial(9), make_trial(8, Outcome.OOM))).kind is FITS
    assert ask(store=store_with(make_trial(9, Outcome.OOM), make_trial(12))).kind is NOT
    (variant,) = ask(store=store_with(make_trial(10), make_trial(8, Outcome.OOM))).variants
    assert variant.source is Source.PREDICTED


LEAKING = {"allocated_after_step_bytes": [GIB + step * 12 * MIB for step in range(5)]}


def test_a_measurement_that_leaks_is_no_evidence_that_training_fits():
    leaking = make_trial(9, details=LEAKING)
    verdict = ask(store=store_with(leaking), interval=(1, 2))
    (variant,) = verdict.variants
    assert (verdict.kind, variant.source, variant.evidence_batch_size) == (UNKNOWN, Source.MEASURED, 9)
    assert "batch size 9 fitted" in variant.reason
    assert "but there is a leak: at batch size 9 every step leaves 12.0 MiB more allocated" in variant.reason
    assert ask(store=store_with(leaking, make_trial(12))).kind is FITS  # what did not leak decides
    (larger,) = ask(12, store=store_with(leaking), interval=(1, 2)).variants  # nothing was measured there
    assert (larger.kind, larger.source) == (UNKNOWN, Source.PREDICTED)
    assert "but there is, measured, a leak: at batch size 9 every step" in larger.reason
    assert ask(12, store=store_with(leaking), interval=(CAPACITY + 1, CAPACITY + 2)).kind is NOT
    assert ask(8, store=store_with(leaking, make_trial(8, Outcome.OOM)), interval=(1, 2)).kind is NOT


def test_headroom_is_kept_free():
    spec = make_spec(search=SearchSpec(headroom=Headroom(bytes=2 * GIB)))
    assert ask(interval=(10 * GIB, 14 * GIB), spec=spec).kind is FITS
    verdict = ask(interval=(10 * GIB, 15 * GIB), spec=spec)
    assert (verdict.kind, verdict.capacity_bytes) == (UNKNOWN, CAPACITY)
    assert any("14.00 GiB of 16.00 GiB may be used beside search.headroom" in note for note in verdict.notes)
    assert ask(store=store_with(make_trial(9)), interval=(1, 2), spec=spec).variants[0].source is Source.PREDICTED
    assert ask(store=store_with(make_trial(9), capacity=14 * GIB), spec=spec).variants[0].source is Source.MEASURED


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"torch_version": "2.11.0+cu130"}, "torch 2.11.0 (here 2.13.0)"),
        ({"library_versions": {"transformers": "4.57.0"}}, "transformers 4.57.0 (here 5.17.0)"),
        ({"allocator_conf": "expandable_segments:True"}, "allocator settings expandable_segments:True (here none)"),
        ({"code_hash": "1" * 64}, "other user code"),
    ],
)
def test_a_near_match_is_named_and_does_not_decide(change, named):
    verdict = ask(store=store_with(make_trial(9), **change))
    (variant,) = verdict.variants
    assert (verdict.kind, variant.source) == (NOT, Source.PREDICTED)
    (note,) = [note for note in variant.notes if note.startswith("near match, not used")]
    assert named in note


def test_a_machine_without_the_gpu_cannot_know_its_driver_cuda_or_build_of_torch():
    store = store_with(make_trial(9), torch_version="2.13.0+cu126", cuda_version="12.6", driver_version="550.2")
    assert ask(store=store).kind is FITS


def test_another_gpu_type_is_no_evidence():
    assert ask(store=store_with(make_trial(9), gpu="a100-80gb")).variants[0].source is Source.PREDICTED


def test_the_worst_variant_counts():
    store = store_with(make_trial(9))
    verdict = ask(store=store, spec=make_spec(Precision.FP32, Precision.BF16_AMP), interval=(10 * GIB, 20 * GIB))
    assert [(found.variant, found.kind) for found in verdict.variants] == [(FP32, FITS), (BF16, UNKNOWN)]
    assert verdict.kind is UNKNOWN


def test_a_prediction_that_dies_is_not_enough_evidence():
    verdict = ask(script={(FP32, 9): [ChildTimeout("did not answer within 600 s and was killed")]})
    (variant,) = verdict.variants
    assert (verdict.kind, variant.source) == (UNKNOWN, None)
    assert "did not answer" in variant.reason


def test_a_model_that_cannot_run_is_an_error():
    with pytest.raises(ModelError):
        ask(script={(FP32, 9): [ModelError("no")]})


def test_the_capacity_is_by_default_what_the_type_leaves():
    made = []
    verdict = ask(capacity=None, made=made)
    assert verdict.capacity_bytes == made[0][1].capacity_bytes == default_capacity_bytes(find_gpu("h200"))
    assert made[0][0].name == verdict.gpu == "h200"
    assert ask(capacity=find_gpu("h200").total_bytes).notes


@pytest.mark.parametrize(("asked", "field"), [({"batch_size": 0}, "batch_size"), ({"capacity": 1 << 50}, "capacity")])
def test_bad_input(asked, field):
    with pytest.raises(InvalidArgument) as caught:
        ask(**asked)
    assert caught.value.field == field


def test_an_unknown_type_is_refused_with_the_nearest():
    with pytest.raises(InvalidArgument) as caught:
        preflight(make_spec(), "h2000", 4)
    assert (caught.value.field, caught.value.suggestion) == ("gpu", "h200")


def test_on_the_real_store(tmp_path):
    with Store.open(f"sqlite:///{tmp_path / 'plans.db'}") as store:
        store.add_trial(make_spec(), FP32, make_environment(), CAPACITY, make_trial(9))
        assert ask(store=store).kind is FITS
        assert ask(10, store=store).variants[0].source is Source.PREDICTED


def test_a_variant_that_is_not_predicted_is_unknown_and_the_others_are_judged() -> None:
    refused = InvalidSpec("ddp is measured, not predicted", field="variants.parallelism")
    verdict = ask(
        spec=make_spec(Precision.FP32, Precision.BF16_AMP), interval=(1 * GIB, 2 * GIB), script={(FP32, 9): [refused]}
    )
    first, second = verdict.variants
    assert (first.kind, second.kind, verdict.kind) == (UNKNOWN, FITS, UNKNOWN)
    assert first.reason == "nothing is known of this variant: ddp is measured, not predicted"
    with pytest.raises(InvalidSpec):
        ask(script={(FP32, 9): [InvalidSpec("wrong", field="model.config.x")]})
