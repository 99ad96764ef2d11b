"""pair names that differ in capitals alone are one name

Revision: 0007_folded_pair_names, after 0006_uploads
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007_folded_pair_names"
down_revision = "0006_uploads"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("pair", sa.Column("folded_name", sa.String(length=128), nullable=True))
    # Of names that only a race let in, the first stays as it is; the others get the end of their id.
    op.execute(
        "UPDATE pair SET name = name || '-' || substr(id, length(id) - 7) WHERE EXISTS ("
        "SELECT 1 FROM pair AS older WHERE lower(older.name) = lower(pair.name) AND older.id < pair.id)"
    )
    op.execute("UPDATE pair SET folded_name = lower(name)")
    with op.batch_alter_table("pair") as pair:
        pair.alter_column("folded_name", existing_type=sa.String(length=128), nullable=False)
        pair.drop_constraint(op.f("uq_pair_name"), type_="unique")
        pair.create_unique_constraint(op.f("uq_pair_folded_name"), ["folded_name"])


def downgrade() -> None:
    with op.batch_alter_table("pair") as pair:
        pair.drop_constraint(op.f("uq_pair_folded_name"), type_="unique")
        pair.create_unique_constraint(op.f("uq_pair_name"), ["name"])
        pair.drop_column("folded_name")
