"""Bring the database to the schema of this code, and say where it stands."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, text

from core.config import Settings
from core.db import Database, lock_for_setup, open_database, take_your_time
from core.errors import Unavailable
from core.keys import ensure_admin_key

if TYPE_CHECKING:
    from alembic.config import Config

#: Of a migration: what it is called, and what it comes after.
_REVISIONS = (re.compile(r'^revision = "(.+)"$', re.MULTILINE), re.compile(r'^down_revision = "(.+)"$', re.MULTILINE))


def migrate(database: Database, revision: str = "head") -> None:
    """Apply what is missing; nothing when nothing is."""
    from alembic import command

    with database.engine.execution_options(shadowft_writing=True).begin() as connection:
        take_your_time(connection)
        lock_for_setup(connection)
        command.upgrade(_config(connection), revision)


def downgrade(database: Database, revision: str) -> None:
    from alembic import command

    with database.engine.execution_options(shadowft_writing=True).begin() as connection:
        take_your_time(connection)
        command.downgrade(_config(connection), revision)


def current(database: Database) -> str | None:
    """The revision that the database is at; None for an empty one."""
    with database.engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
        return revision


def newest() -> str:
    """The revision that no other one follows. Found by reading: most starts have nothing to migrate, and importing
    Alembic would be a fifth of their time."""
    scripts = [path.read_text() for path in (_folder() / "versions").glob("*.py")]
    names, followed = ({name for script in scripts for name in pattern.findall(script)} for pattern in _REVISIONS)
    revision: str = (names - followed).pop()
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


def _folder() -> Path:
    spec = find_spec("migrations")
    assert spec is not None  # noqa: S101 - it is installed with this package
    assert spec.origin is not None  # noqa: S101
    return Path(spec.origin).parent


def _config(connection: Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_folder()))
    config.attributes["connection"] = connection
    return config
