"""Engine, sessions, and the database's own clock.

Leases are compared by the database's clock alone, so that machines whose clocks differ agree on who holds a job.
SQLite gets the settings under which an acknowledged job survives a power cut; a writing transaction takes its lock at
BEGIN, because one that reads first and locks later fails at once under contention instead of waiting.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import DateTime, Engine, MetaData, create_engine, event, text
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from core.config import Settings
from core.errors import clean

#: Taken by whoever sets a database up: two processes that start at once must not both do it.
_SETUP_LOCK = 0x5AD0F7

#: A PostgreSQL that takes up no connection for so long, or acknowledges nothing for so long, is away.
CONNECT_SECONDS = 5
SILENCE_SECONDS = 15
#: A transaction that asks nothing for so long is ended, and with it go its locks: its process is frozen or gone, and
#: whoever waits for a row of it would wait as long.
IDLE_IN_TRANSACTION_SECONDS = 30
#: A statement that is not answered for so long is given up, and its connection with it: the server is frozen, or
#: something on the way swallows what it says, and no part of this service may wait for ever. Longer than a statement
#: waits for a row whose holder is frozen, and shorter than a lease, so that a beat is tried once more.
ANSWER_SECONDS = 40
#: How long a request waits for a connection while all are in use; then it is answered that the database is busy.
POOL_SECONDS = 5

#: In JSON as Python writes it: U+0000, or a surrogate, which may be half of a pair.
_PERHAPS_UNCLEAN = re.compile(r"\\u(0000|d[89a-f])")

#: How long a statement waits for SQLite's write lock.
SQLITE_BUSY_TIMEOUT_MS = 10_000

Answer = TypeVar("Answer")

NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC. SQLite stores no zone, so it is taken off on the way in and put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING_CONVENTION)


class db_now(FunctionElement[datetime]):  # noqa: N801 - reads as the SQL function that it is
    """The database's clock, `offset_seconds` from now."""

    type = UtcDateTime()
    inherit_cache = False

    def __init__(self, offset_seconds: float = 0) -> None:
        super().__init__()
        self.offset_seconds = float(offset_seconds)


@compiles(db_now, "sqlite")
def _sqlite_now(element: db_now, _compiler: SQLCompiler, **_: Any) -> str:
    # The text form in which SQLAlchemy stores a moment in SQLite, so that the two compare as text.
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', '{element.offset_seconds:+f} seconds')"


@compiles(db_now, "postgresql")
def _postgresql_now(element: db_now, _compiler: SQLCompiler, **_: Any) -> str:
    return f"(clock_timestamp() + make_interval(secs => {element.offset_seconds:f}))"


class Database:
    """One engine and the two ways to use it: reading, and writing."""

    def __init__(self, url: str) -> None:
        self.engine = _make_engine(url)
        writing_engine = self.engine.execution_options(shadowft_writing=True)
        self._reading = sessionmaker(self.engine, expire_on_commit=False)
        self._writing = sessionmaker(writing_engine, expire_on_commit=False)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        with self._reading() as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session whose transaction may write. Nothing is kept without an explicit commit."""
        with self._writing() as session:
            yield session

    def close(self) -> None:
        self.engine.dispose()


def lock_for_setup(connection: Connection) -> None:
    """Be alone until the transaction ends. On SQLite a writing transaction is that already."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _SETUP_LOCK})


def take_your_time(connection: Connection) -> None:
    """Wait for ever for what this connection is asked: a migration of many rows takes as long as it takes."""
    driver = connection.connection.driver_connection
    if isinstance(driver, PatientConnection):
        driver.answer_seconds = math.inf


def open_database(settings: Settings) -> Database:
    # For its owner alone: customers' rows lie below it.
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Database(settings.database)


def _make_engine(url: str) -> Engine:
    if not url.startswith("sqlite"):
        engine = create_engine(
            url, pool_pre_ping=True, pool_timeout=POOL_SECONDS, connect_args=_POSTGRESQL, json_serializer=_to_json
        )
        event.listen(
            engine, "do_connect", lambda _dialect, _record, args, options: PatientConnection.connect(*args, **options)
        )
        event.listen(engine, "connect", _prepare_postgresql)
        return engine
    engine = create_engine(url, pool_timeout=POOL_SECONDS, json_serializer=_to_json)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


_POSTGRESQL = {
    # A database made under a bare C locale would hand out bytes; text is UTF-8 here, whatever it says.
    "client_encoding": "utf8",
    "connect_timeout": CONNECT_SECONDS,
    # A peer whose machine is gone says nothing: without these a connection to it would hang for hours.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": SILENCE_SECONDS * 1000,
}


class PatientConnection(psycopg.Connection[Any]):
    """A connection that waits only so long for an answer, which neither libpq nor a silent line does by itself."""

    #: A migration may take longer.
    answer_seconds: float = ANSWER_SECONDS

    def wait(self, gen: PQGen[Answer], *args: Any, **kwargs: Any) -> Answer:
        return super().wait(self._for_so_long(gen), *args, **kwargs)

    def _for_so_long(self, gen: PQGen[Answer]) -> PQGen[Answer]:
        """The driver asks its generator anew each tenth of a second, also where nothing has come."""
        end = time.monotonic() + self.answer_seconds
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > end:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(f"the database has not answered for {self.answer_seconds:g} s")
                wanted = gen.send(ready)
        except StopIteration as ended:
            answer: Answer = ended.value
            return answer


def _prepare_postgresql(connection: Any, _record: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_IN_TRANSACTION_SECONDS}s'")
    connection.commit()


def _to_json(value: Any) -> str:
    """What a JSON column gets. Findings, events and figures hold names from strangers' files, and PostgreSQL refuses a
    row for one U+0000 or half a surrogate pair in them."""
    text = json.dumps(value)
    return json.dumps(_cleaned(value)) if _PERHAPS_UNCLEAN.search(text) else text


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(part) for key, part in value.items()}
    return [_cleaned(part) for part in value] if isinstance(value, list | tuple) else value


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions of its own
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {SQLITE_BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get("shadowft_writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
