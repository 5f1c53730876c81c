"""The tables. ``migrations/planner_migrations/versions`` builds them; a test compares the two on both databases.

Bytes and counts that can grow are 64-bit integers. Enumerations are stored as their contract names, so that a new name
needs no schema change. JSON holds only what no query looks into. ``docs/adr/0003-store.md`` says why each choice was
made.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
)  # fmt: skip
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column, relationship

REVISION: Final = "0003"
"""The migration that these models belong to (a test holds it to the newest one)."""

VERSION_TABLE: Final = "planner_alembic_version"
"""Not Alembic's default name: a PostgreSQL database may be shared with another application that uses Alembic."""

ID = String(26)
HASH = String(64)
NAME = String(32)
"""An enumeration's value or a catalogue name."""
JSON_DATA = JSON(none_as_null=True)


class UtcDateTime(TypeDecorator[datetime]):
    """Timezone-aware datetimes in and out, in UTC: SQLite keeps no time zone, PostgreSQL answers in the session's."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a stored datetime must be timezone-aware")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class SpecRow(Base):
    """What was trained, once for each different work (``Spec.work()``)."""

    __tablename__ = "specs"

    hash: Mapped[str] = mapped_column(HASH, primary_key=True)
    document: Mapped[dict[str, Any]] = mapped_column(JSON_DATA)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class EnvironmentRow(Base):
    """An ``Environment``, once for each different one; ``id`` is the SHA-256 of all its fields."""

    __tablename__ = "environments"

    id: Mapped[str] = mapped_column(HASH, primary_key=True)
    key: Mapped[str] = mapped_column(HASH)
    source: Mapped[str] = mapped_column(NAME)
    gpu: Mapped[str] = mapped_column(Text)
    gpu_name: Mapped[str | None] = mapped_column(Text)
    gpu_uuid: Mapped[str | None] = mapped_column(Text)
    total_bytes: Mapped[int] = mapped_column(BigInteger)
    driver_version: Mapped[str | None] = mapped_column(Text)
    cuda_version: Mapped[str | None] = mapped_column(Text)
    torch_version: Mapped[str] = mapped_column(Text)
    library_versions: Mapped[dict[str, str]] = mapped_column(JSON_DATA)
    allocator_conf: Mapped[str] = mapped_column(Text)
    code_hash: Mapped[str | None] = mapped_column(Text)
    planner_version: Mapped[str] = mapped_column(Text)
    python_version: Mapped[str] = mapped_column(Text)
    hostname: Mapped[str] = mapped_column(Text)


class Evidence:
    """The columns that trials and plans share.

    ``gpu`` and ``environment_key`` repeat the environment's, so that one index serves a look-up and a page of a GPU
    type.
    """

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    spec_hash: Mapped[str] = mapped_column(ForeignKey("specs.hash"))
    precision: Mapped[str] = mapped_column(NAME)
    checkpointing: Mapped[str] = mapped_column(NAME)
    compile: Mapped[str] = mapped_column(NAME)
    axes: Mapped[str] = mapped_column(Text, server_default="{}")
    """The variant's further axes as canonical JSON: those that differ from their default."""
    environment_id: Mapped[str] = mapped_column(ForeignKey("environments.id"))
    environment_key: Mapped[str] = mapped_column(HASH)
    gpu: Mapped[str] = mapped_column(Text)
    source: Mapped[str] = mapped_column(NAME)
    capacity_bytes: Mapped[int] = mapped_column(BigInteger)
    peak_allocated_bytes: Mapped[int | None] = mapped_column(BigInteger)
    peak_reserved_bytes: Mapped[int | None] = mapped_column(BigInteger)
    peak_device_bytes: Mapped[int | None] = mapped_column(BigInteger)
    reserved_low_bytes: Mapped[int | None] = mapped_column(BigInteger)
    reserved_high_bytes: Mapped[int | None] = mapped_column(BigInteger)
    interval_basis: Mapped[str | None] = mapped_column(Text)
    num_alloc_retries: Mapped[int] = mapped_column(BigInteger)
    worker: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)

    @declared_attr
    def environment(cls) -> Mapped[EnvironmentRow]:  # noqa: N805
        return relationship(lazy="joined", innerjoin=True)


