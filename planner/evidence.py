"""What planning and the gate ask of whatever keeps their evidence; ``planner.store.Store`` answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from planner.specs.model import Spec
from planner.specs.variants import Variant
from planner.trials import Environment, Plan, Source, Trial


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
