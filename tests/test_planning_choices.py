"""What a plan says beyond the largest batch size: constraints and their cost, speed, thrashing, leaks, accumulation."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.ahead import Ahead
from planner.choices import MAX_THRASHING
from planner.endurance import leak_of
from planner.errors import InvalidSpec, ModelError
from planner.planning import plan_sweep
from planner.specs.document import parse_spec, spec_document
from planner.specs.model import Headroom, SearchSpec
from planner.specs.variants import Compile, Parallelism, VariantAxes
from planner.store import Store
from planner.throughput import MAX_TIMED
from planner.trials import Interval, Outcome, Peaks, Source, Trial
from planner.units import GIB, MIB
from tests.planning_fakes import FP32, MemoryStore, make_environment, make_spec

MEASURED, PREDICTED = Source.MEASURED, Source.PREDICTED
SAMPLE = 256 * MIB
QUIET = SearchSpec(speed=False)


@dataclass
class Gpu:
    """A GPU on which each sample takes 256 MiB, and accumulated gradients another GiB."""

    source: Source = MEASURED
    capacity_bytes: int = 16 * GIB
    fixed_s: float = 0.1
    """Of each step, beside 10 ms for each sample."""
    thrashes_from: int = 10**9
    """Steps of this size and above take twice the time, with retries in each."""
    leak_bytes: int = 0
    cannot_accumulate: frozenset[int] = frozenset()
    holes: frozenset[int] = frozenset()
    runs: list[tuple[int, int, bool]] = field(default_factory=list)
    """Batch size, accumulation steps, fresh."""
    capacities: list[int] = field(default_factory=list)
    limit = None

    def prepare(self, spec, variants): ...

    def rest(self): ...

    def environment(self, spec):
        return make_environment(self.source)

    def open(self, spec, variant, *, capacity_bytes=None):
        self.capacities.append(capacity_bytes or self.capacity_bytes)
        if spec.train.accumulation_steps > 1:
            parse_spec(spec_document(spec))  # as it reaches the process of a trial
        return Runner(self, spec, capacity_bytes or self.capacity_bytes)

    def sizes(self, steps=1):
        return [size for size, accumulated, _ in self.runs if accumulated == steps]


@dataclass
class Runner:
    gpu: Gpu
    spec: object
    capacity_bytes: int

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def run(self, size, *, fresh=False):
        gpu, steps, measured = self.gpu, self.spec.train.accumulation_steps, self.gpu.source is MEASURED
        gpu.runs.append((size, steps, fresh))
        if size in gpu.cannot_accumulate and steps > 1:
            raise ModelError("no")
        needed = size * SAMPLE + (GIB if steps > 1 else 0)
        fits = needed <= self.capacity_bytes and size not in gpu.holes
        thrashes = size >= gpu.thrashes_from
        step_s = (gpu.fixed_s + 0.01 * size * steps) * (2 if thrashes else 1)
        details = {"samples_per_step": size * steps}
        details["allocated_after_step_bytes"] = [
            needed // 2 + gpu.leak_bytes * step for step in range(5 if measured else 3)
        ]
        return Trial(
            batch_size=size, outcome=Outcome.FITS if fits else Outcome.OOM, source=gpu.source,
            peaks=Peaks(allocated_bytes=min(needed, self.capacity_bytes), reserved_bytes=min(needed, 16 * GIB)),
            num_alloc_retries=79 if thrashes else 0,
            step_times_s=(9.0, step_s, step_s) if measured and fits else (), fresh_process=measured and fresh,
            reserved_interval=None if measured else Interval(low_bytes=0, high_bytes=1, basis="test"),
            details=details, duration_s=1.5,
        )  # fmt: skip


def plan_of(gpu, search=None, *, target=None, predictor=None, store=None, **changes):
    spec = make_spec(search=search or SearchSpec())
    spec = replace(spec, train=replace(spec.train, global_batch_size=target, **changes))
    (plan,) = plan_sweep(spec, gpu, predict_start=predictor, store=store)
    return plan


def test_multiples_are_certified_one_multiple_apart_and_their_cost_is_predicted():
    gpu, virtual = Gpu(), Gpu(PREDICTED)
    plan = plan_of(gpu, SearchSpec(multiple_of=24, speed=False), predictor=virtual)
    assert (plan.max_batch_size, plan.first_oom_batch_size, plan.certified) == (48, 72, True)
    assert gpu.runs == [(48, 1, True), (72, 1, True)]
    assert plan.details["unconstrained"] == {"max_batch_size": 64, "source": "predicted"}
    assert plan.predicted_max_batch_size == 48


def test_a_measured_answer_without_the_constraints_tells_their_cost_better_than_a_prediction():
    store = MemoryStore()
    plan_of(Gpu(), QUIET, store=store)
    plan = plan_of(Gpu(), SearchSpec(multiple_of=24, speed=False), store=store)
    assert plan.details["unconstrained"] == {"max_batch_size": 64, "source": "measured"}
    alone = plan_of(Gpu(), SearchSpec(multiple_of=24, speed=False))
    assert "unconstrained" not in alone.details


def test_a_prediction_for_one_gpu_does_not_tell_what_constraints_cost_on_two():
    gpu, virtual = Gpu(), Gpu(PREDICTED)
    axes = VariantAxes(parallelism=(Parallelism.DDP,), gpus=2)
    spec = make_spec(search=SearchSpec(multiple_of=48, speed=False), variants=axes)
    (plan,) = plan_sweep(spec, gpu, predict_start=virtual)
    assert (plan.max_batch_size, plan.certified) == (48, True)
    assert "unconstrained" not in plan.details


def test_a_greatest_batch_size_is_no_certified_maximum():
    gpu = Gpu()
    plan = plan_of(gpu, SearchSpec(max_batch_size=32, speed=False), predictor=Gpu(PREDICTED))
    assert (plan.max_batch_size, plan.first_oom_batch_size, plan.certified) == (32, None, False)
    assert gpu.sizes() == [32]
    assert any("search.max_batch_size" in note and "not certified" in note for note in plan.notes)
    assert plan.details["unconstrained"]["max_batch_size"] == 64
    beyond = plan_of(Gpu(), SearchSpec(max_batch_size=100, speed=False))
    assert (beyond.max_batch_size, beyond.certified) == (64, True)


@pytest.mark.parametrize(("headroom", "largest"), [(Headroom(bytes=2 * GIB), 56), (Headroom(share=0.25), 48)])
def test_headroom_is_kept_free_of_the_capacity(headroom, largest):
    gpu, virtual, store = Gpu(), Gpu(PREDICTED), MemoryStore()
    plan = plan_of(gpu, SearchSpec(headroom=headroom, speed=False), predictor=virtual, store=store)
    usable = 16 * GIB - headroom.of(16 * GIB)
    assert (plan.max_batch_size, plan.first_oom_batch_size, plan.certified) == (largest, largest + 1, True)
    assert plan.capacity_bytes == 16 * GIB
    assert plan.details["headroom"] == {"bytes": 16 * GIB - usable, "usable_bytes": usable}
    assert plan.details["unconstrained"] == {"max_batch_size": 64, "source": "predicted"}
    assert set(gpu.capacities) == {usable}
    # What ran under less than the capacity is not evidence for the whole of it, nor the other way round.
    assert {stored.capacity_bytes for _, _, stored in store.trials if stored.trial.source is MEASURED} == {usable}
    whole = plan_of(gpu, QUIET, predictor=virtual, store=store)
    assert (whole.max_batch_size, whole.stored, whole.capacity_bytes) == (64, False, 16 * GIB)


def test_headroom_that_leaves_nothing_is_refused_before_anything_runs():
    gpu = Gpu()
    with pytest.raises(InvalidSpec, match=r"keeps 16\.00 GiB of 16\.00 GiB free") as caught:
        plan_of(gpu, SearchSpec(headroom=Headroom(bytes=16 * GIB)))
    assert caught.value.field == "search.headroom"
    assert not gpu.runs


def test_one_batch_size_is_judged_beside_the_headroom():
    spec = make_spec(search=SearchSpec(headroom=Headroom(bytes=2 * GIB)))
    store = MemoryStore()
    for asked, fits in ((spec, False), (make_spec(), True)):
        (plan,) = plan_sweep(asked, Gpu(), batch_size=60, store=store)
        assert (plan.fits, plan.stored) == (fits, False)


def test_the_fastest_size_and_the_knee_are_measured_with_a_few_trials_more():
    gpu = Gpu()
    plan = plan_of(gpu, predictor=Gpu(PREDICTED))
    assert gpu.runs[:2] == [(64, 1, True), (65, 1, True)]
    assert 1 <= len(gpu.runs) - 2 <= MAX_TIMED
    assert plan.certified
    assert plan.details["fastest"] == {
        "batch_size": 64, "step_time_s": pytest.approx(0.74), "samples_per_second": pytest.approx(64 / 0.74),
        "source": "measured", "num_sizes_timed": len(gpu.runs) - 1,
    }  # fmt: skip
    assert plan.details["knee"]["batch_size"] in gpu.sizes()
    extra = plan.details["extra_trials"]
    assert extra == {"num_trials": len(gpu.runs) - 2, "duration_s": 1.5 * (len(gpu.runs) - 2)}


def test_a_smaller_size_may_be_the_fastest():
    plan = plan_of(Gpu(thrashes_from=40, fixed_s=0.0), predictor=Gpu(PREDICTED))
    assert plan.max_batch_size == 64
    assert plan.details["fastest"]["batch_size"] < 40
    assert plan.details["fastest"]["samples_per_second"] == pytest.approx(100)


def test_speed_is_not_timed_where_nobody_asks_and_never_on_the_virtual_gpu():
    gpu, virtual = Gpu(), Gpu(PREDICTED)
    plan = plan_of(gpu, QUIET, predictor=virtual)
    assert gpu.sizes() == [64, 65]
    assert plan.details["fastest"]["batch_size"] == 64
    assert "extra_trials" not in plan.details
    predicted = plan_of(Gpu(PREDICTED))
    assert not {"fastest", "knee", "extra_trials"} & set(predicted.details)


def test_a_compiled_variant_is_not_compiled_again_for_its_speed():
    spec = make_spec(variants=VariantAxes(compile=(Compile.ON,)))
    gpu = Gpu()
    plan_sweep(spec, gpu, predict_start=Gpu(PREDICTED))
    assert gpu.sizes() == [64, 65]


def test_a_plan_with_speed_answers_the_question_without_and_not_the_other_way_round():
    store = MemoryStore()
    quick = plan_of(Gpu(), QUIET, store=store)
    full = plan_of(Gpu(), store=store)
    assert (quick.stored, full.stored) == (False, False)
    assert plan_of(Gpu(), QUIET, store=store).id == full.id


@given(st.integers(20, 63))
def test_the_largest_size_that_does_not_thrash_ran_and_the_next_one_thrashes(first):
    gpu = Gpu(thrashes_from=first, fixed_s=0.0)
    plan = plan_of(gpu, predictor=Gpu(PREDICTED))
    calm = plan.details["largest_without_thrashing"]
    assert (plan.max_batch_size, plan.certified) == (64, True)
    assert (calm["batch_size"], calm["first_thrashing_batch_size"]) == (first - 1, first)
    assert {first - 1, first} <= set(gpu.sizes())
    assert calm["fresh_process"]
    assert len(gpu.runs) <= 2 + MAX_TIMED + MAX_THRASHING + 1
    assert plan.details["thrashing"]["slowdown"] == pytest.approx(2)
    assert any("batch size 64 fits but thrashes: it takes 2.0 times" in note for note in plan.notes)
    assert any(f"{first - 1} ran without" in note for note in plan.notes)


def test_thrashing_is_told_without_the_trials_for_speed_too():
    gpu = Gpu(thrashes_from=60, fixed_s=0.0)
    plan = plan_of(gpu, QUIET, predictor=Gpu(PREDICTED))
    assert plan.details["largest_without_thrashing"]["batch_size"] == 59


def test_a_leak_is_reported_and_nothing_is_certified():
    plan = plan_of(Gpu(leak_bytes=12 * MIB), QUIET)
    left = (16 * GIB - 64 * SAMPLE) // (12 * MIB)
    assert plan.details["leak"] == {
        "batch_size": 64, "bytes_per_step": 12 * MIB, "steps_left": left, "source": "measured", "in_cycles": False,
    }  # fmt: skip
    assert (plan.max_batch_size, plan.certified) == (64, False)
    assert any(note.startswith("a leak: at batch size 64 every step leaves 12.0 MiB more") for note in plan.notes)
    (one,) = plan_sweep(make_spec(), Gpu(leak_bytes=12 * MIB), batch_size=32)
    assert (one.fits, one.details["leak"]["steps_left"]) == (None, 8 * GIB // (12 * MIB))
    assert one.notes == (leak_of(one.trials[0], 16 * GIB).sentence(),)  # as the gate says it
    predicted = plan_of(Gpu(PREDICTED, leak_bytes=12 * MIB))
    assert predicted.details["leak"] == {**plan.details["leak"], "source": "predicted"}
    assert predicted.notes[0].startswith("a leak, predicted: at batch size 64 every step leaves 12.0 MiB more")


def test_a_global_batch_size_is_reached_exactly_by_micro_batches_that_ran_while_accumulating():
    gpu = Gpu()
    plan = plan_of(gpu, SearchSpec(multiple_of=8, speed=False), target=512, predictor=Gpu(PREDICTED))
    answer = plan.details["accumulation"]
    assert (plan.max_batch_size, answer["micro_batch_size"], answer["accumulation_steps"]) == (64, 32, 16)
    # Without accumulation 64 samples fit; with the gradients of the micro-batches before they do not.
    assert gpu.sizes(steps=4)[0] == 64
    assert answer["timed_accumulation_steps"] == 4
    assert answer["samples_per_second"] == pytest.approx(128 / (0.1 + 1.28))
    assert [each["micro_batch_size"] for each in answer["candidates"]] == [32, 16]
    assert all(each["micro_batch_size"] * each["accumulation_steps"] == 512 for each in answer["candidates"])
    assert all(fresh for _, steps, fresh in gpu.runs if steps > 1)


def test_a_prediction_gives_the_largest_exact_micro_batch_and_no_speed():
    gpu = Gpu(PREDICTED)
    answer = plan_of(gpu, target=512).details["accumulation"]
    assert (answer["micro_batch_size"], answer["accumulation_steps"], answer["source"]) == (32, 16, "predicted")
    assert answer["samples_per_second"] is None
    assert gpu.sizes(steps=2) == [64, 32]


@pytest.mark.parametrize(
    ("target", "search", "way"),
    [
        (999, SearchSpec(multiple_of=3, speed=False), (27, 37)),
        (512, SearchSpec(max_batch_size=40, speed=False), (32, 16)),
    ],
)
def test_the_few_steps_that_are_tried_need_not_divide_the_global_batch_size(target, search, way):
    for gpu in (Gpu(), Gpu(PREDICTED)):
        answer = plan_of(gpu, search, target=target).details["accumulation"]
        assert (answer["micro_batch_size"], answer["accumulation_steps"]) == way


def test_a_global_batch_size_that_fits_at_once_needs_no_accumulation():
    gpu = Gpu()
    answer = plan_of(gpu, QUIET, target=40).details["accumulation"]
    assert (answer["micro_batch_size"], answer["accumulation_steps"]) == (40, 1)
    assert (gpu.sizes(steps=2), gpu.sizes(steps=4)) == ([20], [10])
    fixed = plan_of(Gpu(), QUIET, target=40, accumulation_steps=4).details["accumulation"]
    assert (fixed["micro_batch_size"], fixed["accumulation_steps"]) == (10, 4)


@pytest.mark.parametrize(("target", "multiple"), [(511, 8), (61 * 67, 2)])
def test_a_global_batch_size_that_no_micro_batch_reaches(target, multiple):
    plan = plan_of(Gpu(), SearchSpec(multiple_of=multiple, speed=False), target=target)
    assert plan.details["accumulation"] == {"global_batch_size": target, "micro_batch_size": None}
    assert plan.certified


def test_a_model_that_cannot_accumulate_keeps_its_answer():
    gpu = Gpu(cannot_accumulate=frozenset({32}))
    plan = plan_of(gpu, QUIET, target=512)
    answer = plan.details["accumulation"]
    assert (plan.max_batch_size, plan.certified, answer["micro_batch_size"]) == (64, True, None)
    assert answer["error"]["code"] == "model_error"


def test_a_contradiction_that_the_trials_for_speed_find_is_named():
    plan = plan_of(Gpu(holes=frozenset({32})), predictor=Gpu(PREDICTED))
    assert plan.details["not_monotone"] == {"oom_below": [32]}
    assert any("not monotone: batch size 32 ran out of memory and 64 fitted" in note for note in plan.notes)


def test_what_runs_out_only_while_accumulating_contradicts_nothing():
    gpu = Gpu()
    plan = plan_of(gpu, QUIET, target=122)
    assert plan.max_batch_size == 64
    assert 61 not in gpu.sizes()
    assert gpu.sizes(2)[0] == 61  # 61 samples fit, but not with gradients that wait for the second half
    assert [trial.outcome for trial in plan.trials if trial.batch_size == 61] == [Outcome.OOM]
    assert "not_monotone" not in plan.details
    assert not any("not monotone" in note for note in plan.notes)


def test_a_predicted_hole_is_tried_on_the_real_gpu():
    gpu, virtual = Gpu(holes=frozenset({16})), Gpu(PREDICTED, holes=frozenset({16}))
    plan = plan_of(gpu, QUIET, predictor=virtual)
    assert plan.predicted_max_batch_size == 64
    assert plan.details["not_monotone"] == {"oom_below": [16]}
    # Where the prediction was quick, [64, 65, 16].
    assert (plan.max_batch_size, {16, 64, 65} <= set(gpu.sizes())) == (64, True)


def test_a_search_that_began_below_a_predicted_hole_goes_on_beyond_it(monkeypatch):
    gpu, virtual = Gpu(holes=frozenset({16})), Gpu(PREDICTED, holes=frozenset({16}))
    hint = Ahead.hint

    def early(self, key, value):
        hint(self, key, value)
        deadline = time.monotonic() + 30
        while not gpu.runs and time.monotonic() < deadline:  # the virtual GPU has yet to look beyond the hole
            time.sleep(0.001)

    monkeypatch.setattr(Ahead, "hint", early)
    plan = plan_of(gpu, QUIET, predictor=virtual)
    assert gpu.sizes() == [15, 16, 64, 65, 65]  # the last in a warm process, then in a fresh one
    assert (plan.max_batch_size, plan.first_oom_batch_size, plan.certified) == (64, 65, True)


def test_all_of_it_survives_the_real_store(tmp_path):
    search = SearchSpec(multiple_of=8, headroom=Headroom(share=0.05))
    with Store.open(f"sqlite:///{tmp_path / 'plans.db'}") as store:
        gpu, virtual = Gpu(thrashes_from=56, fixed_s=0.0), Gpu(PREDICTED)
        first = plan_of(gpu, search, target=512, predictor=virtual, store=store)
        assert (first.max_batch_size, first.certified) == (56, True)
        assert first.details["largest_without_thrashing"]["batch_size"] == 48
        ran = len(gpu.runs)
        again = plan_of(gpu, search, target=512, predictor=virtual, store=store)
        assert (again.stored, again.details, len(gpu.runs)) == (True, first.details, ran)
        assert not plan_of(gpu, replace(search, multiple_of=16), target=512, predictor=virtual, store=store).stored


def test_nothing_that_fits_leaves_nothing_to_choose():
    plan = plan_of(Gpu(capacity_bytes=100 * MIB), target=512)
    assert (plan.max_batch_size, plan.certified) == (0, True)
    assert plan.details == {"accumulation": {"global_batch_size": 512, "micro_batch_size": None}}
    assert plan.variant == FP32
