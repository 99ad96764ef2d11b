"""Resume points between a training's workspace and storage, so that another machine can go on with the job.

    saved by the trainer (worker/steps/train_points.py) -> stored, file by file, hashes compared -> recorded, fenced
    -> read back -> older ones forgotten
    claimed again: the newest that fits the job -> every byte compared with its manifest -> linked into the workspace

What is not recorded does not exist: a sweep removes it. One that does not agree with its manifest is set aside, and the
one before it is taken.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import structlog
from sqlalchemy.exc import DBAPIError

from core import jobs
from core.db import Database
from core.errors import LeaseLost, ShadowError
from core.ids import new_id
from core.job_spec import JobSpec
from core.jobs import Claim, NewEvent
from core.models import ResumePoint
from core.storage import COPY_BYTES, Storage
from worker.lease import Cancelled, Lease
from worker.resume_manifest import MANIFEST_FILE, FileDigest, Manifest, PointRefused, read_manifest
from worker.workspace import Workspace

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Place:
    """Where the points of one attempt come from and go to."""

    claim: Claim
    workspace: Workspace
    database: Database
    storage: Storage
    lease: Lease

    def tell(self, message: str) -> None:
        with self.database.writing() as session:
            jobs.record(session, self.claim, progress=None, events=[NewEvent(message, level="warn")])
            session.commit()

    def set_aside(self, point: ResumePoint, why: PointRefused) -> None:
        log.error("resume_point_damaged", step=point.step, prefix=point.prefix, why=why.message)
        said = f"The state that was saved at step {point.step} is set aside: {why.message}"
        with self.database.writing() as session:
            jobs.set_point_aside(session, self.claim, point, said)
            session.commit()


def prefix(claim: Claim, step: int) -> str:
    return f"jobs/{claim.job_id}/resume/a{claim.attempt}/step-{step}"


# --- from storage into the workspace --------------------------------------------------------------------------------


def restore(place: Place, spec: JobSpec) -> int | None:
    """Put the newest point that verifies where the trainer looks for it; its step. None: the training begins."""
    place.workspace.resume_from.unlink(missing_ok=True)
    with place.database.reading() as session:
        ready = jobs.ready_points(session, place.claim.job_id)
    fitting = [point for point in ready if point.spec_sha256 == spec.training_sha256]
    for point in fitting:
        try:
            verify(place.storage.path(point.prefix), msgspec.convert(point.manifest, Manifest), place.lease.check)
        except PointRefused as error:
            place.set_aside(point, error)
            continue
        place.storage.fetch(point.prefix, place.workspace.resume_from)
        return point.step
    if ready:
        place.tell("No saved state can be gone on from; the training starts at its beginning")
    return None


def verify(folder: Path, manifest: Manifest, check: Callable[[], None]) -> None:
    """Compare every byte below `folder` with what the manifest says. Raises PointRefused."""
    try:
        if read_manifest(folder) != manifest:
            raise PointRefused(f"its {MANIFEST_FILE} is another")
        for name, listed in manifest.files.items():
            if _digest(folder / name, check) != listed:
                raise PointRefused(f"{name} is damaged")
    except OSError as error:
        raise PointRefused(f"it cannot be read ({error.strerror})") from error


def _digest(path: Path, check: Callable[[], None]) -> FileDigest:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(COPY_BYTES):
            digest.update(piece)
            check()
        return FileDigest(bytes=file.tell(), sha256=digest.hexdigest())


# --- from the workspace into storage --------------------------------------------------------------------------------


class PointKeeper:
    """Stores a running training's points in a thread of its own: the runner must go on feeding the child's deadline.

    Of points that come faster than they can be stored, the newest is. One that cannot be stored ends nothing: the
    training goes on, and the points that are recorded stay. Leaving waits for what was taken.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._taken: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="points", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._taken.put(None)
        self._thread.join()

    def take(self, step: int) -> None:
        """The trainer says that its point of this step stands whole."""
        self._taken.put(step)

    def _run(self) -> None:
        while (step := self._newest()) is not None:
            with suppress(LeaseLost, Cancelled):  # whoever waits for this finds out by himself
                self._keep(step)

    def _newest(self) -> int | None:
        """The newest step that was taken, waited for; None at the end, once nothing is left to store."""
        step = self._taken.get()
        while not self._taken.empty():
            later = self._taken.get()
            if later is None:  # come back for it
                self._taken.put(None)
                return step
            step = later
        return step

    def _keep(self, step: int) -> None:
        try:
            point = self._store(step)
        except LeaseLost:
            raise
        except (ShadowError, OSError, DBAPIError) as error:
            log.warning("resume_point_not_stored", step=step, error=str(error))
            why = error.message.rstrip(".") if isinstance(error, ShadowError) else type(error).__name__
            with suppress(DBAPIError):
                self._place.tell(f"The state of step {step} could not be stored: {why}")
            return
        self._forget_older(point)

    def _store(self, step: int) -> ResumePoint:
        place = self._place
        folder, below = place.workspace.resume_points / f"step-{step}", prefix(place.claim, step)
        try:
            point = store(folder, below, place.claim, place.storage, place.lease.check_held)
            with place.database.writing() as session:
                jobs.add_point(session, place.claim, point)
                session.commit()
        except BaseException:
            place.storage.delete(below)
            raise
        log.info("resume_point_stored", step=step, bytes=point.bytes)
        return point

    def _forget_older(self, point: ResumePoint) -> None:
        """Read the point back; only then may older ones go."""
        place = self._place
        try:
            manifest = msgspec.convert(point.manifest, Manifest)
            verify(place.storage.path(point.prefix), manifest, place.lease.check_held)
        except PointRefused as error:
            place.set_aside(point, error)
            return
        with place.database.writing() as session:
            gone = jobs.drop_old_points(session, place.claim)
            session.commit()
        for key in gone:
            place.storage.delete(key)


def store(folder: Path, below: str, claim: Claim, storage: Storage, check: Callable[[], None]) -> ResumePoint:
    """Copy a point into storage, its manifest last. The row of it, not added yet. Raises PointRefused where a file has
    other bytes than the trainer wrote."""
    manifest = read_manifest(folder)
    for name, listed in manifest.files.items():
        check()
        stored = storage.adopt(f"{below}/{name}", folder / name)
        if (stored.bytes, stored.sha256) != (listed.bytes, listed.sha256):
            raise PointRefused(f"{name} has other bytes than were written")
    storage.adopt(f"{below}/{MANIFEST_FILE}", folder / MANIFEST_FILE)
    return ResumePoint(
        id=new_id("rpt_"),
        job_id=claim.job_id,
        attempt=claim.attempt,
        step=manifest.step,
        spec_sha256=manifest.spec,
        prefix=below,
        bytes=manifest.total_bytes,
        manifest=msgspec.to_builtins(manifest),
    )
