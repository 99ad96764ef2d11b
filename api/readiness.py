"""What requests need and what jobs need besides, looked at in the same second for everybody who asks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import false, func, select, update
from sqlalchemy.exc import SQLAlchemyError

from core.broker import takes_messages
from core.config import MEBIBYTE, Settings
from core.db import Database, db_now
from core.models import Worker
from core.schema import current, newest

#: With less than this left, nothing can be taken in any more.
MIN_FREE_BYTES = 256 * MEBIBYTE
MIN_FREE_FILES = 1000
#: Everybody who asks within this time gets the same answer.
FRESH_SECONDS = 1.0
#: What has not answered for so long does not answer. Shorter than a container's health check waits.
PATIENCE_SECONDS = 2.0

_NO_WORKERS = {"jobs": 0, "light": 0}
_NO_DATABASE = {"database": "does not answer", "schema": "unknown", "workers": _NO_WORKERS}
_NO_DISK = {"disk": "does not answer"}
_NO_BROKER = {"broker": "does not answer: what waits starts at the next sweep"}

log = structlog.get_logger(__name__)


class Look:
    """One look, taken by a thread of its own for everybody who asks: one that hangs holds nobody for long."""

    def __init__(self, look: Callable[[], dict[str, Any]], silent: dict[str, Any]) -> None:
        self._look = look
        self._silent = silent
        self._thread = ThreadPoolExecutor(1, "readiness")
        self._lock = threading.Lock()
        self._taken: Future[dict[str, Any]] | None = None
        self._began = 0.0

    def begin(self) -> Future[dict[str, Any]]:
        """Look anew, unless somebody is looking or has just looked."""
        with self._lock:
            if self._taken is None or (self._taken.done() and time.monotonic() - self._began >= FRESH_SECONDS):
                self._began, self._taken = time.monotonic(), self._thread.submit(self._look)
            return self._taken

    def seen(self) -> dict[str, Any]:
        taken = self.begin()
        wait([taken], timeout=max(0.0, self._began + PATIENCE_SECONDS - time.monotonic()))
        return taken.result() if taken.done() else self._silent


class Readiness:
    """Looks at what requests need (database, schema, disk) and at what jobs need besides (broker, workers)."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._needed = Look(self._look_at_database, _NO_DATABASE), Look(self._look_at_disk, _NO_DISK)
        self._broker = Look(self._look_at_broker, _NO_BROKER)

    def answer(self) -> dict[str, Any]:
        for look in (*self._needed, self._broker):
            look.begin()
        database, disk = (look.seen() for look in self._needed)
        checks = {**database, **disk}
        workers = checks.pop("workers")
        broker = self._broker.seen()["broker"]
        if any(check != "ok" for check in checks.values()):
            status = "unavailable"
        else:
            status = "ok" if broker == "ok" and all(workers.values()) else "degraded"
        return {"status": status, **checks, "broker": broker, "workers": workers}

    def _look_at_database(self) -> dict[str, Any]:
        try:
            found = current(self._database)
            if found != self._newest:
                return {
                    "database": "ok",
                    "schema": f"is {found}; this version needs {self._newest}",
                    "workers": _NO_WORKERS,
                }
            workers = self._count_workers()
        except SQLAlchemyError as error:
            log.warning("database_away", error=type(error).__name__)
            return _NO_DATABASE
        return {"database": self._try_to_write(), "schema": "ok", "workers": {**_NO_WORKERS, **workers}}

    def _count_workers(self) -> dict[str, int]:
        """Those that live and take work, by queue."""
        alive = Worker.beat_at > db_now(-self._settings.lease_seconds)
        counted = select(Worker.queue, func.count()).where(alive, Worker.draining.is_(False)).group_by(Worker.queue)
        with self._database.reading() as session:
            return dict(session.execute(counted).all())

    def _try_to_write(self) -> str:
        """A replica, or a file whose writer is frozen, answers and takes nothing."""
        try:
            with self._database.writing() as session:
                session.execute(update(Worker).where(false()).values(draining=False))
        except SQLAlchemyError as error:
            log.warning("database_takes_no_writes", error=type(error).__name__)
            return "takes no writes"
        return "ok"

    def _look_at_disk(self) -> dict[str, Any]:
        return {"disk": _room_in(self._settings.data_dir)}

    def _look_at_broker(self) -> dict[str, Any]:
        return {"broker": "ok"} if takes_messages(self._settings) else _NO_BROKER

    @cached_property
    def _newest(self) -> str:
        return newest()


def _room_in(folder: Path) -> str:
    if not os.access(folder, os.W_OK):
        return "cannot be written"
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < MIN_FREE_BYTES:
        return f"has {free // MEBIBYTE} MiB left; {MIN_FREE_BYTES // MEBIBYTE} are needed"
    # A file system without a fixed number of files counts none.
    if disk.f_files and disk.f_favail < MIN_FREE_FILES:
        return f"has room for {disk.f_favail} files; {MIN_FREE_FILES} are needed"
    return "ok"
