"""A sweep over a device: what it answers, what it stores and when, and what stops it."""

import contextlib
from dataclasses import replace

import pytest

from planner.devices import Limit
from planner.errors import (
    Conflict,
    DeviceLost,
    InvalidArgument,
    InvalidSpec,
    ModelError,
    StoreError,
)
from planner.planning import plan_sweep
from planner.progress import SweepFinished, SweepStarted, TrialFinished, TrialStarted, VariantFinished, VariantStarted
from planner.reports import plan_dict
from planner.specs.model import SearchSpec
from planner.specs.variants import Checkpointing, Parallelism, Precision, VariantAxes
from planner.store import Store
from planner.summaries import summary
from planner.trials import Interval, Outcome, PlanStatus, Source
from planner.units import GIB
from tests.planning_fakes import (
    BF16,
    BF16_FULL,
    FP32,
    FP32_FULL,
    ExplainingDevice,
    MemoryStore,
    ThresholdDevice,
    make_spec,
)

PREDICTED = Source.PREDICTED
TWO = (Precision.FP32, Precision.BF16_AMP)


def test_a_measured_sweep_is_certified_and_carries_the_figures_of_the_largest():
    device = ThresholdDevice({FP32: 9, BF16: 15})
    plans = plan_sweep(make_spec(*TWO), device)
    assert [(plan.variant, plan.max_batch_size, plan.first_oom_batch_size) for plan in plans] == [
        (FP32, 9, 10),
        (BF16, 15, 16),
    ]
    for plan in plans:
        best = next(trial for trial in plan.trials if trial.batch_size == plan.max_batch_size and trial.fresh_process)
        assert plan.certified
        assert (plan.source, plan.status, plan.stored) == (Source.MEASURED, PlanStatus.PLANNED, False)
        assert (plan.peaks, plan.step_time_s) == (best.peaks, best.step_time_s)
        assert plan.samples_per_second == pytest.approx(plan.max_batch_size / best.step_time_s)
        assert plan.created_at.tzinfo is not None
    assert device.num_open == 0


def test_a_predicted_sweep_is_never_certified_and_shows_its_notes_and_interval():
    (plan,) = plan_sweep(make_spec(), ThresholdDevice(9, source=PREDICTED))
    assert (plan.max_batch_size, plan.certified, plan.source) == (9, False, PREDICTED)
    assert plan.notes == ("an assumption",)
    assert plan.reserved_interval.basis == "test"
    assert plan.step_time_s is None
    assert plan.samples_per_second is None


def test_checkpointing_is_predicted_at_the_largest_size_without_it_too():
    spec = make_spec(checkpointing=(Checkpointing.NONE, Checkpointing.FULL))
    device = ThresholdDevice({FP32: 20, FP32_FULL: 1000}, source=PREDICTED)
    plain, full = plan_sweep(spec, device)
    assert device.sizes(FP32_FULL)[-1] == plain.max_batch_size == 20
    assert (full.max_batch_size, full.trials[-1].batch_size) == (1000, 20)
    assert "of the allocated bytes at batch size 20" in summary([plain, full])[-1]
    measured = ThresholdDevice({FP32: 20, FP32_FULL: 1000})
    plan_sweep(replace(spec, search=SearchSpec(speed=False)), measured)
    assert measured.sizes(FP32_FULL)[-1] == 1001


@pytest.mark.parametrize(("largest", "batch_size", "explained"), [(9, None, 9), (9, 3, 3), (9, 12, 12), (0, None, 1)])
def test_a_predicted_plan_says_what_takes_the_memory(largest, batch_size, explained):
    device = ExplainingDevice(largest, source=PREDICTED)
    (plan,) = plan_sweep(make_spec(), device, batch_size=batch_size)
    assert (
        plan.details["explanation"]
        == plan_dict(plan)["explanation"]
        == {"source": "predicted", "batch_size": explained}
    )
    assert device.explained == [(FP32, explained)]


