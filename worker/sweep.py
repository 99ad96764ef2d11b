"""A thread in every worker: say that this worker lives, take jobs from dead ones, and announce what waits.

Any number of workers may sweep at once: each of its writes names the state that it expects.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import structlog
from sqlalchemy import Select, select
from sqlalchemy.exc import DBAPIError

from core import jobs
from core.broker import TaskName
from core.db import db_now
from core.idempotency import forget_old
from core.models import File, Job, PairCheck, Worker
from worker.cleaning import forget_pair_checks, remove_expired, remove_strays
from worker.pipeline import Context
from worker.workspace import job_of

#: A workspace is not taken for a leftover before this age: its job may just be beginning.
LEFTOVER_SECONDS = 60.0

#: A worker that has not beaten so often in a row is waited for no longer by a job that is to be cancelled.
MISSED_BEATS = 3

#: How often old pair checks are looked for, and storage is compared with the database, which reads every key of both.
CLEANING_SECONDS = 600.0

log = structlog.get_logger(__name__)


class Sweeper:
    """Sweeps until stopped. `row` says what the database should know of this worker; `announce` is told of each task
    that something waits for."""

    def __init__(self, context: Context, row: Callable[[], Worker], announce: Callable[[TaskName], None]) -> None:
        self._context = context
        self._row = row
        self._announce = announce
        self._cleaning_due = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                self.sweep()
            except DBAPIError as error:
                log.warning("sweep_failed", error=type(error).__name__)
            except Exception:  # the next sweep must come, whatever this one met
                log.exception("sweep_crashed")
            if self._ended.wait(self._context.settings.sweep_seconds):
                return

    def sweep(self) -> None:
        settings = self._context.settings
        with self._context.database.writing() as session:
            session.merge(self._row()).beat_at = db_now()
            waiting = jobs.sweep(
                session,
                max_lost_workers=settings.max_lost_workers,
                stale_worker_seconds=10 * settings.lease_seconds,
                silent_lease_seconds=settings.lease_seconds - MISSED_BEATS * settings.beat_seconds,
            )
            forget_old(session)
            session.commit()
        for job_id in waiting.lost:
            log.warning("job_taken_back", job_id=job_id)
        for task in _due(waiting):
            self._announce(task)
        _remove_leftovers(self._context)
        remove_expired(self._context.database, self._context.storage)
        if time.monotonic() >= self._cleaning_due:
            forget_pair_checks(self._context.database)
            remove_strays(self._context.database, self._context.storage)
            self._cleaning_due = time.monotonic() + CLEANING_SECONDS


def _due(waiting: jobs.Waiting) -> Iterator[TaskName]:
    if waiting.jobs:
        yield "work"
    if waiting.admissions:
        yield "admit"
    if waiting.files:
        yield "check_file"
    if waiting.pair_checks:
        yield "check_pair"


def _remove_leftovers(context: Context) -> None:
    """Workspaces of jobs that ended elsewhere, and of checks whose worker died."""
    for folder in _old_folders(context.settings.work_dir):
        if not _is_needed(context, folder.name):
            shutil.rmtree(folder, ignore_errors=True)
            log.info("leftover_removed", folder=folder.name)


def _old_folders(work_dir: Path) -> Iterator[Path]:
    for folder in work_dir.iterdir() if work_dir.is_dir() else ():
        with suppress(FileNotFoundError):  # another sweep has just removed it, or an attempt has taken it over
            if time.time() - folder.stat().st_mtime > LEFTOVER_SECONDS:
                yield folder


def _is_needed(context: Context, name: str) -> bool:
    with context.database.reading() as session:
        return session.scalar(_need_of(name)) is not None


def _need_of(folder: str) -> Select[str]:
    """What has to be there still for a folder of this name to be needed."""
    if not folder.startswith("check-"):
        return select(Job.id).where(Job.id == job_of(folder), Job.status.not_in(jobs.TERMINAL))
    checked = folder.removeprefix("check-").rpartition("-")[0]
    if checked.startswith("ftjob-"):  # the pair of a job that waits for its admission
        return select(Job.id).where(Job.id == checked, Job.status == "validating_files")
    if checked.startswith("pchk_"):
        return select(PairCheck.id).where(PairCheck.id == checked, PairCheck.status == "running")
    return select(File.id).where(File.id == checked, File.status == "uploaded")
