"""saved states of trainings, budgets of their own for stalls, disks and memory, and a team's limit of time

Revision: 0008_resume_points, after 0007_folded_pair_names
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from core.db import UtcDateTime

revision = "0008_resume_points"
down_revision = "0007_folded_pair_names"
branch_labels = None
depends_on = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column("team", sa.Column("max_job_seconds", sa.Integer(), nullable=True))
    for name in ("stall_count", "disk_waits", "oom_level"):
        op.add_column("job", sa.Column(name, sa.Integer(), server_default="0", nullable=False))
    op.add_column("job", sa.Column("run_seconds", sa.Double(), server_default="0", nullable=False))
    op.add_column("job", sa.Column("parent_id", sa.String(length=40), nullable=True))
    op.create_table(
        "resume_point",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("spec_sha256", sa.String(length=64), nullable=False),
        sa.Column("prefix", sa.String(length=256), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("manifest", JSON, nullable=False),
        sa.Column("status", sa.String(length=8), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.CheckConstraint("status IN ('ready', 'bad')", name=op.f("ck_resume_point_status")),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_resume_point_job_id_job"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_resume_point")),
    )
    op.create_index("ix_resume_point_job_id_step", "resume_point", ["job_id", "step"])
    op.create_index("ix_resume_point_prefix", "resume_point", ["prefix"])


def downgrade() -> None:
    op.drop_table("resume_point")
    for name in ("parent_id", "run_seconds", "oom_level", "disk_waits", "stall_count"):
        op.drop_column("job", name)
    op.drop_column("team", "max_job_seconds")
