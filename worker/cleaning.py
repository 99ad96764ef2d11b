"""What a sweep removes: what has expired, what a dead process left half written, what no row names, old pair checks."""

from __future__ import annotations

import structlog
from sqlalchemy import select

from core import files, pair_checks, uploads
from core.db import Database
from core.models import File, UploadPart
from core.storage import Storage

#: Nobody has written to such an object for so long: its process is gone.
UNFINISHED_SECONDS = 3600.0

log = structlog.get_logger(__name__)


def remove_expired(database: Database, storage: Storage) -> None:
    """Files past their time that no live job reads, and the parts of uploads whose hour is over."""
    with database.writing() as session:
        keys = [*uploads.expire(session), *files.delete_expired(session)]
        session.commit()
    for key in keys:
        storage.delete(key)
    if keys:
        log.info("expired_removed", objects=len(keys))


def forget_pair_checks(database: Database) -> None:
    """Checks of pairs that are too old, or too many."""
    with database.writing() as session:
        forgotten = pair_checks.forget_old(session)
        session.commit()
    if forgotten:
        log.info("pair_checks_forgotten", rows=forgotten)


def remove_strays(database: Database, storage: Storage) -> None:
    """What a process stored and did not live to write into the database, or deleted there and not from storage.

    The objects are listed before the rows are read: a row that appears in between is seen.
    """
    storage.remove_unfinished(UNFINISHED_SECONDS)
    for folder, column in (("files", File.storage_key), ("uploads", UploadPart.storage_key)):
        stored = storage.keys(folder, older_than_seconds=UNFINISHED_SECONDS)
        with database.reading() as session:
            named = set(session.scalars(select(column)))
        for key in set(stored) - named:
            storage.delete(key)
            log.info("stray_removed", key=key)
