"""A sweep: the plan of every variant of a spec on one device, with what the store knows and for it to keep.

The command line, the workers and the service all plan through here. Every trial is stored as it ends and every plan as
its variant ends, so an interruption loses nothing: the next sweep reads back what was run and goes on.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from planner.ahead import Ahead
from planner.answers import Answers, doubts_of, explained_size, notes_of
from planner.choices import (
    TIMED_STEPS,
    accumulate,
    accumulation_details,
    beyond_largest,
    bytes_per_sample,
    leak_details,
    suspects,
)
from planner.devices import Device, Explainer, TrialRunner
from planner.errors import DeviceError, InvalidArgument, InvalidInput, InvalidSpec, PlannerError
from planner.evidence import PlanStore
from planner.progress import (
    Listener,
    Progress,
    SweepFinished,
    SweepStarted,
    VariantFinished,
    VariantStarted,
)
from planner.search import LIMIT, Ask, Search, SearchResult, contradiction_note, contradictions
from planner.specs.model import SearchSpec, Spec
from planner.specs.variants import Checkpointing, Compile, Parallelism, Variant
from planner.throughput import Accumulation, accumulations
from planner.trial_log import Stopped, TrialLog, Unanswered, device_errors
from planner.trials import Environment, Outcome, Plan, PlanStatus, Source, Trial

_FIRST_PREDICTED = 8
"""Where a search on the virtual GPU begins: sizes up to 5 cost a trace each, others only a replay."""
_LOOK_BEYOND = 2
"""Sizes above the first out of memory that a search on the virtual GPU tries too: each costs a replay."""


def plan_sweep(
    spec: Spec,
    device: Device,
    *,
    store: PlanStore | None = None,
    batch_size: int | None = None,
    fresh: bool = False,
    predict_start: Device | None = None,
    listener: Listener = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    worker: str | None = None,
) -> tuple[Plan, ...]:
    """The plans of all variants, in the spec's order; of one ``batch_size`` in place of the search where it is given.

    A stored answer to the same question stands in for new work, and stored trials of an unfinished search for running
    them again, unless ``fresh``. ``predict_start`` is the virtual GPU that says where the search on a real one begins.
    ``should_stop`` is asked between trials; what is finished then is the result.

    A variant that cannot be run becomes a plan that says why. Raises ``InvalidInput`` for a spec or argument that is
    wrong for every variant, ``DeviceError`` for a GPU that cannot be used or is gone, ``StoreError``; plans that were
    finished by then are stored.
    """
    if batch_size is not None and batch_size < 1:
        raise InvalidArgument(f"{batch_size} is not a batch size: it must be at least 1", field="batch_size")
    spec.usable_bytes(device.capacity_bytes)
    variants = spec.variants.product()
    environment = device.environment(spec)
    listener(SweepStarted(variants=variants))
    plans: list[Plan] = []
    with Ahead[Variant, Plan]() as ahead, _resting(device):
        for index, variant in enumerate(variants):
            if should_stop():
                return tuple(plans)
            listener(VariantStarted(variant=variant, index=index))
            work = _VariantWork(
                spec, variant, device, environment, store, batch_size, fresh, listener, should_stop, worker, ahead
            )
            work.compare_at = _size_without_checkpointing(variant, plans)
            try:
                plan = work.stored_plan()
                if plan is None:
                    device.prepare(spec, variants[index:])
                    if predict_start is not None and batch_size is None and not ahead.has(variant):
                        work.predict_ahead(predict_start, variants[index:])
                    plan = work.plan(predict_start)
            except Stopped:
                return tuple(plans)
            plans.append(plan)
            listener(VariantFinished(plan=plan, index=index))
    listener(SweepFinished(plans=tuple(plans)))
    return tuple(plans)


@contextlib.contextmanager
def _resting(device: Device) -> Iterator[None]:
    """However a sweep ends, its device holds nothing for another trial."""
    try:
        yield
    finally:
        device.rest()


@dataclass(slots=True)
class _VariantWork:
    """One question: one variant on one device."""

    spec: Spec
    variant: Variant
    device: Device
    environment: Environment
    store: PlanStore | None
    batch_size: int | None
    fresh: bool
    listener: Listener
    should_stop: Callable[[], bool]
    worker: str | None
    ahead: Ahead[Variant, Plan]
    """Predictions that are made beside the trials of the variants before."""
    log: TrialLog = field(init=False)
    answers: Answers = field(init=False)
    predicted_failure: str | None = None
    """Why the virtual GPU could not answer either: it knows more of an index out of range than a real one tells."""
    predicted_explanation: Mapping[str, Any] | None = None
    """What the virtual GPU said takes the memory, at the batch size that it expected."""
    announce: Callable[[int], None] = lambda size: None
    """Told which batch size a search on the virtual GPU has come to, before that is checked by a trace."""
    compare_at: int | None = None
    """A batch size of another variant that predictions are made at too, so that the two can be compared."""

    def __post_init__(self) -> None:
        self.log = TrialLog(
            self.spec, self.variant, self.environment, self.capacity_bytes, self.store, self.listener, self.should_stop,
            self.worker,
        )  # fmt: skip
        self.answers = Answers(
            spec=self.spec, variant=self.variant, environment=self.environment, batch_size=self.batch_size,
            capacity_bytes=self.given_bytes, usable_bytes=self.capacity_bytes, question=self.question,
            trials=self.log.trials, worker=self.worker,
        )  # fmt: skip

    @property
    def question(self) -> Mapping[str, Any]:
        """What the spec asks of a search; of one batch size, whether it fits beside the headroom."""
        asked = self.spec.question()
        return asked if self.batch_size is None else {key: asked[key] for key in asked if key == "headroom"}

    @property
    def capacity_bytes(self) -> int:
        """What trials may reserve: the capacity without the headroom."""
        return self.spec.usable_bytes(self.given_bytes)

    @property
    def given_bytes(self) -> int:
        """The capacity that the question is about, of one of the variant's GPUs."""
        limit = self.device.limit
        return self.device.capacity_bytes if limit is None else limit.of(self.variant).capacity_bytes

    @property
    def is_measured(self) -> bool:
        return self.environment.source is Source.MEASURED

    def stored_plan(self) -> Plan | None:
        plan = self._find_plan({key: self.question[key] for key in self.question if key != "speed"})
        plan = plan or self._find_plan(self.question)  # one that says more answers too
        # The label is the asker's: it is no part of what is trained. So is what a limit stands for.
        return plan and self._marked(replace(plan, stored=True, spec_name=self.spec.name))

    def _find_plan(self, question: Mapping[str, Any]) -> Plan | None:
        if self.store is None or self.fresh:
            return None
        return self.store.find_plan(
            self.spec.hash, self.variant, self.environment.key(), self.given_bytes, self.batch_size, question
        )

    def plan(self, predict_start: Device | None) -> Plan:
        if not self.fresh:
            self.log.read_back()
        try:
            with device_errors():
                opened = self._open(self.spec)
            with opened as runner:
                if self.batch_size is not None:
                    plan = self._plan_one(runner, self.batch_size, predict_start)
                else:
                    plan = self._plan_search(runner, predict_start)
                plan = self._explained(plan, runner)
            if self.is_measured:
                plan = self._explained_by_prediction(plan, predict_start)
        except Unanswered as unanswered:
            if self.should_stop():  # whoever stopped it may have ended the device's process: no fault of the variant
                raise Stopped from unanswered
            plan = self.answers.unanswered(unanswered.error)
        if self.log.num_read_back:
            note = f"{self.log.num_read_back} of {len(self.log.trials)} trials had been stored by an earlier run"
            plan = replace(plan, notes=(*plan.notes, note))
        plan = self._marked(plan)
        if self.store is not None:
            plan = replace(plan, id=self.store.add_plan(self.spec, plan, self.log.ids))
        return plan

    def _marked(self, plan: Plan) -> Plan:
        """``plan`` with the word that it was measured under a limit, where it was."""
        if self.device.limit is None:
            return plan
        limit = self.device.limit.of(self.variant)
        notes = (note for note in plan.notes if not limit.is_note(note))
        return replace(plan, notes=(limit.note, *notes), details={**plan.details, "limit": limit.as_dict()})

    def predict_ahead(self, predictor: Device, variants: Sequence[Variant]) -> None:
        """Have all of these variants predicted, this one first, while the first trials run."""
        predictor.prepare(self.spec, variants)
        self.ahead.begin({variant: partial(self._predict, predictor, variant) for variant in variants})

    def _predict(self, predictor: Device, variant: Variant) -> Plan:
        """What the virtual GPU says; stored as any plan.

        Several GPUs are not predicted: one of them takes about as much, which is good enough to begin with.
        """
        alone = replace(variant, parallelism=Parallelism.SINGLE, gpus=1)
        work = _VariantWork(
            self.spec, alone, predictor, predictor.environment(self.spec), self.store, self.batch_size,
            self.fresh, _nobody, lambda: self.ahead.is_over, self.worker, self.ahead,
        )  # fmt: skip
        if self.ahead.has(variant):
            work.announce = partial(self.ahead.hint, variant)
        return work.stored_plan() or work.plan(None)

    def _predicted(self, predictor: Device | None) -> Plan | None:
        """What is expected to come out; ``None`` when nothing could be predicted.

        Raises ``InvalidSpec`` as the real device would, or could not: what an index out of range does to a real GPU
        says nothing of where it comes from.
        """
        if predictor is None:
            return None
        try:
            if self.ahead.has(self.variant):
                plan = self.ahead.take(self.variant, self.should_stop)
            else:
                plan = self._predict(predictor, self.variant)
        except InvalidSpec:
            raise
        except (InvalidInput, DeviceError) as error:  # the real device says what is wrong with the work, if it is
            self.predicted_failure = error.message
            return None
        if plan.status is PlanStatus.FAILED and plan.error is not None:
            self.predicted_failure = str(plan.error["message"])
        if plan.variant == self.variant:
            self.predicted_explanation = plan.details.get("explanation")
        return plan if plan.status is PlanStatus.PLANNED else None

    def _open(self, spec: Spec) -> TrialRunner:
        return self.device.open(spec, self.variant, capacity_bytes=self.capacity_bytes)

    def _soon_predicted(self, predictor: Device | None) -> int | None:
        """Where a search may begin while its prediction is still being checked; ``None`` where there is one already, or
        where more of it is needed to begin."""
        if predictor is None or self.spec.search.is_constrained or not self.ahead.has(self.variant):
            return None
        return self.ahead.take_hint(self.variant, self.should_stop)

    def _plan_search(self, runner: TrialRunner, predictor: Device | None) -> Plan:
        if soon := self._soon_predicted(predictor):
            search = self._begin_search(self.spec.search, soon, None)
            self._run_search(search, runner, num_trials=1)
            predicted = self._predicted(predictor)
            worth_a_trial = suspects(predicted, began_at=soon)
            search.expect(suspects=worth_a_trial, bytes_per_sample=bytes_per_sample(predicted))
            return self._planned(runner, predicted, self._run_search(search, runner), {})
        predicted = self._predicted(predictor)
        constraints, start = self.spec.search, predicted.max_batch_size if predicted else None
        details: dict[str, Any] = {}
        if constraints.is_constrained and (free := self._unconstrained(runner, predicted)):
            details["unconstrained"] = free
            start = free["max_batch_size"] if start is None and not constraints.headroom.of(1) else start
        return self._planned(runner, predicted, self._search(runner, constraints, start, predicted), details)

    def _planned(
        self, runner: TrialRunner, predicted: Plan | None, result: SearchResult, details: dict[str, Any]
    ) -> Plan:
        """The plan of a search that is over, with what is found out beyond its answer."""
        if result.failure is not None:
            return self.answers.failed(result.failure, result.notes, self.predicted_failure)
        self._compare(runner, result)
        notes = [*notes_of(result.trials), *result.notes]
        if self.predicted_failure is not None:
            notes.append(f"the search began without a prediction: {self.predicted_failure}")
        if result.best is not None:
            found, said = self._beyond(runner, result, result.best)
            details |= found
            notes += said
        # Before any trial accumulates: that a size runs out beside gradients that wait says nothing of it without them.
        if below := contradictions(self.log.trials, result.max_batch_size or 0):
            details["not_monotone"] = {"oom_below": list(below)}
            notes.append(contradiction_note(self.log.trials, below))
        if self.spec.train.global_batch_size is not None:
            details["accumulation"] = self._accumulated(runner, result, self.spec.train.global_batch_size)
        plan = self.answers.planned(
            result.best,
            notes,
            max_batch_size=result.max_batch_size,
            first_oom_batch_size=result.first_oom_batch_size,
            certified=self._is_certified(result) and "leak" not in details,
            details=details,
        )
        expected = predicted.max_batch_size if predicted and predicted.variant == self.variant else None
        return replace(plan, predicted_max_batch_size=expected)

    def _search(
        self, runner: TrialRunner, constraints: SearchSpec, start: int | None, predicted: Plan | None = None
    ) -> SearchResult:
        return self._run_search(self._begin_search(constraints, start, predicted), runner)

    def _begin_search(self, constraints: SearchSpec, start: int | None, predicted: Plan | None) -> Search:
        limit = constraints.max_batch_size
        return Search(
            start=start,
            first=1 if self.is_measured else _FIRST_PREDICTED,
            limit=LIMIT if limit is None else limit,
            limit_name=None if limit is None else "search.max_batch_size",
            multiple_of=constraints.multiple_of,
            suspects=suspects(predicted),
            look_beyond=0 if self.is_measured else _LOOK_BEYOND,
            confirm_fresh=True,
            capacity_bytes=self.capacity_bytes,
            bytes_per_sample=bytes_per_sample(predicted),
        )

    def _run_search(self, search: Search, runner: TrialRunner, num_trials: int = sys.maxsize) -> SearchResult:
        """Run at most so many trials of ``search``."""
        for _ in range(num_trials):
            ask = search.ask()
            if ask is None:
                break
            search.tell(self.log.run(runner, ask))
            found = search.result()
            if found.first_oom_batch_size is not None:
                self.announce(found.max_batch_size or 0)
        return search.result()

    def _unconstrained(self, runner: TrialRunner, predicted: Plan | None) -> dict[str, Any] | None:
        """The largest batch size without the constraints, to tell what they cost: stored, or else predicted."""
        plain = replace(
            self.spec, search=SearchSpec(speed=False), train=replace(self.spec.train, global_batch_size=None)
        )
        work = replace(self, spec=plain, listener=_nobody, compare_at=None)
        known = work.stored_plan()
        if known is None and self.is_measured:
            # A prediction for one of several GPUs says where to begin, not what constraints cost there.
            return predicted.details.get("unconstrained") if predicted and predicted.variant == self.variant else None
        if known is None and not self.spec.search.headroom.of(1):
            found = self._search(runner, SearchSpec(), None).max_batch_size
            return None if found is None else {"max_batch_size": found, "source": str(Source.PREDICTED)}
        known = known or work.plan(None)
        if known.max_batch_size is None:
            return None
        return {"max_batch_size": known.max_batch_size, "source": str(known.source)}

    def _beyond(self, runner: TrialRunner, result: SearchResult, best: Trial) -> tuple[dict[str, Any], list[str]]:
        if not self.is_measured:
            return leak_details(best, self.capacity_bytes)
        # Each further size of a compiled variant is compiled first.
        speed = self.spec.search.speed and self.variant.compile is Compile.OFF
        return beyond_largest(
            partial(self._run_extra, runner, result), self.log.trials, best, capacity_bytes=self.capacity_bytes,
            multiple_of=self.spec.search.multiple_of, speed=speed,
        )  # fmt: skip

    def _run_extra(self, runner: TrialRunner, result: SearchResult, size: int, fresh: bool, left: int) -> Trial:
        low, high = result.max_batch_size or 0, result.first_oom_batch_size
        return self.log.run(runner, Ask(batch_size=size, fresh=fresh, low=low, high=high, remaining_trials=left))

    def _accumulated(self, runner: TrialRunner, result: SearchResult, target: int) -> dict[str, Any]:
        """How ``target`` samples make one optimizer step, from trials that accumulate: gradients then stay allocated
        during the forward pass, so that a size which fits without accumulation may not fit with it."""
        train = self.spec.train
        ways = accumulations(
            target, result.max_batch_size or 0, gpus=self.variant.gpus, multiple_of=self.spec.search.multiple_of,
            steps=train.accumulation_steps if train.accumulation_steps > 1 else None,
        )  # fmt: skip
        with contextlib.ExitStack() as stack:
            runners = {train.accumulation_steps: (self.spec, runner)}

            def run(way: Accumulation, left: int) -> Trial:
                steps = way.accumulation_steps if train.step is None else 1  # train.step accumulates itself
                steps = steps if steps in runners else min(steps, TIMED_STEPS if self.is_measured else 2)
                if steps not in runners:
                    # The target is made by all steps, these are a few: they need not divide it.
                    spec = replace(self.spec, train=replace(train, accumulation_steps=steps, global_batch_size=None))
                    runners[steps] = spec, stack.enter_context(self._open(spec))
                spec, accumulating = runners[steps]
                ask = Ask(
                    batch_size=way.micro_batch_size, fresh=True, low=result.max_batch_size or 0,
                    high=result.first_oom_batch_size, remaining_trials=left,
                )  # fmt: skip
                return self.log.run(accumulating, ask, spec)

            try:
                found = accumulate(run, ways, is_measured=self.is_measured)
            except Unanswered as unanswered:  # the answer to the search stands
                return {"global_batch_size": target, "micro_batch_size": None, "error": unanswered.error.as_dict()}
        return accumulation_details(target, found)

    def _explained(self, plan: Plan, runner: TrialRunner) -> Plan:
        """The plan with what takes the memory, where the device can say: at the size that ``explained_size`` names."""
        if plan.status is not PlanStatus.PLANNED or not isinstance(runner, Explainer):
            return plan
        with device_errors():
            explanation = runner.explain(explained_size(plan))
        return replace(plan, details={**plan.details, "explanation": explanation})

    def _explained_by_prediction(self, plan: Plan, predictor: Device | None) -> Plan:
        """A measured plan with the virtual GPU's explanation of the same size; without one where there is none."""
        if plan.status is not PlanStatus.PLANNED or predictor is None:
            return plan
        known = self.predicted_explanation
        if known is not None and known["batch_size"] == explained_size(plan):
            return replace(plan, details={**plan.details, "explanation": known})
        try:
            with predictor.open(self.spec, self.variant, capacity_bytes=self.capacity_bytes) as runner:
                return self._explained(plan, runner)
        except (PlannerError, Unanswered):
            return plan  # the answer itself was measured

    def _compare(self, runner: TrialRunner, result: SearchResult) -> None:
        """A prediction more costs milliseconds; on a real GPU the search's own trials must do."""
        size, largest = self.compare_at, result.max_batch_size or 0
        if self.is_measured or not size or size > largest or size in {trial.batch_size for trial in result.trials}:
            return
        high = result.first_oom_batch_size
        self.log.run(runner, Ask(batch_size=size, fresh=False, low=largest, high=high, remaining_trials=1))

    def _plan_one(self, runner: TrialRunner, batch_size: int, predictor: Device | None) -> Plan:
        ask = Ask(batch_size=batch_size, fresh=True, low=0, high=None, remaining_trials=1)
        trial = self.log.run(runner, ask)
        if trial.outcome is Outcome.FAILED:
            trial = self.log.run(runner, ask)
        if trial.outcome is Outcome.FAILED:
            self._predicted(predictor)
            return self.answers.failed(trial, (), self.predicted_failure)
        details, notes = leak_details(trial, self.capacity_bytes)
        notes = [*notes_of([trial]), *doubts_of(trial, self.capacity_bytes), *notes]
        fits = None if "leak" in details else trial.fits
        return self.answers.planned(trial, notes, batch_size=batch_size, fits=fits, details=details)

    def _is_certified(self, result: SearchResult) -> bool:
        return result.certified and all(trial.source is Source.MEASURED for trial in result.trials)


def _size_without_checkpointing(variant: Variant, plans: Sequence[Plan]) -> int | None:
    """The largest batch size of the same variant without checkpointing, where that is planned already."""
    plain = replace(variant, checkpointing=Checkpointing.NONE)
    return next((plan.max_batch_size for plan in plans if plan.variant == plain != variant), None)


def _nobody(event: Progress) -> None:
    """The listener of a search that only says where another one begins."""
