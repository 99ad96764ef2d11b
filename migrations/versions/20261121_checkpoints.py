"""checkpoints, how long phases took, and jobs by the name of their model

Revision: 0004_checkpoints, after 0003_answers
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from core.db import UtcDateTime

revision = "0004_checkpoints"
down_revision = "0003_answers"
branch_labels = None
depends_on = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "checkpoint",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("metrics", JSON, nullable=False),
        sa.Column("folder", sa.String(length=64), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_checkpoint_job_id_job"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoint")),
        sa.UniqueConstraint("job_id", "step", name=op.f("uq_checkpoint_job_id_step")),
    )
    op.create_table(
        "phase_time",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("pair", sa.String(length=128), nullable=False),
        sa.Column("tuning", sa.String(length=8), nullable=False),
        sa.Column("phase", sa.String(length=20), nullable=False),
        sa.Column("device", sa.String(length=8), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("busy_seconds", sa.Double(), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("work", sa.BigInteger(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_phase_time_job_id_job"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_phase_time")),
    )
    op.create_index("ix_phase_time_job_id", "phase_time", ["job_id"])
    op.create_index("ix_phase_time_pair_id", "phase_time", ["pair", "id"])
    op.create_index("ix_job_team_id_fine_tuned_model", "job", ["team_id", "fine_tuned_model"])
    op.create_index("ix_job_kind_status", "job", ["kind", "status"])


def downgrade() -> None:
    op.drop_index("ix_job_kind_status", table_name="job")
    op.drop_index("ix_job_team_id_fine_tuned_model", table_name="job")
    op.drop_table("phase_time")
    op.drop_table("checkpoint")
