"""What requests need and what jobs need besides, looked at in the same second for everybody who asks."""

from __future__ import annotations

import os
import shutil
import threading
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from core.broker import is_reachable
from core.config import MEBIBYTE, Settings
from core.db import Database, db_now
from core.models import Worker
from core.schema import current, newest

#: With less than this left, nothing can be taken in any more.
MIN_FREE_BYTES = 256 * MEBIBYTE
#: Everybody who asks within this time gets the same answer: a broker that hangs must not hold a thread for each.
FRESH_SECONDS = 1.0

log = structlog.get_logger(__name__)


class Readiness:
    """Looks at what requests need (database, schema, disk) and at what jobs need besides (broker, workers)."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._lock = threading.Lock()
        self._answer: dict[str, Any] = {}
        self._looked = -FRESH_SECONDS

    def answer(self) -> dict[str, Any]:
        with self._lock:
            if time.monotonic() - self._looked >= FRESH_SECONDS:
                self._answer, self._looked = self._look(), time.monotonic()
            return self._answer

    def _look(self) -> dict[str, Any]:
        checks = {**self._ask_database(), "disk": _look_at_disk(self._settings.data_dir)}
        broker = "ok" if is_reachable(self._settings) else "does not answer: what waits starts at the next sweep"
        workers = checks.pop("workers")
        if any(check != "ok" for check in checks.values()):
            status = "unavailable"
        else:
            status = "ok" if broker == "ok" and all(workers.values()) else "degraded"
        return {"status": status, **checks, "broker": broker, "workers": workers}

    def _ask_database(self) -> dict[str, Any]:
        workers = {"jobs": 0, "light": 0}
        try:
            found = current(self._database)
            if found != self._newest:
                return {
                    "database": "ok",
                    "schema": f"is {found}; this version needs {self._newest}",
                    "workers": workers,
                }
            with self._database.reading() as session:
                alive = Worker.beat_at > db_now(-self._settings.lease_seconds)
                counts = session.execute(select(Worker.queue, func.count()).where(alive).group_by(Worker.queue)).all()
        except SQLAlchemyError as error:
            log.warning("database_away", error=type(error).__name__)
            return {"database": "does not answer", "schema": "unknown", "workers": workers}
        return {"database": "ok", "schema": "ok", "workers": {**workers, **dict(counts)}}

    @cached_property
    def _newest(self) -> str:
        return newest()


def _look_at_disk(folder: Path) -> str:
    if not os.access(folder, os.W_OK):
        return "cannot be written"
    free = shutil.disk_usage(folder).free
    return (
        "ok" if free >= MIN_FREE_BYTES else f"has {free // MEBIBYTE} MiB left; {MIN_FREE_BYTES // MEBIBYTE} are needed"
    )
