"""A measured plan keeps what had been predicted for it.

Revision: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("plans", sa.Column("predicted_max_batch_size", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("plans", "predicted_max_batch_size")
