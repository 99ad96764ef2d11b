"""Bring the database to the schema of this code, and say where it stands."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from core.config import Settings
from core.db import Database, lock_for_setup, open_database, take_your_time
from core.errors import Unavailable
from core.keys import ensure_admin_key


def migrate(database: Database, revision: str = "head") -> None:
    """Apply what is missing; nothing when nothing is."""
    with database.engine.execution_options(shadowft_writing=True).begin() as connection:
        take_your_time(connection)
        lock_for_setup(connection)
        command.upgrade(_config(connection), revision)


def downgrade(database: Database, revision: str) -> None:
    with database.engine.execution_options(shadowft_writing=True).begin() as connection:
        take_your_time(connection)
        command.downgrade(_config(connection), revision)


def current(database: Database) -> str | None:
    """The revision that the database is at; None for an empty one."""
    with database.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def newest() -> str:
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None  # noqa: S101 - there is at least the first migration
    return revision


def prepare(settings: Settings) -> Path | None:
    """Make an empty database ready and write the first admin key; the key's file when it is new.

    Raises Unavailable for a database of an older schema: migrating data is its operator's decision.
    """
    database = open_database(settings)
    try:
        found = current(database)
        if found is None:
            migrate(database)
        elif found != newest():
            raise Unavailable(
                f"The database is at schema {found} and this version needs {newest()}. Back it up, then run: "
                "shadowft migrate",
                code="schema_mismatch",
            )
        return ensure_admin_key(database, settings)
    finally:
        database.close()


def _config(connection: object = None) -> Config:
    spec = find_spec("migrations")
    assert spec is not None  # noqa: S101 - it is installed with this package
    assert spec.origin is not None  # noqa: S101
    config = Config()
    config.set_main_option("script_location", str(Path(spec.origin).parent))
    config.attributes["connection"] = connection
    return config
