"""A select of one job that is asked thousands of times a second."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any, cast

from sqlalchemy import Engine, bindparam, select
from sqlalchemy.exc import DBAPIError

from core.models import Job

#: What PostgreSQL calls a double: a reader of numbers wants to know in which form they come, the others do not ask.
FLOAT8 = 701


class PreparedJob:
    """Reads some columns of a job by its id, with SQLAlchemy's types but past its sessions, transactions and
    statement cache, which together take several times as long as the select itself."""

    def __init__(self, engine: Engine, names: Sequence[str]) -> None:
        columns = [getattr(Job, name) for name in names]
        compiled = select(*columns).where(Job.id == bindparam("id")).compile(dialect=engine.dialect)
        self._engine = engine
        self._statement = str(compiled)
        self._by_position = compiled.positional
        types = [column.type.dialect_impl(engine.dialect) for column in columns]
        self._readers = [type_.result_processor(engine.dialect, FLOAT8) for type_ in types]
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