@pytest.mark.parametrize(("predicted", "batch_size", "asked"), [(9, None, [9]), (8, None, [8, 9]), (9, 4, [4])])
def test_a_measured_plan_carries_the_prediction_for_its_own_size(predicted, batch_size, asked):
    virtual = ExplainingDevice(predicted, source=PREDICTED)
    (plan,) = plan_sweep(make_spec(), ThresholdDevice(9), predict_start=virtual, batch_size=batch_size)
    assert plan.details["explanation"] == {"source": "predicted", "batch_size": batch_size or 9}
    assert [size for _, size in virtual.explained] == asked
    assert virtual.num_open == 0


@pytest.mark.parametrize(("search", "explained"), [(SearchSpec(), 1), (SearchSpec(multiple_of=8), 8)])
def test_where_nothing_fits_the_smallest_size_that_was_asked_about_is_explained(search, explained):
    device = ExplainingDevice(0, source=PREDICTED)
    (plan,) = plan_sweep(make_spec(search=search), device)
    assert (plan.max_batch_size, plan.details["explanation"]["batch_size"]) == (0, explained)


def test_a_measured_plan_does_without_an_explanation_where_there_is_none():
    virtual = ExplainingDevice(9, source=PREDICTED, script={(FP32, 1): [ModelError("no values", field="model")]})
    (plan,) = plan_sweep(make_spec(), ThresholdDevice(0), predict_start=virtual)
    assert plan.max_batch_size == 0
    for device in (ThresholdDevice(9), ThresholdDevice(9, source=PREDICTED)):
        (plan,) = plan_sweep(make_spec(), device)
        assert (plan.max_batch_size, plan_dict(plan)["explanation"]) == (9, None)


@pytest.mark.parametrize("error", [None, DeviceLost("gone"), KeyboardInterrupt()])
def test_however_a_sweep_ends_its_device_holds_nothing_more(error):
    device = ThresholdDevice(9, script={(FP32, 1): [error]} if error else None)
    with contextlib.suppress(DeviceLost, KeyboardInterrupt):
        plan_sweep(make_spec(), device)
    assert device.num_rests == 1


def test_nothing_is_prepared_for_a_stored_answer():
    store, device = MemoryStore(), ThresholdDevice(9)
    for _ in range(2):
        plan_sweep(make_spec(), device, store=store)
    assert len(device.prepared) == 1


@pytest.mark.parametrize("batch_size", [None, 4])
def test_what_a_gpu_cannot_explain_the_virtual_one_does(batch_size):
    at, first_predicted = batch_size or 1, batch_size or 8
    device = ThresholdDevice(9, script={(FP32, at): [Outcome.FAILED, Outcome.FAILED]})
    error = InvalidSpec("40 tokens are more than the model has positions for", field="data.sequence_length")
    virtual = ThresholdDevice(9, source=PREDICTED, script={(FP32, first_predicted): [error]})
    with pytest.raises(InvalidSpec, match="40 tokens"):
        plan_sweep(make_spec(), device, predict_start=virtual, batch_size=batch_size)
    error = ModelError("embedding looks up index 50 of 50: out of range", field="model")
    virtual = ThresholdDevice(9, source=PREDICTED, script={(FP32, first_predicted): [error]})
    device = ThresholdDevice(9, script={(FP32, at): [Outcome.FAILED, Outcome.FAILED]})
    (plan,) = plan_sweep(make_spec(), device, predict_start=virtual, batch_size=batch_size)
    assert plan.error["message"] == (
        f"batch size {at} failed twice: cuDNN error: CUDNN_STATUS_EXECUTION_FAILED; on the virtual GPU: embedding "
        "looks up index 50 of 50: out of range"
    )


