"""Predictions beside the trials of a sweep: made ahead, taken as soon as they say where to begin, kept."""

import threading

import pytest

from planner.errors import ModelError
from planner.planning import plan_sweep
from planner.progress import TrialFinished
from planner.specs.model import SearchSpec
from planner.specs.variants import Precision
from planner.store import PlanFilter
from planner.trials import Outcome, Source
from tests.planning_fakes import BF16, FP32, ThresholdDevice, make_spec

PREDICTED = Source.PREDICTED
TWO = (Precision.FP32, Precision.BF16_AMP)


def test_devices_are_told_which_variants_come():
    device, virtual = ThresholdDevice(9), ThresholdDevice(9, source=PREDICTED)
    plan_sweep(make_spec(*TWO), device, predict_start=virtual)
    assert device.prepared == [(FP32, BF16), (BF16,)]
    assert virtual.prepared == [(FP32, BF16)]
    virtual.prepared.clear()
    plan_sweep(make_spec(), device, predict_start=virtual, batch_size=3)
    assert virtual.prepared == []


class Watched(ThresholdDevice):
    """Tells of each variant before it is opened."""

    def __init__(self, before, **given):
        super().__init__(9, **given)
        self.before = before

    def open(self, spec, variant, *, capacity_bytes=None):
        self.before(variant)
        return super().open(spec, variant, capacity_bytes=capacity_bytes)


def test_later_variants_are_predicted_while_the_first_one_is_measured():
    predicted = threading.Event()
    virtual = Watched(lambda variant: predicted.set() if variant == BF16 else None, source=PREDICTED)
    device = Watched(lambda variant: predicted.wait(20) or pytest.fail("nothing was predicted ahead"))
    plans = plan_sweep(make_spec(*TWO), device, predict_start=virtual)
    assert [plan.predicted_max_batch_size for plan in plans] == [9, 9]
    assert sorted(virtual.sizes(BF16)) == sorted(virtual.sizes(FP32))


class Checked(ThresholdDevice):
    """A virtual GPU whose search looks beyond 10, the first size out of memory, only once ``gate`` is open: at 11."""

    def __init__(self, gate, **given):
        super().__init__(9, source=PREDICTED, **given)
        self.gate = gate

    def open(self, spec, variant, *, capacity_bytes=None):
        runner = super().open(spec, variant, capacity_bytes=capacity_bytes)
        run = runner.run

        def gated(batch_size, *, fresh=False):
            if fresh and batch_size > 10:
                assert self.gate.wait(20), "no trial ran while the prediction was checked"
            return run(batch_size, fresh=fresh)

        runner.run = gated
        return runner


def first_trial_opens(gate):
    def listen(event):
        if isinstance(event, TrialFinished):
            gate.set()

    return listen


def test_the_first_trial_runs_while_its_prediction_is_checked():
    gate, device = threading.Event(), ThresholdDevice(9)
    spec = make_spec(search=SearchSpec(speed=False))
    (plan,) = plan_sweep(spec, device, predict_start=Checked(gate), listener=first_trial_opens(gate))
    assert (plan.max_batch_size, plan.certified, plan.predicted_max_batch_size) == (9, True, 9)
    assert device.sizes() == [9, 10]


def test_what_a_prediction_says_after_the_first_trial_is_kept():
    gate, device = threading.Event(), ThresholdDevice(9)
    virtual = Checked(gate, script={(FP32, 11): [Outcome.FITS]})
    spec = make_spec(search=SearchSpec(speed=False))
    (plan,) = plan_sweep(spec, device, predict_start=virtual, listener=first_trial_opens(gate))
    assert (plan.max_batch_size, plan.certified, plan.predicted_max_batch_size) == (9, True, 11)
    assert device.sizes() == [9, 10, 11]


def test_a_constrained_search_waits_for_its_whole_prediction():
    gate, device = threading.Event(), ThresholdDevice(9)
    gate.set()
    spec = make_spec(search=SearchSpec(speed=False, multiple_of=4))
    (plan,) = plan_sweep(spec, device, predict_start=Checked(gate))
    assert (plan.max_batch_size, plan.details["unconstrained"]["max_batch_size"]) == (8, 9)


def test_a_prediction_that_fails_after_it_was_first_made_leaves_the_search_as_it_is():
    gate, device = threading.Event(), ThresholdDevice(9)
    virtual = Checked(gate, script={(FP32, 11): [ModelError("no", field="model")]})
    spec = make_spec(search=SearchSpec(speed=False))
    (plan,) = plan_sweep(spec, device, predict_start=virtual, listener=first_trial_opens(gate))
    assert (plan.max_batch_size, plan.certified, plan.predicted_max_batch_size) == (9, True, None)
    assert device.sizes() == [9, 10]


def test_a_sweep_that_is_stopped_does_not_wait_for_the_prediction_that_is_being_made():
    predicting, gate, predicted = threading.Event(), threading.Event(), []
    virtual = Watched(lambda variant: predicting.set() or predicted.append(gate.wait(20)), source=PREDICTED)
    device = ThresholdDevice(9)
    assert plan_sweep(make_spec(), device, predict_start=virtual, should_stop=predicting.is_set) == ()
    assert predicted == device.runs == []
    gate.set()


def test_predictions_made_ahead_are_stored_beside_the_measurements(store):
    virtual = ThresholdDevice(9, source=PREDICTED)
    plans = plan_sweep(make_spec(*TWO), ThresholdDevice(9), predict_start=virtual, store=store)
    stored = store.list_plans(PlanFilter()).items
    assert sorted((plan.source, plan.variant) for plan in stored) == [
        (Source.MEASURED, BF16), (Source.MEASURED, FP32), (PREDICTED, BF16), (PREDICTED, FP32),
    ]  # fmt: skip
    assert {plan.id for plan in plans} < {plan.id for plan in stored}