class TrialRow(Evidence, Base):
    __tablename__ = "trials"
    __table_args__ = (Index(None, "spec_hash", "environment_key"), Index(None, "spec_hash", "gpu"))

    batch_size: Mapped[int] = mapped_column(BigInteger)
    outcome: Mapped[str] = mapped_column(NAME)
    step_times_s: Mapped[list[float]] = mapped_column(JSON_DATA)
    fresh_process: Mapped[bool] = mapped_column(Boolean)
    error: Mapped[str | None] = mapped_column(Text)
    details: Mapped[dict[str, Any]] = mapped_column(JSON_DATA)
    duration_s: Mapped[float] = mapped_column(Double)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class PlanRow(Evidence, Base):
    __tablename__ = "plans"
    __table_args__ = (
        Index(None, "spec_hash", "environment_key", "id"),
        Index(None, "gpu", "id"),
        Index(None, "model", "id"),
    )

    spec_name: Mapped[str | None] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(NAME)
    max_batch_size: Mapped[int | None] = mapped_column(BigInteger)
    first_oom_batch_size: Mapped[int | None] = mapped_column(BigInteger)
    predicted_max_batch_size: Mapped[int | None] = mapped_column(BigInteger)
    batch_size: Mapped[int | None] = mapped_column(BigInteger)
    fits: Mapped[bool | None] = mapped_column(Boolean)
    certified: Mapped[bool] = mapped_column(Boolean)
    step_time_s: Mapped[float | None] = mapped_column(Double)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON_DATA)
    notes: Mapped[list[str]] = mapped_column(JSON_DATA)
    question: Mapped[str] = mapped_column(Text, server_default="{}")
    """``Spec.question()`` as canonical JSON: what was asked beyond the largest batch size."""
    details: Mapped[dict[str, Any] | None] = mapped_column(JSON_DATA)

    trial_links: Mapped[list[PlanTrialRow]] = relationship(order_by="PlanTrialRow.position", lazy="selectin")


class PlanTrialRow(Base):
    """Which trials a plan rests on, in the order that they ran. A resumed search shares them with an earlier plan."""

    __tablename__ = "plan_trials"

    plan_id: Mapped[str] = mapped_column(ForeignKey("plans.id", ondelete="CASCADE"), primary_key=True)
    trial_id: Mapped[str] = mapped_column(ForeignKey("trials.id"), primary_key=True, index=True)
    position: Mapped[int] = mapped_column(Integer)

    trial: Mapped[TrialRow] = relationship(lazy="joined", innerjoin=True)


class JobRow(Base):
    __tablename__ = "jobs"
    __table_args__ = (Index(None, "state", "id"),)

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    kind: Mapped[str] = mapped_column(NAME)
    gpu: Mapped[str | None] = mapped_column(Text)
    request: Mapped[dict[str, Any]] = mapped_column(JSON_DATA)
    request_hash: Mapped[str] = mapped_column(HASH)
    idempotency_key: Mapped[str | None] = mapped_column(Text, unique=True)
    state: Mapped[str] = mapped_column(NAME)
    attempt: Mapped[int] = mapped_column(Integer)
    token: Mapped[int] = mapped_column(BigInteger)
    """Fencing token: every write of a worker names the one that it was given."""
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    worker: Mapped[str | None] = mapped_column(Text)
    cancel_requested: Mapped[bool] = mapped_column(Boolean)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON_DATA)
    plan_ids: Mapped[list[str]] = mapped_column(JSON_DATA)
    num_events: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class JobEventRow(Base):
    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(NAME)
    data: Mapped[dict[str, Any]] = mapped_column(JSON_DATA)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
