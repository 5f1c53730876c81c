"""Further axes of a variant; what a plan was asked beyond the largest batch size, and what else it answers.

Revision: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("trials", "plans"):
        op.add_column(table, sa.Column("axes", sa.Text(), nullable=False, server_default="{}"))
    op.add_column("plans", sa.Column("question", sa.Text(), nullable=False, server_default="{}"))
    op.add_column("plans", sa.Column("details", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    for table, column in (("plans", "details"), ("plans", "question"), ("plans", "axes"), ("trials", "axes")):
        op.drop_column(table, column)
