"""A sweep: the plan of every variant of a spec on one device, with what the store knows and for it to keep.

The command line, the workers and the service all plan through here. Every trial is stored as it ends and every plan as
its variant ends, so an interruption loses nothing: the next sweep reads back what was run and goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

from planner.ahead import Ahead
from planner.devices import Device, Explainer, TrialRunner
from planner.errors import DeviceError, InvalidArgument, InvalidInput, InvalidSpec, PlannerError
from planner.progress import (
    Listener,
    Progress,
    SweepFinished,
    SweepStarted,
    TrialFinished,
    TrialStarted,
    VariantFinished,
    VariantStarted,
)
from planner.search import Ask, Search, SearchResult
from planner.specs.model import Spec
from planner.specs.variants import Checkpointing, Variant
from planner.trials import Environment, Outcome, Plan, PlanStatus, Source, Trial

_FIRST_PREDICTED = 8
"""Where a search on the virtual GPU begins: sizes up to 5 cost a trace each, others only a replay."""
_LOOK_BEYOND = 2
"""Sizes above the first out of memory that a search on the virtual GPU tries too: each costs a replay."""
_MOST_SUSPECTS = 2


class StoredTrial(Protocol):
    """A trial as a store gives it back, with what it was run on."""

    @property
    def id(self) -> str: ...
    @property
    def environment(self) -> Environment: ...
    @property
    def capacity_bytes(self) -> int: ...
    @property
    def trial(self) -> Trial: ...


class PlanStore(Protocol):
    """What planning asks of a store; ``planner.store.Store`` is one."""

    def find_plan(
        self,
        spec_hash: str,
        variant: Variant,
        environment_key: str,
        capacity_bytes: int,
        batch_size: int | None = None,
        question: Mapping[str, Any] | None = None,
    ) -> Plan | None: ...

    def find_trials(
        self,
        spec_hash: str,
        variant: Variant,
        gpu: str | None = None,
        environment_key: str | None = None,
        source: Source | None = None,
    ) -> Sequence[StoredTrial]: ...

    def add_trial(
        self,
        spec: Spec,
        variant: Variant,
        environment: Environment,
        capacity_bytes: int,
        trial: Trial,
        worker: str | None = None,
    ) -> str: ...

    def add_plan(self, spec: Spec, plan: Plan, trial_ids: Sequence[str]) -> str: ...


class TrialFailed(PlannerError):
    """A trial ended twice for another reason than memory: the ``error`` of a failed plan, never raised."""

    code = "trial_failed"


class _Stopped(Exception):
    """``should_stop`` said so between two trials."""


class _Unanswered(Exception):
    """The device gave this variant up; errors of the store and of the listener are not the variant's."""

    def __init__(self, error: PlannerError) -> None:
        super().__init__(str(error))
        self.error = error


