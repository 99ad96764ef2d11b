"""checks of pairs, and what a job's own check found

Revision: 0005_pair_checks, after 0004_checkpoints
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from core.db import UtcDateTime

revision = "0005_pair_checks"
down_revision = "0004_checkpoints"
branch_labels = None
depends_on = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "pair_check",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("team_id", sa.String(length=40), nullable=False),
        sa.Column("pair", sa.String(length=128), nullable=True),
        sa.Column("base", JSON, nullable=False),
        sa.Column("instruct", JSON, nullable=False),
        sa.Column("depth", sa.String(length=8), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("findings", JSON, nullable=False),
        sa.Column("similarity", JSON, nullable=True),
        sa.Column("fingerprint", sa.String(length=64), nullable=True),
        sa.Column("error", JSON, nullable=True),
        sa.Column("check_lease_until", UtcDateTime(), nullable=True),
        sa.Column("check_tries", sa.Integer(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("finished_at", UtcDateTime(), nullable=True),
        sa.CheckConstraint("depth IN ('headers', 'full')", name=op.f("ck_pair_check_depth")),
        sa.CheckConstraint("status IN ('queued', 'running', 'completed', 'failed')", name=op.f("ck_pair_check_status")),
        sa.ForeignKeyConstraint(["team_id"], ["team.id"], name=op.f("fk_pair_check_team_id_team")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pair_check")),
    )
    op.create_index("ix_pair_check_team_id", "pair_check", ["team_id"], unique=False)
    op.create_index("ix_pair_check_fingerprint_id", "pair_check", ["fingerprint", "id"], unique=False)
    op.create_index(
        "ix_pair_check_waiting",
        "pair_check",
        ["created_at"],
        unique=False,
        sqlite_where=sa.text("status IN ('queued', 'running')"),
        postgresql_where=sa.text("status IN ('queued', 'running')"),
    )
    op.add_column("job", sa.Column("pair_check", JSON, nullable=True))


def downgrade() -> None:
    op.drop_column("job", "pair_check")
    op.drop_table("pair_check")
