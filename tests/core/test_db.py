"""The two databases behave alike where the code relies on it: moments, the clock, who waits for whom."""

from __future__ import annotations

import re
import threading
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import DBAPIError, OperationalError

from core import db
from core.db import Database, PatientConnection, db_now, take_your_time
from core.models import Team


def add(database, name, **values):
    with database.writing() as session:
        session.add(Team(id=f"team-{name}", name=name, **values))
        session.commit()


def created(database, name):
    with database.reading() as session:
        return session.scalars(select(Team.created_at).where(Team.name == name)).one()


ZONES = [UTC, timezone(timedelta(hours=9)), timezone(-timedelta(hours=11, minutes=30))]


@pytest.mark.parametrize("zone", ZONES, ids=str)
def test_a_moment_comes_back_as_the_same_moment_in_utc(database, zone):
    moment = datetime(2026, 3, 1, 0, 30, 0, 123456, tzinfo=zone)
    add(database, "blue", created_at=moment)
    assert created(database, "blue") == moment
    assert created(database, "blue").tzinfo == UTC


def test_the_databases_clock_is_written_read_and_compared_alike(database):
    add(database, "now")
    add(database, "early", created_at=db_now(-0.5))
    add(database, "late", created_at=db_now(3600.25))
    late, now = created(database, "late"), created(database, "now")
    assert (late - now).total_seconds() == pytest.approx(3600.25, abs=5)
    with database.reading() as session:
        due = session.scalars(select(Team.name).where(Team.created_at <= db_now()).order_by(Team.created_at)).all()
    assert due == ["early", "now"]


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_sqlite_writes_its_clock_in_the_form_in_which_moments_are_stored(database):
    """Both are text there, and compared as text: to the last digit they must look alike."""
    add(database, "clock")
    add(database, "python", created_at=datetime.now(UTC))
    with database.reading() as session:
        stored = session.execute(text("SELECT created_at FROM team")).scalars().all()
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}", value) for value in stored)


def test_the_clock_runs_on_inside_a_transaction(database):
    """A claim that waited for a lock must not be born with an old lease."""
    with database.writing() as session:
        first = session.execute(select(db_now())).scalar_one()
        moments = [session.execute(select(db_now())).scalar_one() for _ in range(50)]
        assert moments == sorted(moments)
        assert wait_for_later(session, first)


def wait_for_later(session, first):
    return any(session.execute(select(db_now())).scalar_one() > first for _ in range(10_000))


def test_nothing_is_kept_without_a_commit(database):
    with database.writing() as session:
        session.add(Team(id="team-x", name="x"))
        session.flush()
    with database.reading() as session:
        assert session.scalars(select(Team)).all() == []


def test_writers_that_read_first_wait_for_each_other(database):
    """On SQLite a transaction that locks late fails at once; ours take the lock at BEGIN."""
    add(database, "0")

    def count_up(_):
        for _turn in range(20):
            with database.writing() as session:
                name = session.scalars(select(Team.name).with_for_update()).one()
                session.execute(update(Team).values(name=str(int(name) + 1)))
                session.commit()

    threads = [threading.Thread(target=count_up, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.reading() as session:
        assert session.scalars(select(Team.name)).one() == "120"


def test_a_reader_does_not_wait_for_a_writer(database):
    add(database, "before")
    with database.writing() as writing:
        writing.execute(update(Team).values(name="after"))
        with database.reading() as reading:
            assert reading.scalars(select(Team.name)).one() == "before"


def test_a_statement_that_is_not_answered_is_given_up_and_the_next_one_is_asked_anew(postgres, monkeypatch):
    """A server that is frozen, or a line that swallows everything: no error comes of itself."""
    monkeypatch.setattr(PatientConnection, "answer_seconds", 0.5)
    with postgres.database() as url:
        database = Database(url)
        with pytest.raises(OperationalError, match="has not answered"), database.reading() as session:
            session.execute(text("SELECT pg_sleep(20)"))
        with database.reading() as session:
            assert session.execute(text("SELECT 1")).scalar_one() == 1
        database.close()


def test_a_migration_may_take_longer(postgres, monkeypatch):
    monkeypatch.setattr(PatientConnection, "answer_seconds", 0.2)
    with postgres.database() as url:
        database = Database(url)
        with database.engine.connect() as connection:
            take_your_time(connection)
            connection.execute(text("SELECT pg_sleep(1)"))
        database.close()


def test_a_transaction_that_asks_nothing_is_ended_with_its_locks(postgres, monkeypatch):
    """Its process is frozen: whoever wants the row would wait until it wakes."""
    monkeypatch.setattr(db, "IDLE_IN_TRANSACTION_SECONDS", 1)
    with postgres.database() as url:
        database = Database(url)
        add(database, "blue")
        with database.writing() as frozen:
            frozen.execute(update(Team).values(name="red"))
            with database.writing() as other:
                other.execute(update(Team).values(name="green"))
                other.commit()
            with pytest.raises(DBAPIError):
                frozen.commit()
        with database.reading() as session:
            assert session.scalars(select(Team.name)).one() == "green"
        database.close()


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_sqlite_keeps_an_acknowledged_write_across_a_power_cut(database):
    """As far as settings say so: WAL, and a sync at each commit."""
    with database.engine.connect() as connection:
        pragmas = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")
        }
        assert pragmas == {"journal_mode": "wal", "synchronous": 2}
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1
