"""How Alembic reaches the database: the one that the settings name, or the connection that the caller lends."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from core.config import get_settings
from core.db import Base, open_database
from core.models import Job


def migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def migrate_own_database() -> None:
    with open_database(get_settings()).engine.begin() as connection:
        migrate(connection)


assert Job.metadata is Base.metadata  # noqa: S101 - the tables are known once their module is imported

lent: Connection | None = context.config.attributes.get("connection")
if lent is None:
    migrate_own_database()
else:
    migrate(lent)