@pytest.mark.parametrize("error", [ModelError("no such operator", field="model"), DeviceLost("no such operator")])
def test_a_measured_plan_says_why_nothing_was_predicted(error):
    virtual = ThresholdDevice(9, source=PREDICTED, script={(FP32, 8): [error]})
    (plan,) = plan_sweep(make_spec(), ThresholdDevice(9), predict_start=virtual)
    assert (plan.max_batch_size, plan.predicted_max_batch_size) == (9, None)
    assert "the search began without a prediction: no such operator" in plan.notes
    (plan,) = plan_sweep(make_spec(), ThresholdDevice(9), predict_start=ThresholdDevice(9, source=PREDICTED))
    assert not any("without a prediction" in note for note in plan.notes)


def test_a_plan_that_was_measured_under_a_limit_says_so_for_whoever_asks():
    store, device = MemoryStore(), ThresholdDevice(9)
    given = {"gpu": "h200", "capacity_bytes": 16 * GIB, "unlimited_capacity_bytes": 139 * GIB}
    device.limit = Limit(**given, stands_for="a10g")
    (plan,) = plan_sweep(make_spec(), device, store=store)
    assert (plan.source, plan.gpu, plan.is_under_limit, plan.stands_for) == (Source.MEASURED, "h200", True, "a10g")
    assert plan.notes[0] == device.limit.note
    assert (plan_dict(plan)["measured_under_limit"], plan_dict(plan)["stands_for"]) == (True, "a10g")
    # The same trials answer whoever asks for that capacity of this type itself.
    device.limit = Limit(**given)
    (again,) = plan_sweep(make_spec(), device, store=store)
    assert (again.stored, again.is_under_limit, again.stands_for) == (True, True, None)
    assert again.notes == (device.limit.note,)


def test_several_gpus_are_held_to_less_and_the_plan_and_its_trials_say_so():
    store, device = MemoryStore(), ThresholdDevice(9)
    device.limit = Limit(
        gpu="h200", capacity_bytes=16 * GIB, unlimited_capacity_bytes=139 * GIB, stands_for="a10g",
        capacity_of_rank_bytes=15 * GIB,
    )  # fmt: skip
    spec = make_spec(variants=VariantAxes(parallelism=(Parallelism.SINGLE, Parallelism.DDP), gpus=2))
    one, two = plan_sweep(spec, device, store=store)
    assert [one.capacity_bytes, two.capacity_bytes] == [16 * GIB, 15 * GIB]
    assert "held to the 15.00 GiB that one a10g leaves the allocator beside NCCL" in two.notes[0]
    kept = {stored.capacity_bytes for _, variant, stored in store.trials if variant == two.variant}
    assert kept == {15 * GIB}
    assert [plan.stored for plan in plan_sweep(spec, device, store=store)] == [True, True]


def test_nothing_fits():
    (plan,) = plan_sweep(make_spec(), ThresholdDevice(0))
    assert (plan.max_batch_size, plan.first_oom_batch_size, plan.peaks, plan.certified) == (0, 1, None, True)
    assert plan.status is PlanStatus.PLANNED


def test_a_right_prediction_makes_two_trials_enough():
    device, virtual = ThresholdDevice(54), ThresholdDevice(54, source=PREDICTED)
    (plan,) = plan_sweep(make_spec(search=SearchSpec(speed=False)), device, predict_start=virtual)
    assert device.runs == [(FP32, 54, True), (FP32, 55, True)]
    assert plan.certified
    assert plan.predicted_max_batch_size == 54
    (alone,) = plan_sweep(make_spec(), ThresholdDevice(54))
    assert alone.predicted_max_batch_size is None
    assert all(trial.source is Source.MEASURED for trial in plan.trials)


def test_a_prediction_that_fails_costs_only_its_help():
    virtual = ThresholdDevice(54, source=PREDICTED, script={(FP32, 8): [ModelError("no meta kernel")]})
    (plan,) = plan_sweep(make_spec(), ThresholdDevice(5), predict_start=virtual)
    assert (plan.max_batch_size, plan.certified) == (5, True)


