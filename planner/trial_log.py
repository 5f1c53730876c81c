"""The trials of one variant as planning runs them: told to whoever watches, stored as each ends, and read back where an
earlier run had stored them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from planner.devices import TrialRunner
from planner.errors import DeviceError, InvalidInput, InvalidSpec, PlannerError
from planner.evidence import PlanStore, StoredTrial
from planner.progress import Listener, TrialFinished, TrialStarted
from planner.search import Ask
from planner.specs.model import Spec
from planner.specs.variants import Variant
from planner.trials import Environment, Outcome, Source, Trial


class Stopped(Exception):
    """``should_stop`` said so, between two trials or while a prediction was waited for."""


class Unanswered(Exception):
    """The device gave this variant up; errors of the store and of the listener are not the variant's."""

    def __init__(self, error: PlannerError) -> None:
        super().__init__(str(error))
        self.error = error


@contextlib.contextmanager
def device_errors() -> Iterator[None]:
    """What keeps one variant from running must not stop the others: told apart from what is wrong for all of them."""
    try:
        yield
    except DeviceError:
        raise
    except InvalidInput as error:
        if isinstance(error, InvalidSpec) and (error.field or "").startswith("variants."):
            raise Unanswered(error) from error
        raise
    except PlannerError as error:
        raise Unanswered(error) from error


@dataclass(slots=True)
class TrialLog:
    """What was run for one question, in order."""

    spec: Spec
    variant: Variant
    environment: Environment
    capacity_bytes: int
    """What the trials may reserve."""
    store: PlanStore | None
    listener: Listener
    should_stop: Callable[[], bool]
    worker: str | None
    trials: list[Trial] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    """Of the stored trials, in the same order."""
    num_read_back: int = 0
    _stored: dict[int, StoredTrial] = field(default_factory=dict)
    """Stored trials that can stand in for running them again, by batch size."""

    def read_back(self) -> None:
        """Let stored trials of an unfinished search stand in for running them again."""
        if self.store is None:
            return
        found = self.store.find_trials(
            self.spec.hash, self.variant, gpu=self.environment.gpu, environment_key=self.environment.key()
        )
        for stored in reversed(found):  # newest first: the newest stays
            usable = stored.trial.outcome is not Outcome.FAILED and (
                stored.trial.fresh_process or self.environment.source is not Source.MEASURED
            )
            if usable and stored.capacity_bytes == self.capacity_bytes:
                self._stored[stored.trial.batch_size] = stored

    def run(self, runner: TrialRunner, ask: Ask, spec: Spec | None = None) -> Trial:
        """One trial, run or read back; told to the listener, and stored before anything else can happen.

        ``spec`` is that of the runner where it is not the plan's own.
        """
        stored = self._stored.get(ask.batch_size) if spec in (None, self.spec) else None
        if stored is not None and _answers(stored.trial, ask):
            del self._stored[ask.batch_size]
            self.num_read_back += 1
            self.trials.append(stored.trial)
            self.ids.append(stored.id)
            self.listener(TrialFinished(variant=self.variant, trial=stored.trial))
            return stored.trial
        if self.should_stop():
            raise Stopped
        self.listener(
            TrialStarted(
                variant=self.variant, batch_size=ask.batch_size, low=ask.low, high=ask.high,
                remaining_trials=ask.remaining_trials, fresh=ask.fresh,
            )
        )  # fmt: skip
        with device_errors():
            trial = runner.run(ask.batch_size, fresh=ask.fresh)
        self.trials.append(trial)
        if self.store is not None:
            self.ids.append(
                self.store.add_trial(
                    spec or self.spec, self.variant, self.environment, self.capacity_bytes, trial, self.worker
                )
            )
        self.listener(TrialFinished(variant=self.variant, trial=trial))
        return trial


def _answers(trial: Trial, ask: Ask) -> bool:
    """Whether a stored trial says as much as is asked: a prediction to rely on has an interval."""
    return trial.source is Source.MEASURED or not ask.fresh or trial.reserved_interval is not None
