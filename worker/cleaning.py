"""What a sweep removes: what has expired, what a dead process left half written, what no row names, old pair checks."""

from __future__ import annotations

import structlog
from sqlalchemy import and_, not_, select

from core import files, jobs, pair_checks, uploads
from core.db import Database
from core.models import File, Job, ResumePoint, UploadPart
from core.storage import Storage
from worker import publish

#: Nobody has written to such an object for so long: its process is gone.
UNFINISHED_SECONDS = 3600.0

log = structlog.get_logger(__name__)


def remove_expired(database: Database, storage: Storage) -> None:
    """Files past their time that no live job reads, the parts of uploads whose hour is over, and what a training saved
    that nobody goes on from any more."""
    with database.writing() as session:
        keys = [*uploads.expire(session), *files.delete_expired(session), *jobs.drop_ended_points(session)]
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
    _remove_stray_points(database, storage)
    _remove_unpublished(database, storage)


def _remove_stray_points(database: Database, storage: Storage) -> None:
    """Resume points that nobody recorded. Of a running attempt they may be on their way in."""
    stored = {_point_of(key) for key in storage.keys("jobs", older_than_seconds=UNFINISHED_SECONDS)} - {None}
    with database.reading() as session:
        named = set(session.scalars(select(ResumePoint.prefix)))
        running = session.execute(select(Job.id, Job.attempt).where(Job.status == "running"))
        busy = tuple(f"jobs/{job_id}/resume/a{attempt}/" for job_id, attempt in running)
    for prefix in stored - named:
        if prefix is not None and not prefix.startswith(busy):
            storage.delete(prefix)
            log.info("stray_removed", key=prefix)


def _remove_unpublished(database: Database, storage: Storage) -> None:
    """What attempts had put aside for publishing that did not come to it, once their job has ended without a worker who
    would clear up. A late one that still writes there has lost its lease; the next round removes that as well."""
    stored = {"/".join(key.split("/")[:3]) for key in storage.keys("jobs", older_than_seconds=0)}
    for prefix in stored & _unpublished(database):
        storage.delete(prefix)
        log.info("unpublished_removed", key=prefix)


def _unpublished(database: Database) -> set[str]:
    """Of every job that has ended, where its attempts would have left what they did not publish."""
    at_once = and_(Job.status == "succeeded", Job.attempt == 1)
    ended = select(Job.id, Job.attempt, Job.status).where(Job.status.in_(jobs.TERMINAL), not_(at_once))
    with database.reading() as session:
        return {
            publish.prefix(jobs.Claim(job_id, attempt))
            for job_id, last, status in session.execute(ended)
            for attempt in range(1, last + 1)
            if (status, attempt) != ("succeeded", last)
        }


def _point_of(key: str) -> str | None:
    """`jobs/JOB/resume/ATTEMPT/STEP`, of a file in it."""
    parts = key.split("/")
    return "/".join(parts[:5]) if parts[2:3] == ["resume"] and len(parts) > 5 else None