def test_one_batch_size_in_place_of_the_search():
    device = ThresholdDevice({FP32: 9, BF16: 15})
    plans = plan_sweep(make_spec(*TWO), device, batch_size=12)
    assert [(plan.batch_size, plan.fits, plan.max_batch_size, plan.certified) for plan in plans] == [
        (12, False, None, False),
        (12, True, None, False),
    ]
    assert plans[1].peaks is not None
    assert len(device.runs) == 2
    assert all(fresh for _, _, fresh in device.runs)


@pytest.mark.parametrize("size", [0, -3])
def test_a_batch_size_below_one_is_refused_before_anything_runs(size):
    device = ThresholdDevice(9)
    with pytest.raises(InvalidArgument, match="at least 1") as caught:
        plan_sweep(make_spec(), device, batch_size=size)
    assert caught.value.field == "batch_size"
    assert not device.runs


def test_events_tell_the_story_in_order():
    events = []
    plans = plan_sweep(make_spec(*TWO, search=SearchSpec(speed=False)), ThresholdDevice(9), listener=events.append)
    assert events[0] == SweepStarted(variants=(FP32, BF16))
    assert events[-1] == SweepFinished(plans=plans)
    assert [event.index for event in events if isinstance(event, VariantStarted)] == [0, 1]
    assert [event.plan for event in events if isinstance(event, VariantFinished)] == list(plans)
    started = [event for event in events if isinstance(event, TrialStarted)]
    finished = [event for event in events if isinstance(event, TrialFinished)]
    assert [event.batch_size for event in started] == [event.trial.batch_size for event in finished]
    for event in started:
        assert event.low < event.batch_size or event.batch_size == event.low
        assert event.remaining_trials is None or event.remaining_trials >= 1
    assert started[0].remaining_trials is None
    assert started[-1].remaining_trials == 1


def test_every_trial_is_stored_as_it_ends_and_every_plan_as_its_variant_ends():
    store, seen = MemoryStore(), []

    def listener(event):
        if isinstance(event, TrialFinished):
            seen.append(store.log[-1] == ("trial", (event.variant, event.trial.batch_size)))
        if isinstance(event, VariantFinished):
            seen.append(store.log[-1] == ("plan", event.plan.variant))
            assert event.plan.id == store.plans[-1].id

    plan_sweep(make_spec(*TWO), ThresholdDevice(3), store=store, listener=listener)
    assert seen
    assert all(seen)


def test_a_second_sweep_answers_from_the_store_and_fresh_does_not():
    store, spec = MemoryStore(), make_spec()
    device = ThresholdDevice(9)
    (first,) = plan_sweep(spec, device, store=store)
    device.runs.clear()
    (again,) = plan_sweep(make_spec(name="another label"), device, store=store)
    assert device.runs == []
    assert (again.stored, again.id, again.spec_name) == (True, first.id, "another label")
    assert again.trials == first.trials
    (anew,) = plan_sweep(spec, device, store=store, fresh=True)
    assert len(device.runs) == len(first.trials)
    assert not anew.stored
    assert len(store.plans) == 2


def test_another_capacity_or_source_is_another_question():
    store = MemoryStore()
    plan_sweep(make_spec(), ThresholdDevice(9), store=store)
    for other in (ThresholdDevice(12, capacity_bytes=20 << 30), ThresholdDevice(9, source=PREDICTED)):
        (plan,) = plan_sweep(make_spec(), other, store=store)
        assert other.runs
        assert not plan.stored


def test_an_interrupted_search_goes_on_where_it_was():
    """Ctrl-C in the second variant: the first one's plan stays, and no trial is run twice."""
    store, spec = MemoryStore(), make_spec(*TWO)
    device = ThresholdDevice({FP32: 9, BF16: 15}, script={(BF16, 16): [KeyboardInterrupt()]})
    with pytest.raises(KeyboardInterrupt):
        plan_sweep(spec, device, store=store)
    assert [plan.variant for plan in store.plans] == [FP32]
    assert device.num_open == 0
    ran = [run for run in device.runs if run[1] != 16]
    device.runs.clear()
    plans = plan_sweep(spec, device, store=store)
    assert [plan.stored for plan in plans] == [True, False]
    assert [plan.max_batch_size for plan in plans] == [9, 15]
    # A trial from a warm process does not certify, so it is run again; those from fresh ones are not.
    assert not {(size, fresh) for variant, size, fresh in ran if variant == BF16 and fresh} & {
        (size, fresh) for _, size, fresh in device.runs
    }


