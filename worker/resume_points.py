"""Resume points between a training's workspace and storage, so that another machine can go on with the job.

    saved by the trainer (worker/steps/train_points.py) -> stored, file by file, hashes compared -> recorded, fenced
    -> read back -> older ones forgotten
    claimed again: the newest that fits the job -> every byte compared with its manifest -> put where the trainer looks

What is not recorded does not exist for other machines: a sweep removes it from storage. One that does not agree with
its manifest is set aside, and the one before it is taken; one that cannot be read just now is left as it is.
"""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

import msgspec
import structlog
from sqlalchemy.orm import Session

from core import jobs
from core.db import Database
from core.errors import LeaseLost, ShadowError, Unavailable
from core.ids import new_id
from core.job_spec import JobSpec
from core.jobs import Claim, NewEvent
from core.models import ResumePoint
from core.storage import Storage
from worker.lease import Cancelled, Lease
from worker.left_files import open_left
from worker.resume_manifest import MANIFEST_FILE, Manifest, PointRefused, read_manifest, verify
from worker.workspace import Workspace

P = ParamSpec("P")
Answer = TypeVar("Answer")

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Place:
    """Where the points of one attempt come from and go to."""

    claim: Claim
    workspace: Workspace
    database: Database
    storage: Storage
    lease: Lease

    def write(
        self, verb: Callable[Concatenate[Session, Claim, P], Answer], *args: P.args, **kwargs: P.kwargs
    ) -> Answer:
        """Call a verb of `core.jobs` and commit, once the database takes it."""

        return self.lease.write(self.database, lambda session: verb(session, self.claim, *args, **kwargs))

    def read(self, question: Callable[[Session, str], Answer]) -> Answer:
        """What `core.jobs` knows of the job, once the database tells it."""

        def act() -> Answer:
            with self.database.reading() as session:
                return question(session, self.claim.job_id)

        return self.lease.outlast(act)

    def tell(self, message: str) -> None:
        self.write(jobs.record, progress=None, events=[NewEvent(message, level="warn")])

    def set_aside(self, row: ResumePoint, why: str) -> None:
        log.error("resume_point_set_aside", step=row.step, prefix=row.prefix, why=why)
        said = f"The state that was saved at step {row.step} is set aside: {why}"
        self.write(jobs.set_point_aside, row, said)


@dataclass(frozen=True)
class Point:
    """A state from which the training may go on."""

    step: int
    folder: Path
    #: None for one that an attempt before this one left in the workspace: it may never have been stored.
    row: ResumePoint | None

    def verify(self, spec: JobSpec, check: Callable[[], None]) -> None:
        """Raises PointRefused and OSError as `resume_manifest.verify` does."""
        manifest = verify(self.folder, spec=spec.training_sha256, check=check)
        if self.row is not None and manifest != msgspec.convert(self.row.manifest, Manifest):
            raise PointRefused(f"Its {MANIFEST_FILE} is another than the one that was recorded.")


def prefix(claim: Claim, step: int) -> str:
    return f"jobs/{claim.job_id}/resume/a{claim.attempt}/step-{step}"


# --- from storage into the workspace --------------------------------------------------------------------------------


def restore(place: Place, spec: JobSpec) -> Point | None:
    """Put the newest point that verifies where the trainer looks for it. None: the training begins.

    Raises Unavailable where none can be read just now: what it holds is worth the wait.
    """
    rows = place.read(jobs.ready_points)
    unread: OSError | None = None
    for point in _candidates(place, rows):
        try:
            point.verify(spec, place.lease.check)
        except PointRefused as error:
            if point.row is not None:
                place.set_aside(point.row, error.message)
        except OSError as error:
            log.warning("resume_point_unread", step=point.step, folder=str(point.folder), error=str(error))
            unread = error if point.row is not None else unread
        else:
            _put(point, place)
            return point
    if unread is not None:
        raise Unavailable(
            f"The training's saved states cannot be read just now ({unread.strerror}).",
            code="storage_unavailable",
            hint="The operator looks after the storage folder, or restores it from its backup.",
        )
    _clear(place.workspace.resume_from)
    if rows:
        place.tell("No saved state can be gone on from; the training starts at its beginning")
    return None


