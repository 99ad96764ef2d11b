"""A thread in every worker: say that this worker lives, take jobs from dead ones, and nudge when something waits.

Any number of workers may sweep at once: each of its writes names the state that it expects.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog
from sqlalchemy import Select, select
from sqlalchemy.exc import DBAPIError

from core import jobs
from core.broker import nudge
from core.db import db_now
from core.idempotency import forget_old
from core.models import File, Job, PairCheck, Worker
from worker.cleaning import forget_pair_checks, remove_expired, remove_strays
from worker.pipeline import Context

#: A workspace is not taken for a leftover before this age: its job may just be beginning.
LEFTOVER_SECONDS = 60.0

#: How often old pair checks are looked for, and storage is compared with the database, which reads every key of both.
CLEANING_SECONDS = 600.0

log = structlog.get_logger(__name__)


class Sweeper:
    """Sweeps until stopped. `row` says what the database should know of this worker."""

    def __init__(self, context: Context, row: Callable[[], Worker]) -> None:
        self._context = context
        self._row = row
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
            )
            forget_old(session)
            session.commit()
        for job_id in waiting.lost:
            log.warning("job_taken_back", job_id=job_id)
        _nudge(waiting)
        _remove_leftovers(self._context)
        remove_expired(self._context.database, self._context.storage)
        if time.monotonic() >= self._cleaning_due:
            forget_pair_checks(self._context.database)
            remove_strays(self._context.database, self._context.storage)
            self._cleaning_due = time.monotonic() + CLEANING_SECONDS


def _nudge(waiting: jobs.Waiting) -> None:
    if waiting.jobs:
        nudge("work")
    if waiting.admissions:
        nudge("admit")
    if waiting.files:
        nudge("check_file")
    if waiting.pair_checks:
        nudge("check_pair")


def _remove_leftovers(context: Context) -> None:
    """Workspaces of jobs that ended elsewhere, and of checks whose worker died."""
    for folder in _old_folders(context.settings.work_dir):
        if not _is_needed(context, folder.name):
            shutil.rmtree(folder, ignore_errors=True)
            log.info("leftover_removed", folder=folder.name)


def _old_folders(work_dir: Path) -> Iterator[Path]:
    if not work_dir.is_dir():
        return
    for folder in work_dir.iterdir():
        if time.time() - folder.stat().st_mtime > LEFTOVER_SECONDS:
            yield folder


def _is_needed(context: Context, name: str) -> bool:
    with context.database.reading() as session:
        return session.scalar(_need_of(name)) is not None


def _need_of(folder: str) -> Select[str]:
    """What has to be there still for a folder of this name to be needed."""
    if not folder.startswith("check-"):
        return select(Job.id).where(Job.id == folder, Job.status.not_in(jobs.TERMINAL))
    checked = folder.removeprefix("check-").rpartition("-")[0]
    if checked.startswith("ftjob-"):  # the pair of a job that waits for its admission
        return select(Job.id).where(Job.id == checked, Job.status == "validating_files")
    if checked.startswith("pchk_"):
        return select(PairCheck.id).where(PairCheck.id == checked, PairCheck.status == "running")
    return select(File.id).where(File.id == checked, File.status == "uploaded")