def test_predictions_of_an_interrupted_search_are_read_back():
    store = MemoryStore()
    device = ThresholdDevice(15, source=PREDICTED, script={(FP32, 16): [KeyboardInterrupt()]})
    with pytest.raises(KeyboardInterrupt):
        plan_sweep(make_spec(), device, store=store)
    before = device.sizes()[:-1]
    device.runs.clear()
    (plan,) = plan_sweep(make_spec(), device, store=store)
    assert plan.max_batch_size == 15
    assert not set(before) & set(device.sizes())
    assert any(f"{len(before)} of {len(plan.trials)} trials had been stored" in note for note in plan.notes)


def test_should_stop_is_asked_between_trials_and_keeps_what_is_finished():
    store, device = MemoryStore(), ThresholdDevice(9)
    plans = plan_sweep(
        make_spec(*TWO), device, store=store, should_stop=lambda: BF16 in [run[0] for run in device.runs]
    )
    assert [plan.variant for plan in plans] == [FP32]
    assert device.sizes(BF16) == [1]
    assert len(store.plans) == 1
    assert device.num_open == 0


def test_a_failure_while_the_sweep_is_stopped_is_not_stored_as_the_variants():
    device = ThresholdDevice(9, script={(BF16, 1): [ModelError("its process was ended")]})
    store = MemoryStore()
    plans = plan_sweep(
        make_spec(*TWO), device, store=store, should_stop=lambda: BF16 in [run[0] for run in device.runs]
    )
    assert [plan.variant for plan in plans] == [plan.variant for plan in store.plans] == [FP32]


def test_a_model_that_raises_fails_its_variant_and_the_sweep_goes_on():
    error = ModelError("the training step raised ValueError: no", field="model")
    store, device = MemoryStore(), ThresholdDevice(9, script={(FP32, 1): [error]})
    failed, planned = plan_sweep(make_spec(*TWO), device, store=store)
    assert (failed.status, failed.error, failed.max_batch_size) == (PlanStatus.FAILED, error.as_dict(), None)
    assert (planned.status, planned.max_batch_size) == (PlanStatus.PLANNED, 9)
    assert len(store.plans) == 2


def test_a_variant_that_the_model_does_not_offer_is_unsupported():
    spec = make_spec(checkpointing=(Checkpointing.FULL, Checkpointing.NONE))
    error = InvalidSpec("Net offers no full checkpointing", field="variants.checkpointing")
    unsupported, planned = plan_sweep(spec, ThresholdDevice(9, script={(FP32_FULL, 1): [error]}))
    assert (unsupported.status, unsupported.error["message"]) == (PlanStatus.UNSUPPORTED, error.message)
    assert planned.max_batch_size == 9


def test_a_failed_or_unsupported_plan_is_not_taken_for_an_answer_later():
    store = MemoryStore()
    device = ThresholdDevice(9, script={(FP32, 1): [ModelError("no")]})
    plan_sweep(make_spec(), device, store=store)
    (plan,) = plan_sweep(make_spec(), device, store=store)
    assert (plan.status, plan.stored) == (PlanStatus.PLANNED, False)


def test_a_trial_that_fails_twice_is_a_failed_plan_with_its_evidence():
    device = ThresholdDevice(9, script={(FP32, 2): [Outcome.FAILED] * 2})
    failed, planned = plan_sweep(make_spec(*TWO), device)
    assert (failed.status, failed.max_batch_size, failed.certified) == (PlanStatus.FAILED, None, False)
    assert failed.error["code"] == "trial_failed"
    assert "batch size 2 failed twice: cuDNN error" in failed.error["message"]
    assert [trial.outcome for trial in failed.trials[-2:]] == [Outcome.FAILED] * 2
    assert planned.max_batch_size == 9