@contextlib.contextmanager
def _device_errors() -> Iterator[None]:
    """What keeps one variant from running must not stop the others: told apart from what is wrong for all of them."""
    try:
        yield
    except DeviceError:
        raise
    except InvalidInput as error:
        if isinstance(error, InvalidSpec) and (error.field or "").startswith("variants."):
            raise _Unanswered(error) from error
        raise
    except PlannerError as error:
        raise _Unanswered(error) from error


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
    variants = spec.variants.product()
    environment = device.environment(spec)
    listener(SweepStarted(variants=variants))
    plans: list[Plan] = []
    with Ahead[Variant, Plan]() as ahead:
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
            except _Stopped:
                return tuple(plans)
            plans.append(plan)
            listener(VariantFinished(plan=plan, index=index))
    listener(SweepFinished(plans=tuple(plans)))
    return tuple(plans)


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
    trials: list[Trial] = field(default_factory=list)
    trial_ids: list[str] = field(default_factory=list)
    read_back: dict[int, StoredTrial] = field(default_factory=dict)
    """Stored trials that can stand in for running them again, by batch size."""
    num_read_back: int = 0
    predicted_failure: str | None = None
    """Why the virtual GPU could not answer either: it knows more of an index out of range than a real one tells."""
    predicted_explanation: Mapping[str, Any] | None = None
    """What the virtual GPU said takes the memory, at the batch size that it expected."""
    compare_at: int | None = None
    """A batch size of another variant that predictions are made at too, so that the two can be compared."""

    @property
    def question(self) -> Mapping[str, Any]:
        """What the spec asks of a search; one batch size is a question of its own."""
        return self.spec.question() if self.batch_size is None else {}

    @property
    def is_measured(self) -> bool:
        return self.environment.source is Source.MEASURED

    def stored_plan(self) -> Plan | None:
        if self.store is None or self.fresh:
            return None
        plan = self.store.find_plan(
            self.spec.hash, self.variant, self.environment.key(), self.device.capacity_bytes, self.batch_size,
            self.question,
        )  # fmt: skip
        # The label is the asker's: it is no part of what is trained. So is what a limit stands for.
        return plan and self._marked(replace(plan, stored=True, spec_name=self.spec.name))

    def plan(self, predict_start: Device | None) -> Plan:
        self._read_trials_back()
        try:
            with _device_errors():
                opened = self.device.open(self.spec, self.variant)
            with opened as runner:
                if self.batch_size is not None:
                    plan = self._plan_one(runner, self.batch_size, predict_start)
                else:
                    plan = self._plan_search(runner, self._predicted(predict_start))
                plan = self._explained(plan, runner)
            if self.is_measured:
                plan = self._explained_by_prediction(plan, predict_start)
        except _Unanswered as unanswered:
            plan = self._unanswered(unanswered.error)
        if self.num_read_back:
            note = f"{self.num_read_back} of {len(self.trials)} trials had been stored by an earlier run"
            plan = replace(plan, notes=(*plan.notes, note))
        plan = self._marked(plan)
        if self.store is not None:
            plan = replace(plan, id=self.store.add_plan(self.spec, plan, self.trial_ids))
        return plan

    def _marked(self, plan: Plan) -> Plan:
        """``plan`` with the word that it was measured under a limit, where it was."""
        limit = self.device.limit
        if limit is None:
            return plan
        notes = (note for note in plan.notes if not limit.is_note(note))
        return replace(plan, notes=(limit.note, *notes), details={**plan.details, "limit": limit.as_dict()})

    def _read_trials_back(self) -> None:
        if self.store is None or self.fresh:
            return
        found = self.store.find_trials(
            self.spec.hash, self.variant, gpu=self.environment.gpu, environment_key=self.environment.key()
        )
        for stored in reversed(found):  # newest first: the newest stays
            usable = stored.trial.outcome is not Outcome.FAILED and (stored.trial.fresh_process or not self.is_measured)
            if usable and stored.capacity_bytes == self.device.capacity_bytes:
                self.read_back[stored.trial.batch_size] = stored

    def predict_ahead(self, predictor: Device, variants: Sequence[Variant]) -> None:
        """Have all of these variants predicted, this one first, while the first trials run."""
        predictor.prepare(self.spec, variants)
        self.ahead.begin({variant: partial(self._predict, predictor, variant) for variant in variants})

    def _predict(self, predictor: Device, variant: Variant) -> Plan:
        """What the virtual GPU says; stored as any plan."""
        work = _VariantWork(
            self.spec, variant, predictor, predictor.environment(self.spec), self.store, self.batch_size,
            self.fresh, _nobody, lambda: self.ahead.is_over, self.worker, self.ahead,
        )  # fmt: skip
        return work.stored_plan() or work.plan(None)

    def _predicted(self, predictor: Device | None) -> Plan | None:
        """What is expected to come out; ``None`` when nothing could be predicted.

        Raises ``InvalidSpec`` as the real device would, or could not: what an index out of range does to a real GPU
        says nothing of where it comes from.
        """
        if predictor is None:
            return None
        try:
            has_begun = self.ahead.has(self.variant)
            plan = self.ahead.take(self.variant) if has_begun else self._predict(predictor, self.variant)
        except InvalidSpec:
            raise
        except (InvalidInput, DeviceError):
            return None  # the real device says what is wrong, if it is
        if plan.status is PlanStatus.FAILED and plan.error is not None:
            self.predicted_failure = str(plan.error["message"])
        self.predicted_explanation = plan.details.get("explanation")
        return plan if plan.status is PlanStatus.PLANNED else None

    def _plan_search(self, runner: TrialRunner, predicted: Plan | None) -> Plan:
        search = Search(
            start=self._start(predicted),
            suspects=_suspects(predicted),
            look_beyond=0 if self.is_measured else _LOOK_BEYOND,
            confirm_fresh=self.is_measured,
            capacity_bytes=self.device.capacity_bytes,
            bytes_per_sample=_bytes_per_sample(predicted),
        )
        while (ask := search.ask()) is not None:
            search.tell(self._run(runner, ask))
        result = search.result()
        if result.failure is not None:
            return self._failed(result.failure, result.notes)
        self._compare(runner, result)
        plan = self._answer(
            result.best,
            [*_notes_of(result.trials), *result.notes],
            max_batch_size=result.max_batch_size,
            first_oom_batch_size=result.first_oom_batch_size,
            certified=self._is_certified(result),
        )
        return replace(plan, predicted_max_batch_size=predicted.max_batch_size if predicted else None)

    def _start(self, predicted: Plan | None) -> int | None:
        if predicted is not None:
            return predicted.max_batch_size
        return None if self.is_measured else _FIRST_PREDICTED

    def _explained(self, plan: Plan, runner: TrialRunner) -> Plan:
        """The plan with what takes the memory, where the device can say: at the plan's size, else of one sample."""
        if plan.status is not PlanStatus.PLANNED or not isinstance(runner, Explainer):
            return plan
        with _device_errors():
            explanation = runner.explain(_explained_size(plan))
        return replace(plan, details={**plan.details, "explanation": explanation})

    def _explained_by_prediction(self, plan: Plan, predictor: Device | None) -> Plan:
        """A measured plan with the virtual GPU's explanation of the same size; without one where there is none."""
        if plan.status is not PlanStatus.PLANNED or predictor is None:
            return plan
        known = self.predicted_explanation
        if known is not None and known["batch_size"] == _explained_size(plan):
            return replace(plan, details={**plan.details, "explanation": known})
        try:
            with predictor.open(self.spec, self.variant) as runner:
                return self._explained(plan, runner)
        except (PlannerError, _Unanswered):
            return plan  # the answer itself was measured

    def _compare(self, runner: TrialRunner, result: SearchResult) -> None:
        """A prediction more costs milliseconds; on a real GPU the search's own trials must do."""
        size, largest = self.compare_at, result.max_batch_size or 0
        if self.is_measured or not size or size > largest or size in {trial.batch_size for trial in result.trials}:
            return
        high = result.first_oom_batch_size
        self._run(runner, Ask(batch_size=size, fresh=False, low=largest, high=high, remaining_trials=1))

    def _plan_one(self, runner: TrialRunner, batch_size: int, predictor: Device | None) -> Plan:
        ask = Ask(batch_size=batch_size, fresh=self.is_measured, low=0, high=None, remaining_trials=1)
        trial = self._run(runner, ask)
        if trial.outcome is Outcome.FAILED:
            trial = self._run(runner, ask)
        if trial.outcome is Outcome.FAILED:
            self._predicted(predictor)
            return self._failed(trial, ())
        return self._answer(trial, _notes_of([trial]), batch_size=batch_size, fits=trial.fits)

    def _run(self, runner: TrialRunner, ask: Ask) -> Trial:
        """One trial, run or read back; told to the listener, and stored before anything else can happen."""
        stored = self.read_back.pop(ask.batch_size, None)
        if stored is not None:
            self.num_read_back += 1
            self.trials.append(stored.trial)
            self.trial_ids.append(stored.id)
            self.listener(TrialFinished(variant=self.variant, trial=stored.trial))
            return stored.trial
        if self.should_stop():
            raise _Stopped
        self.listener(
            TrialStarted(
                variant=self.variant, batch_size=ask.batch_size, low=ask.low, high=ask.high,
                remaining_trials=ask.remaining_trials, fresh=ask.fresh,
            )
        )  # fmt: skip
        with _device_errors():
            trial = runner.run(ask.batch_size, fresh=ask.fresh)
        self.trials.append(trial)
        if self.store is not None:
            self.trial_ids.append(
                self.store.add_trial(
                    self.spec, self.variant, self.environment, self.device.capacity_bytes, trial, self.worker
                )
            )
        self.listener(TrialFinished(variant=self.variant, trial=trial))
        return trial

    def _is_certified(self, result: SearchResult) -> bool:
        return result.certified and all(trial.source is Source.MEASURED for trial in result.trials)

    def _base(self) -> Plan:
        return Plan(
            spec_hash=self.spec.hash,
            spec_name=self.spec.name,
            model=self.spec.model.name,
            variant=self.variant,
            environment=self.environment,
            capacity_bytes=self.device.capacity_bytes,
            source=self.environment.source,
            batch_size=self.batch_size,
            question=self.question,
            trials=tuple(self.trials),
            worker=self.worker,
            created_at=datetime.now(UTC),
        )

    def _answer(
        self,
        best: Trial | None,
        notes: Sequence[str],
        *,
        max_batch_size: int | None = None,
        first_oom_batch_size: int | None = None,
        certified: bool = False,
        batch_size: int | None = None,
        fits: bool | None = None,
    ) -> Plan:
        """The plan whose figures are those of ``best``; ``None`` when not even one sample fits."""
        return replace(
            self._base(),
            max_batch_size=max_batch_size,
            first_oom_batch_size=first_oom_batch_size,
            certified=certified,
            batch_size=batch_size,
            fits=fits,
            peaks=best.peaks if best else None,
            reserved_interval=best.reserved_interval if best else None,
            step_time_s=best.step_time_s if best else None,
            num_alloc_retries=best.num_alloc_retries if best else 0,
            notes=tuple(dict.fromkeys(notes)),
        )

    def _failed(self, failure: Trial, notes: Sequence[str]) -> Plan:
        words = f"batch size {failure.batch_size} failed twice: {failure.error or 'no reason was given'}"
        if self.predicted_failure:
            words = f"{words}; on the virtual GPU: {self.predicted_failure}"
        why = TrialFailed(words)
        return replace(self._base(), status=PlanStatus.FAILED, error=why.as_dict(), notes=tuple(notes))

    def _unanswered(self, error: PlannerError) -> Plan:
        # The only bad input that is one variant's own: this model or GPU cannot run it.
        status = PlanStatus.UNSUPPORTED if isinstance(error, InvalidSpec) else PlanStatus.FAILED
        return replace(self._base(), status=status, error=error.as_dict())


