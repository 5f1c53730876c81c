"""The first schema: specs, environments, trials, plans, jobs and their events.

Revision: 0001
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ID, HASH, NAME = sa.String(26), sa.String(64), sa.String(32)
TIME = sa.DateTime(timezone=True)


def column(name: str, kind: Any, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=nullable)


def evidence(table: str) -> list[Any]:
    """What trials and plans share."""
    return [
        column("id", ID),
        column("spec_hash", HASH),
        column("precision", NAME),
        column("checkpointing", NAME),
        column("compile", NAME),
        column("environment_id", HASH),
        column("environment_key", HASH),
        column("gpu", sa.Text()),
        column("source", NAME),
        column("capacity_bytes", sa.BigInteger()),
        column("peak_allocated_bytes", sa.BigInteger(), nullable=True),
        column("peak_reserved_bytes", sa.BigInteger(), nullable=True),
        column("peak_device_bytes", sa.BigInteger(), nullable=True),
        column("reserved_low_bytes", sa.BigInteger(), nullable=True),
        column("reserved_high_bytes", sa.BigInteger(), nullable=True),
        column("interval_basis", sa.Text(), nullable=True),
        column("num_alloc_retries", sa.BigInteger()),
        column("worker", sa.Text(), nullable=True),
        column("created_at", TIME),
        sa.PrimaryKeyConstraint("id", name=f"pk_{table}"),
        sa.ForeignKeyConstraint(["spec_hash"], ["specs.hash"], name=f"fk_{table}_spec_hash_specs"),
        sa.ForeignKeyConstraint(
            ["environment_id"], ["environments.id"], name=f"fk_{table}_environment_id_environments"
        ),
    ]


def upgrade() -> None:
    op.create_table(
        "specs",
        column("hash", HASH),
        column("document", sa.JSON()),
        column("created_at", TIME),
        sa.PrimaryKeyConstraint("hash", name="pk_specs"),
    )
    op.create_table(
        "environments",
        column("id", HASH),
        column("key", HASH),
        column("source", NAME),
        column("gpu", sa.Text()),
        column("gpu_name", sa.Text(), nullable=True),
        column("gpu_uuid", sa.Text(), nullable=True),
        column("total_bytes", sa.BigInteger()),
        column("driver_version", sa.Text(), nullable=True),
        column("cuda_version", sa.Text(), nullable=True),
        column("torch_version", sa.Text()),
        column("library_versions", sa.JSON()),
        column("allocator_conf", sa.Text()),
        column("code_hash", sa.Text(), nullable=True),
        column("planner_version", sa.Text()),
        column("python_version", sa.Text()),
        column("hostname", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_environments"),
    )
    op.create_table(
        "trials",
        *evidence("trials"),
        column("batch_size", sa.BigInteger()),
        column("outcome", NAME),
        column("step_times_s", sa.JSON()),
        column("fresh_process", sa.Boolean()),
        column("error", sa.Text(), nullable=True),
        column("details", sa.JSON()),
        column("duration_s", sa.Double()),
        column("started_at", TIME, nullable=True),
    )
    op.create_index("ix_trials_spec_hash_environment_key", "trials", ["spec_hash", "environment_key"])
    op.create_index("ix_trials_spec_hash_gpu", "trials", ["spec_hash", "gpu"])
    op.create_table(
        "plans",
        *evidence("plans"),
        column("spec_name", sa.Text(), nullable=True),
        column("model", sa.Text()),
        column("status", NAME),
        column("max_batch_size", sa.BigInteger(), nullable=True),
        column("first_oom_batch_size", sa.BigInteger(), nullable=True),
        column("batch_size", sa.BigInteger(), nullable=True),
        column("fits", sa.Boolean(), nullable=True),
        column("certified", sa.Boolean()),
        column("step_time_s", sa.Double(), nullable=True),
        column("error", sa.JSON(), nullable=True),
        column("notes", sa.JSON()),
    )
    op.create_index("ix_plans_spec_hash_environment_key_id", "plans", ["spec_hash", "environment_key", "id"])
    op.create_index("ix_plans_gpu_id", "plans", ["gpu", "id"])
    op.create_index("ix_plans_model_id", "plans", ["model", "id"])
    op.create_table(
        "plan_trials",
        column("plan_id", ID),
        column("trial_id", ID),
        column("position", sa.Integer()),
        sa.PrimaryKeyConstraint("plan_id", "trial_id", name="pk_plan_trials"),
        sa.ForeignKeyConstraint(["plan_id"], ["plans.id"], name="fk_plan_trials_plan_id_plans", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["trial_id"], ["trials.id"], name="fk_plan_trials_trial_id_trials"),
    )
    op.create_index("ix_plan_trials_trial_id", "plan_trials", ["trial_id"])
    op.create_table(
        "jobs",
        column("id", ID),
        column("kind", NAME),
        column("gpu", sa.Text(), nullable=True),
        column("request", sa.JSON()),
        column("request_hash", HASH),
        column("idempotency_key", sa.Text(), nullable=True),
        column("state", NAME),
        column("attempt", sa.Integer()),
        column("token", sa.BigInteger()),
        column("lease_until", TIME, nullable=True),
        column("worker", sa.Text(), nullable=True),
        column("cancel_requested", sa.Boolean()),
        column("error", sa.JSON(), nullable=True),
        column("plan_ids", sa.JSON()),
        column("num_events", sa.Integer()),
        column("created_at", TIME),
        column("started_at", TIME, nullable=True),
        column("finished_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.UniqueConstraint("idempotency_key", name="uq_jobs_idempotency_key"),
    )
    op.create_index("ix_jobs_state_id", "jobs", ["state", "id"])
    op.create_table(
        "job_events",
        column("job_id", ID),
        column("sequence", sa.Integer()),
        column("kind", NAME),
        column("data", sa.JSON()),
        column("created_at", TIME),
        sa.PrimaryKeyConstraint("job_id", "sequence", name="pk_job_events"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_events_job_id_jobs", ondelete="CASCADE"),
    )


def downgrade() -> None:
    for table in ("job_events", "jobs", "plan_trials", "plans", "trials", "environments", "specs"):
        op.drop_table(table)
