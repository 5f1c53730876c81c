"""Trials and plans in the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Insert, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from planner.errors import NotFound
from planner.specs.model import Spec
from planner.specs.variants import Variant
from planner.store import convert
from planner.store.engine import Database
from planner.store.ids import new_id
from planner.store.pages import GpuPlans, Page, PlanFilter, StoredTrial, check_page, check_text, make_page
from planner.store.schema import Base, EnvironmentRow, Evidence, PlanRow, PlanTrialRow, SpecRow, TrialRow
from planner.trials import Environment, Outcome, Plan, PlanStatus, Source, Trial


class EvidenceStore(Database):
    """What was run, and what was concluded from it."""

    def add_trial(
        self,
        spec: Spec,
        variant: Variant,
        environment: Environment,
        capacity_bytes: int,
        trial: Trial,
        worker: str | None = None,
    ) -> str:
        """Store one trial, for good, and answer its id. Call it as each trial ends: a killed run then loses nothing.

        Raises ``StoreError``.
        """
        now = datetime.now(UTC)
        row = TrialRow(
            id=new_id(now), capacity_bytes=capacity_bytes, created_at=now, worker=convert.storable(worker),
            **convert.variant_columns(variant), **convert.trial_columns(trial),
        )  # fmt: skip
        with self._writing() as session:
            self._refer(session, row, spec, environment)
            session.add(row)
            return row.id

    def add_plan(self, spec: Spec, plan: Plan, trial_ids: Sequence[str]) -> str:
        """Store a plan that rests on the stored trials ``trial_ids`` (in the order of ``plan.trials``) and answer its
        id.

        Its time is ``plan.created_at``, or now. Raises ``NotFound`` for a trial that the store does not hold,
        ``StoreError``.
        """
        created_at = plan.created_at or datetime.now(UTC)
        row = PlanRow(
            id=new_id(created_at), capacity_bytes=plan.capacity_bytes, created_at=created_at,
            **convert.variant_columns(plan.variant), **convert.plan_columns(plan),
        )  # fmt: skip
        with self._writing() as session:
            unknown = set(trial_ids) - set(session.scalars(select(TrialRow.id).where(TrialRow.id.in_(trial_ids))))
            if unknown:
                raise NotFound(f"there is no trial {min(unknown)!r}", field="trial_ids")
            self._refer(session, row, spec, plan.environment)
            session.add(row)
            session.flush()
            session.add_all(
                PlanTrialRow(plan_id=row.id, trial_id=trial_id, position=position)
                for position, trial_id in enumerate(trial_ids)
            )
            return row.id

    def _refer(self, session: Session, row: Evidence, spec: Spec, environment: Environment) -> None:
        """Store the spec and the environment unless they are there already, and make ``row`` refer to them."""
        columns = convert.environment_columns(environment)
        document = {"hash": spec.hash, "document": convert.json_data(spec.work()), "created_at": row.created_at}
        session.execute(self._insert_new(SpecRow).values(document))
        session.execute(self._insert_new(EnvironmentRow).values(columns))
        row.spec_hash, row.gpu = spec.hash, columns["gpu"]
        row.environment_id, row.environment_key = columns["id"], columns["key"]

    def _insert_new(self, model: type[Base]) -> Insert:
        if self._address.is_sqlite:
            return sqlite.insert(model).on_conflict_do_nothing()
        return postgresql.insert(model).on_conflict_do_nothing()

    def get_spec(self, spec_hash: str) -> dict[str, Any]:
        """The work of a stored spec as JSON data (``Spec.work()``). Raises ``NotFound``, ``StoreError``."""
        check_text(spec_hash, field="spec_hash")
        with self._reading() as session:
            row = session.get(SpecRow, spec_hash)
        if row is None:
            raise NotFound(f"there is no spec {spec_hash!r}", field="spec_hash")
        return row.document

    def find_trials(
        self,
        spec_hash: str,
        variant: Variant,
        gpu: str | None = None,
        environment_key: str | None = None,
        source: Source | None = None,
    ) -> list[StoredTrial]:
        """Every stored trial of this work, newest first, whatever its capacity. Raises ``StoreError``."""
        query = select(TrialRow).where(*_work(TrialRow, spec_hash, variant)).order_by(TrialRow.id.desc())
        if gpu is not None:
            query = query.where(TrialRow.gpu == gpu)
        if environment_key is not None:
            query = query.where(TrialRow.environment_key == environment_key)
        if source is not None:
            query = query.where(TrialRow.source == source)
        with self._reading() as session:
            return [convert.stored_trial_of(row) for row in session.scalars(query)]

    def find_plan(
        self,
        spec_hash: str,
        variant: Variant,
        environment_key: str,
        capacity_bytes: int,
        batch_size: int | None = None,
        question: Mapping[str, Any] | None = None,
    ) -> Plan | None:
        """The newest plan that answers exactly this question, or ``None``.

        ``batch_size=None`` asks for a search's plan, a number for a plan of that one size; ``question`` is
        ``Spec.question()``. A failed or unsupported plan is no answer. Raises ``StoreError``.
        """
        query = select(PlanRow).where(
            *_work(PlanRow, spec_hash, variant),
            PlanRow.environment_key == environment_key,
            PlanRow.capacity_bytes == capacity_bytes,
            PlanRow.batch_size.is_not_distinct_from(batch_size),
            PlanRow.question == convert.canonical(question or {}),
            PlanRow.status == PlanStatus.PLANNED,
        )
        with self._reading() as session:
            row = session.scalars(query.order_by(PlanRow.id.desc()).limit(1)).first()
            return convert.plan_of(row) if row else None

    def get_plan(self, plan_id: str) -> Plan:
        """Raises ``NotFound`` (field ``id``), ``StoreError``."""
        check_text(plan_id, field="id")
        with self._reading() as session:
            row = session.get(PlanRow, plan_id)
            if row is None:
                raise NotFound(f"there is no plan {plan_id!r}", field="id")
            return convert.plan_of(row)

    def list_plans(self, filter: PlanFilter | None = None, limit: int = 50, cursor: str | None = None) -> Page[Plan]:
        """A page of plans, newest first. Raises ``InvalidArgument`` (``limit``, ``cursor``), ``StoreError``."""
        check_page(limit, cursor)
        wanted = filter or PlanFilter()
        query = select(PlanRow).order_by(PlanRow.id.desc()).limit(limit + 1)
        for name in ("model", "gpu", "precision", "checkpointing", "compile", "source", "spec_hash"):
            if (value := getattr(wanted, name)) is not None:
                query = query.where(getattr(PlanRow, name) == value)
        if wanted.batch_size is not None:
            query = query.where(func.coalesce(PlanRow.batch_size, PlanRow.max_batch_size) == wanted.batch_size)
        if cursor is not None:
            query = query.where(PlanRow.id < cursor)
        with self._reading() as session:
            plans = [convert.plan_of(row) for row in session.scalars(query)]
        return make_page(plans, limit, lambda plan: plan.id)

    def count_plans(self) -> tuple[GpuPlans, ...]:
        """The GPU types that there are plans for, by name, with how many. Raises ``StoreError``."""
        measured = func.count().filter(PlanRow.source == Source.MEASURED)
        query = select(PlanRow.gpu, measured, func.count()).group_by(PlanRow.gpu).order_by(PlanRow.gpu)
        with self._reading() as session:
            rows = session.execute(query).all()
        return tuple(GpuPlans(gpu=gpu, num_measured=some, num_predicted=every - some) for gpu, some, every in rows)

    def count_trials(self) -> dict[tuple[Source, Outcome], int]:
        """How many trials ended how, by the kind of evidence. Raises ``StoreError``."""
        query = select(TrialRow.source, TrialRow.outcome, func.count()).group_by(TrialRow.source, TrialRow.outcome)
        with self._reading() as session:
            rows = session.execute(query).all()
        return {(Source(source), Outcome(outcome)): count for source, outcome, count in rows}


def _work(row: type[PlanRow | TrialRow], spec_hash: str, variant: Variant) -> list[ColumnElement[bool]]:
    """Conditions: exactly this work in exactly this variant."""
    columns = convert.variant_columns(variant)
    return [row.spec_hash == spec_hash, *(getattr(row, name) == value for name, value in columns.items())]