def _size_without_checkpointing(variant: Variant, plans: Sequence[Plan]) -> int | None:
    """The largest batch size of the same variant without checkpointing, where that is planned already."""
    plain = replace(variant, checkpointing=Checkpointing.NONE)
    return next((plan.max_batch_size for plan in plans if plan.variant == plain != variant), None)


def _bytes_per_sample(predicted: Plan | None) -> float | None:
    """By how much the prediction's allocated bytes grow with the batch size near its answer."""
    fits = sorted(
        (trial.batch_size, trial.peaks.allocated_bytes) for trial in (predicted.trials if predicted else ())
        if trial.fits and trial.peaks is not None
    )  # fmt: skip
    if not fits:
        return None
    top, most = fits[-1]
    below = [pair for pair in fits if 1.1 * pair[0] <= top]
    return (most - below[-1][1]) / (top - below[-1][0]) if below else None


def _suspects(predicted: Plan | None) -> tuple[int, ...]:
    """Sizes below the predicted answer that are predicted to run out of memory: worth a trial each."""
    if predicted is None or not predicted.max_batch_size:
        return ()
    below = [
        trial.batch_size for trial in predicted.trials if trial.batch_size < predicted.max_batch_size and not trial.fits
    ]
    return tuple(sorted(set(below)))[-_MOST_SUSPECTS:]


def _explained_size(plan: Plan) -> int:
    return plan.batch_size or plan.max_batch_size or 1


def _nobody(event: Progress) -> None:
    """The listener of a search that only says where another one begins."""


def _notes_of(trials: Sequence[Trial]) -> list[str]:
    """What the device said must be read beside the figures of these trials, each sentence once."""
    return list(dict.fromkeys(str(note) for trial in trials for note in trial.details.get("notes", ())))
