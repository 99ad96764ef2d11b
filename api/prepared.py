"""A select of one job that is asked thousands of times a second."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec
from sqlalchemy import JSON, Dialect, Engine, bindparam, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import TypeEngine

from core.models import Job

#: What PostgreSQL calls a double: a reader of numbers wants to know in which form they come, the others do not ask.
FLOAT8 = 701


def _reader(column_type: TypeEngine[Any], dialect: Dialect) -> Callable[[Any], Any] | None:
    """From the driver's value to ours; None where they are the same."""
    reader = column_type.dialect_impl(dialect).result_processor(dialect, FLOAT8)
    # Where SQLAlchemy parses JSON itself, it does so at five times the price.
    return _decoded if isinstance(column_type, JSON) and reader is not None else reader


def _decoded(text: str | None) -> Any:
    return None if text is None else msgspec.json.decode(text)


class PreparedJob:
    """Reads some columns of a job by its id, with SQLAlchemy's types but past its sessions, transactions and
    statement cache, which together take several times as long as the select itself."""

    def __init__(self, engine: Engine, names: Sequence[str]) -> None:
        columns = [getattr(Job, name) for name in names]
        compiled = select(*columns).where(Job.id == bindparam("id")).compile(dialect=engine.dialect)
        self._engine = engine
        self._statement = str(compiled)
        self._by_position = compiled.positional
        self._readers = [_reader(column.type, engine.dialect) for column in columns]
        self._row = namedtuple("JobRow", names)  # type: ignore[misc]  # its fields are this select's

    def get(self, job_id: str) -> Job | None:
        """A row that has the named columns of a job, and nothing else of it."""
        dialect = self._engine.dialect
        parameters = (job_id,) if self._by_position else {"id": job_id}
        try:
            row = self._fetch(parameters)
        except dialect.loaded_dbapi.Error as error:
            # As SQLAlchemy raises it, so that a database that is away is told of as everywhere.
            known = (error, dialect.loaded_dbapi.Error)
            raise DBAPIError.instance(self._statement, parameters, *known, dialect=dialect) from error
        if row is None:
            return None
        read = [value if reader is None else reader(value) for reader, value in zip(self._readers, row, strict=True)]
        return cast("Job", self._row(*read))

    def _fetch(self, parameters: Any) -> Sequence[Any] | None:
        connection = self._engine.raw_connection()
        try:
            cursor = connection.cursor()
            cursor.execute(self._statement, parameters)
            row: Sequence[Any] | None = cursor.fetchone()
            cursor.close()
        except BaseException:
            connection.invalidate()
            raise
        finally:
            connection.close()
        return row
