"""The schema goes up and down on both databases, and is the one that the models say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from core.db import Base, open_database
from core.errors import Unavailable
from core.models import Job
from core.schema import current, downgrade, migrate, newest, prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture
def empty(fresh_settings, backend, tmp_path):
    """Settings of a database without a table."""
    with fresh_settings(backend, tmp_path / "data", migrated=False) as settings:
        yield settings


@pytest.fixture
def database(empty):
    opened = open_database(empty)
    yield opened
    opened.close()


def tables(database):
    return set(inspect(database.engine).get_table_names()) - {"alembic_version"}


def test_up_and_down_and_up_again(database):
    assert current(database) is None
    migrate(database)
    assert tables(database) == set(Base.metadata.tables)
    downgrade(database, "base")
    assert tables(database) == set()
    assert current(database) is None
    migrate(database)
    assert (tables(database), current(database)) == (set(Base.metadata.tables), newest())


def test_a_second_migration_changes_nothing(database):
    migrate(database)
    migrate(database)
    assert current(database) == newest()


def test_models_and_migrations_do_not_differ(database):
    migrate(database)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_pairs_whose_names_differed_in_capitals_alone_stay_apart(database):
    migrate(database, "0006_uploads")
    names = {"pair-01": "acme", "pair-0200000000": "Acme", "pair-03": "other", "pair-0400000001": "ACME"}
    now = "2026-01-01 00:00:00.000000"
    row = "INSERT INTO pair (id, name, base, instruct, created_at) VALUES (:id, :name, '{}', '{}', :now)"
    with database.engine.execution_options(shadowft_writing=True).begin() as connection:
        for pair_id, name in names.items():
            connection.execute(text(row), {"id": pair_id, "name": name, "now": now})
    migrate(database)
    with database.engine.connect() as connection:
        kept = connection.execute(text("SELECT name, folded_name FROM pair ORDER BY id")).all()
    assert kept == [
        ("acme", "acme"), ("Acme-00000000", "acme-00000000"), ("other", "other"), ("ACME-00000001", "acme-00000001"),
    ]  # fmt: skip


def test_constraints_are_named_alike_on_both_sides(database):
    """A later migration can only drop what it can name."""
    migrate(database)
    found = {check["name"] for check in inspect(database.engine).get_check_constraints("job")}
    assert found == {constraint.name for constraint in Job.__table__.constraints if "ck_" in str(constraint.name)}


def test_preparing_an_empty_database_migrates_it_and_makes_the_admin_key(empty, database):
    assert prepare(empty) == empty.admin_key_file
    assert current(database) == newest()
    assert prepare(empty) is None


def test_preparing_a_database_of_another_schema_is_refused_with_the_command_to_run(empty, database):
    migrate(database)
    with database.engine.execution_options(shadowft_writing=True).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    with pytest.raises(Unavailable, match="shadowft migrate") as caught:
        prepare(empty)
    assert caught.value.code == "schema_mismatch"
    assert not empty.admin_key_file.exists()


def command(settings, *arguments):
    return subprocess.Popen([sys.executable, "-m", "cli", *arguments], cwd=settings.data_dir, env=environment(settings))


def environment(settings):
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SHADOWFT_DATA_DIR": str(settings.data_dir),
        "SHADOWFT_DATABASE_URL": settings.database_url.get_secret_value(),
    }


@pytest.mark.slow
def test_the_command_run_twice_says_the_same_schema(empty):
    said = [
        subprocess.run(
            [sys.executable, "-m", "cli", "migrate"], cwd=empty.data_dir, env=environment(empty), capture_output=True,
            text=True, check=True,
        ).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert said[0] == f"The database is at schema {newest()}.\nThe admin key is in {empty.admin_key_file}.\n"
    assert said[1] == f"The database is at schema {newest()}.\n"


def test_processes_that_start_at_once_on_an_empty_database_all_succeed(empty, database):
    started = [command(empty, "keys", "list") for _ in range(4)]
    assert [process.wait(60) for process in started] == [0, 0, 0, 0]
    assert current(database) == newest()


@pytest.mark.slow
def test_alembic_by_hand_finds_the_same_database(empty, database):
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "-c", str(ROOT / "alembic.ini"), "upgrade", "head"],
        cwd=empty.data_dir, env=environment(empty), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert current(database) == newest()