def discard(place: Place, point: Point, why: str) -> None:
    """The trainer refused the point: it is not to be tried again."""
    _clear(place.workspace.resume_from)
    if point.row is not None:
        place.set_aside(point.row, why)


def _candidates(place: Place, rows: Sequence[ResumePoint]) -> list[Point]:
    """The newest first, and of one step the stored one."""
    stored = [Point(row.step, place.storage.path(row.prefix), row) for row in rows]
    return sorted([*stored, *_left_here(place.workspace)], key=lambda point: -point.step)


def _left_here(workspace: Workspace) -> Iterator[Point]:
    """What an attempt before this one did not live to store, or went on from without having stored it."""
    for folder in (*workspace.resume_points.glob("step-*"), workspace.resume_from):
        if folder.resolve().is_relative_to(workspace.root.resolve()):  # and is no link into storage, nor a trainer's
            with suppress(PointRefused, OSError):
                yield Point(read_manifest(folder).step, folder, None)


def _put(point: Point, place: Place) -> None:
    target = place.workspace.resume_from
    if point.folder == target:
        return
    _clear(target)
    if point.row is None:
        point.folder.rename(target)  # what stays in the step's folder is wiped when the step begins
    else:
        place.storage.fetch(point.row.prefix, target)


def _clear(target: Path) -> None:
    if target.is_symlink():
        target.unlink()
    else:
        shutil.rmtree(target, ignore_errors=True)


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
            try:
                self._keep(step)
            except (LeaseLost, Cancelled):  # whoever waits for this finds out by himself
                log.info("resume_point_dropped", step=step)
            except Exception:  # the points that come later must be stored, whatever this one met
                log.exception("resume_point_crashed", step=step)

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
        place = self._place
        try:
            row = self._copy(step)
        except LeaseLost:
            raise
        except (ShadowError, OSError) as error:
            log.warning("resume_point_not_stored", step=step, error=str(error))
            why = error.message.rstrip(".") if isinstance(error, ShadowError) else type(error).__name__
            place.tell(f"The state of step {step} could not be stored: {why}")
            return
        # From here on its row may stand, also where this raises: if it does not, a sweep removes the files.
        place.write(jobs.add_point, row)
        log.info("resume_point_stored", step=step, bytes=row.bytes)
        self._forget_older(row)

    def _copy(self, step: int) -> ResumePoint:
        place = self._place
        try:
            return store(place.workspace, step, place.claim, place.storage, place.lease.check_held)
        except BaseException:
            place.storage.delete(prefix(place.claim, step))
            raise

    def _forget_older(self, row: ResumePoint) -> None:
        """Read the point back; only then may older ones go."""
        place = self._place
        try:
            verify(place.storage.path(row.prefix), spec=row.spec_sha256, check=place.lease.check_held)
        except PointRefused as error:
            place.set_aside(row, error.message)
            return
        for key in place.write(jobs.drop_old_points, row):
            place.storage.delete(key)


def store(workspace: Workspace, step: int, claim: Claim, storage: Storage, check: Callable[[], None]) -> ResumePoint:
    """Copy the point of a step into storage, its manifest last. The row of it, not added yet. Raises PointRefused where
    a file has other bytes than the trainer wrote."""
    folder, below = workspace.resume_points / f"step-{step}", prefix(claim, step)
    manifest = read_manifest(folder)
    for name, listed in [*manifest.files.items(), (MANIFEST_FILE, None)]:
        with open_left(folder / name, below=workspace.root) as file:
            stored = storage.adopt(f"{below}/{name}", file, check=check)
        if listed is not None and (stored.bytes, stored.sha256) != (listed.bytes, listed.sha256):
            raise PointRefused(f"{name} has other bytes than were written")
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