@pytest.mark.parametrize("times", [1, 2])
def test_a_failed_trial_of_one_batch_size_is_tried_once_more(times):
    device = ThresholdDevice(9, script={(FP32, 4): [Outcome.FAILED] * times})
    (plan,) = plan_sweep(make_spec(), device, batch_size=4)
    assert (plan.status, plan.fits) == ((PlanStatus.PLANNED, True) if times == 1 else (PlanStatus.FAILED, None))
    assert len(plan.trials) == 2


def test_one_size_predicted_close_to_the_capacity_says_that_the_gate_would_not_decide():
    def ask(low, high):
        interval = Interval(low_bytes=low, high_bytes=high, basis="test")
        device = ThresholdDevice(9, source=Source.PREDICTED, interval=interval)
        (plan,) = plan_sweep(make_spec(), device, batch_size=9)
        assert plan.fits
        return [note for note in plan.notes if "planner preflight says not enough evidence" in note]

    assert len(ask(15 * GIB, 17 * GIB)) == 1
    assert "batch size 9 is too close to 16.00 GiB" in ask(16 * GIB, 17 * GIB)[0]
    assert not ask(15 * GIB, 16 * GIB)
    assert not ask(17 * GIB, 18 * GIB)


@pytest.mark.parametrize(
    "error", [InvalidSpec("unknown key", field="model.config.n_layerz"), DeviceLost("the GPU is gone")]
)
def test_what_is_wrong_for_every_variant_ends_the_sweep_after_storing_what_is_finished(error):
    store = MemoryStore()
    device = ThresholdDevice(9, script={(BF16, 2): [error]})
    with pytest.raises(type(error)) as caught:
        plan_sweep(make_spec(*TWO), device, store=store)
    assert caught.value is error
    assert [plan.variant for plan in store.plans] == [FP32]
    assert store.log[-1] == ("trial", (BF16, 1))
    assert device.num_open == 0


@pytest.mark.parametrize("error", [StoreError("disk full"), Conflict("the claim is void")])
def test_errors_of_the_store_and_of_the_listener_are_not_taken_for_the_models(error):
    class Full(MemoryStore):
        def add_trial(self, *args, **more):
            raise error

    with pytest.raises(type(error)):
        plan_sweep(make_spec(), ThresholdDevice(9), store=Full())

    def listener(event):
        if isinstance(event, TrialFinished):
            raise error

    with pytest.raises(type(error)):
        plan_sweep(make_spec(), ThresholdDevice(9), listener=listener)


def test_on_the_real_store(tmp_path):
    spec = make_spec(*TWO, checkpointing=(Checkpointing.NONE, Checkpointing.FULL))
    device = ThresholdDevice({FP32: 9, BF16: 15, FP32_FULL: 21, BF16_FULL: 33})
    virtual = ThresholdDevice({FP32: 9, BF16: 16, FP32_FULL: 20, BF16_FULL: 33}, source=PREDICTED)
    with Store.open(f"sqlite:///{tmp_path / 'plans.db'}") as store:
        plans = plan_sweep(spec, device, store=store, predict_start=virtual)
        assert [plan.max_batch_size for plan in plans] == [9, 21, 15, 33]
        num_runs = len(device.runs)
        again = plan_sweep(spec, device, store=store, predict_start=virtual)
        assert len(device.runs) == num_runs
        assert all(plan.stored for plan in again)
        assert [plan.id for plan in again] == [plan.id for plan in plans]
        assert [plan.trials for plan in again] == [plan.trials for plan in plans]
        assert store.count_trials()[Source.MEASURED, Outcome.FITS] >= 4
        # A size that the search ran is answered without running it again.
        (one, *_) = plan_sweep(spec, device, store=store, batch_size=9)
        assert (one.fits, one.batch_size, one.trials) == (True, 9, (plans[0].trials[0],))
