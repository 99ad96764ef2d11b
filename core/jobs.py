"""A job's life: its states, its legal moves, and every verb that changes one.

    (new) -> validating_files -> queued -> running -> succeeded | failed
    running -> queued        lease lost, worker drained, or a fault that another try may not meet
    any live state -> paused -> where it came from; a running one first saves its training's state
    any live state -> cancelled

Whoever runs a job holds a `Claim`. Every write under it checks, in the same statement and by the database's clock,
that the attempt is still the newest and its lease still holds; where it does not, nothing changes and `LeaseLost` is
raised. No verb commits: the caller does, and only then nudges a worker.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Update, and_, case, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session, aliased

from core.db import db_now
from core.errors import Cause, Conflict, LeaseLost, clean
from core.ids import new_id
from core.job_spec import JobSpec
from core.keys import hold_team
from core.models import Artifact, Checkpoint, File, Job, JobEvent, Metric, PairCheck, ResumePoint, Worker

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Phase = Literal["preparing", "training", "grafting", "evaluating", "publishing", "cancelling"]
Wish = Literal["run", "pause", "cancel"]
Queue = Literal["jobs", "light"]
#: What a return to the queue is charged to; a drain and a pause cost nothing.
Budget = Literal["infra_retries", "stall_count", "disk_waits", "oom_level"]

TERMINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
#: States from which a cancel needs no worker's help.
CANCELLED_AT_ONCE: frozenset[str] = frozenset({"validating_files", "queued", "paused"})
#: States from which a pause needs none either.
PAUSED_AT_ONCE: frozenset[str] = frozenset({"validating_files", "queued"})
#: What can be run again as a new job.
RETRYABLE: frozenset[str] = frozenset({"failed", "cancelled"})

#: What events call a job, by its kind.
_NOUNS = {"fine_tune": "fine-tuning job", "graft": "graft job"}

#: The first wait before something that the infrastructure failed is tried again.
RETRY_SECONDS = 30.0

#: The first wait for room on a full disk, and the longest.
DISK_SECONDS = 60.0
MAX_DISK_SECONDS = 900.0

#: Saved states of a running job that are kept: the newest, and one more should that one turn out to be damaged.
KEPT_POINTS = 2
#: How long those of a failed job are kept, so that it can be run again from where it was.
FAILED_POINTS_SECONDS = 7 * 24 * 3600.0

#: Rows that one sweep handles of each kind; the next sweep takes the rest.
SWEEP_LIMIT = 100


@dataclass(frozen=True)
class Claim:
    """The right to work on a job until its lease ends."""

    job_id: str
    attempt: int


@dataclass(frozen=True)
class NewEvent:
    message: str
    level: Literal["info", "warn", "error"] = "info"
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class Outcome:
    """What a successful job leaves behind."""

    artifacts: Sequence[Artifact]
    result_files: Sequence[File]
    trained_tokens: int | None
    #: None where a graft's comparison was left out.
    evaluation: dict[str, Any] | None
    graft_result: dict[str, Any]
    #: In the order of their steps.
    checkpoints: Sequence[Checkpoint] = ()


@dataclass(frozen=True)
class LivingLane:
    """What a living worker runs jobs on."""

    device: str
    memory_bytes: int


@dataclass(frozen=True)
class Waiting:
    """What a sweep found that somebody should be nudged for."""

    jobs: bool = False
    admissions: bool = False
    files: bool = False
    pair_checks: bool = False
    lost: list[str] = field(default_factory=list)


# --- birth and admission --------------------------------------------------------------------------------------------


def create(session: Session, job: Job) -> Job:
    """Put a new job at the start of its life, with its first event."""
    hold_team(session, job.team_id)
    job.id = new_id("ftjob-")
    job.status = "validating_files"
    session.add(job)
    session.flush()
    add_events(session, job.id, [NewEvent(f"Created {_NOUNS[job.kind]}: {job.id}"), NewEvent(_validating(job))])
    return job


def _validating(job: Job) -> str:
    if job.kind == "graft":
        return f"Checking that what {job.request['delta']['job_id']} learned fits {job.model}"
    files = [job.training_file_id, *([job.validation_file_id] if job.validation_file_id else [])]
    return f"Validating training file: {' and validation file: '.join(files)}"


def admit(
    session: Session,
    job_id: str,
    spec: JobSpec,
    *,
    memory_bytes: int,
    gpu_memory_bytes: int | None = None,
    pair_check: dict[str, Any] | None = None,
    notes: Sequence[NewEvent] = (),
) -> bool:
    """validating_files -> queued. False where the job has left that state meanwhile."""
    changed = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status == "validating_files")
        .values(
            status="queued",
            spec=spec.model_dump(mode="json"),
            pair_check=pair_check,
            memory_bytes=memory_bytes,
            gpu_memory_bytes=gpu_memory_bytes,
            infra_retries=0,
            not_before=None,
        )
        .returning(Job.id)
    ).first()
    if changed is None:
        return False
    checked = "Files validated" if spec.kind == "fine_tune" else "The change fits"
    moved = NewEvent(f"{checked}, moving job to queued state")
    add_events(session, job_id, [*notes, moved])
    return True


def refuse(session: Session, job_id: str, cause: Cause, *, pair_check: dict[str, Any] | None = None) -> bool:
    """validating_files -> failed. False where the job has left that state meanwhile."""
    return _end(session, job_id, Job.status == "validating_files", "failed", cause, pair_check=pair_check)


def postpone(session: Session, job_id: str, cause: Cause, *, max_retries: int) -> None:
    """Look at a job in `validating_files` again later, or end it once its retries are spent."""
    waiting = and_(Job.id == job_id, Job.status == "validating_files")
    tried = session.execute(select(Job.infra_retries).where(waiting).with_for_update()).scalar()
    if tried is None:
        return
    if tried >= max_retries:
        refuse(session, job_id, cause)
        return
    delay = retry_delay_seconds(tried)
    session.execute(update(Job).where(waiting).values(infra_retries=tried + 1, not_before=db_now(delay)))
    add_events(session, job_id, [NewEvent(f"{cause.message} The job is tried again in about {delay:.0f} s", "warn")])


def retry_delay_seconds(tried: int) -> float:
    """Doubled at each try, and spread so that jobs which failed together do not come back together."""
    return RETRY_SECONDS * float(2**tried) * random.uniform(0.8, 1.2)  # noqa: S311 - guards nothing


# --- under a claim --------------------------------------------------------------------------------------------------


def claim_next(
    session: Session, *, worker_id: str, lane_memory_bytes: int, lease_seconds: float, on_gpu: bool = False
) -> Claim | None:
    """Take the next job that this lane can hold: the team with the fewest running jobs first, then the oldest job.

    One statement, with the first heartbeat inside it. On PostgreSQL rows that another worker is about to take are
    passed over; on SQLite the transaction holds the write lock from its start.
    """
    running = aliased(Job)
    # Counted once, and not anew for each job that waits.
    busy = (
        select(running.team_id, func.count().label("jobs"))
        .where(running.status == "running")
        .group_by(running.team_id)
        .subquery()
    )
    candidate = (
        select(Job.id)
        .outerjoin(busy, busy.c.team_id == Job.team_id)
        .where(Job.status == "queued", _due(), _need(on_gpu) <= lane_memory_bytes)
        .order_by(func.coalesce(busy.c.jobs, 0), Job.id)
        .limit(1)
        .with_for_update(skip_locked=True, of=Job)
        .scalar_subquery()
    )
    row = session.execute(
        update(Job)
        .where(Job.id == candidate, Job.status == "queued")
        .values(
            status="running",
            phase="preparing",
            phase_started_at=db_now(),
            started_at=func.coalesce(Job.started_at, db_now()),
            attempt=Job.attempt + 1,
            worker_id=worker_id,
            lease_until=db_now(lease_seconds),
            not_before=None,
            progress=None,
        )
        .returning(Job.id, Job.attempt, Job.kind)
        .execution_options(synchronize_session=False)
    ).first()
    if row is None:
        return None
    again = "" if row.attempt == 1 else f" again (attempt {row.attempt})"
    add_events(session, row.id, [NewEvent(f"{_NOUNS[row.kind].capitalize()} started{again}")])
    return Claim(job_id=row.id, attempt=row.attempt)


def beat(session: Session, claim: Claim, *, lease_seconds: float, ran_seconds: float = 0) -> Wish:
    """Move the lease, and count the time since the beat before; the answer says what the job's owner wants."""
    counted = Job.run_seconds + ran_seconds
    return _write_fenced(session, claim, lease_until=db_now(lease_seconds), run_seconds=counted)


def enter_phase(session: Session, claim: Claim, phase: Phase, message: str) -> Wish:
    """Name what the job does now, unless it is being cancelled."""
    return _write_fenced(
        session,
        claim,
        events=[NewEvent(message)],
        phase=case((Job.wish == "cancel", "cancelling"), else_=phase),
        phase_started_at=db_now(),
        progress=None,
    )


def record(
    session: Session,
    claim: Claim,
    *,
    progress: dict[str, Any] | None,
    metrics: Sequence[dict[str, Any]] = (),
    events: Sequence[NewEvent] = (),
) -> Wish:
    """Keep what a step said since the last write.

    In as many statements however much that is: the lease's beat waits for the job's row, which is held until the
    commit, and a slow database may take seconds for each.
    """
    changes: dict[str, Any] = {} if progress is None else {"progress": progress}
    wish = _write_fenced(session, claim, events=events, attempt=Job.attempt, **changes)
    if metrics:
        _keep_metrics(session, claim.job_id, metrics)
    return wish


def _keep_metrics(session: Session, job_id: str, metrics: Sequence[dict[str, Any]]) -> None:
    """Of one step the last one counts."""
    rows = {data["step"]: {"job_id": job_id, "step": data["step"], "data": data} for data in metrics}
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    new = dialect.insert(Metric).values(list(rows.values()))
    session.execute(new.on_conflict_do_update(index_elements=["job_id", "step"], set_={"data": new.excluded.data}))


def succeed(session: Session, claim: Claim, outcome: Outcome) -> bool:
    """running -> succeeded, with everything the job publishes, in the caller's one transaction.

    False where a cancel came first. Raises LeaseLost where the claim no longer holds.
    """
    spec = session.execute(select(Job.spec).where(Job.id == claim.job_id)).scalar_one()
    row = session.execute(
        _fenced(claim)
        .where(Job.wish != "cancel")
        .values(
            **_ended("succeeded"),
            fine_tuned_model=JobSpec.model_validate(spec).fine_tuned_model,
            trained_tokens=outcome.trained_tokens,
            evaluation=outcome.evaluation,
            graft_result=outcome.graft_result,
            result_file_ids=[file.id for file in outcome.result_files],
        )
        .returning(Job.fine_tuned_model)
    ).first()
    if row is None:
        _write_fenced(session, claim)  # raises where it was the lease
        return False
    session.add_all([*outcome.result_files, *outcome.artifacts, *outcome.checkpoints])
    passed = [NewEvent(f"Checkpoint created at step {checkpoint.step}") for checkpoint in outcome.checkpoints]
    created = NewEvent(f"New fine-tuned model created: {row.fine_tuned_model}")
    add_events(session, claim.job_id, [*passed, created, NewEvent("The job has successfully completed")])
    return True


def fail(session: Session, claim: Claim, cause: Cause) -> None:
    """running -> failed, or cancelled where its owner asked for that before."""
    if not _end(session, claim.job_id, and_(_holds(claim), Job.wish != "cancel"), "failed", cause):
        finish_cancelled(session, claim)


def finish_cancelled(session: Session, claim: Claim) -> None:
    """running -> cancelled, once the children are dead."""
    if not _end(session, claim.job_id, _holds(claim), "cancelled", None):
        raise LeaseLost(f"Job {claim.job_id} is no longer held by attempt {claim.attempt}.")


def put_back(
    session: Session, claim: Claim, reason: str | None, *, charge: Budget | None = None, delay_seconds: float = 0
) -> None:
    """running -> queued, or paused where its owner asked for that, or cancelled: the worker drains, or something failed
    that another try may not meet and whose budget is charged."""
    charged = {charge: getattr(Job, charge) + 1} if charge else {}
    row = session.execute(
        _fenced(claim)
        .where(Job.wish != "cancel")
        .values(**_released(_QUEUED_OR_PAUSED), **charged, not_before=db_now(delay_seconds))
        .returning(Job.status)
    ).first()
    if row is None:
        finish_cancelled(session, claim)
        return
    add_events(session, claim.job_id, _left(row.status, reason))


def _left(status: Status, reason: str | None) -> list[NewEvent]:
    """What is said of a job that left its worker without having ended."""
    said = [NewEvent(reason, level="warn")] if reason else []
    if status == "paused":
        return [*said, NewEvent("The job is paused")]
    return said or [NewEvent("The job is queued again")]


@dataclass(frozen=True)
class Budgets:
    """What of each is spent."""

    infra_retries: int
    stall_count: int
    disk_waits: int
    oom_level: int


def budgets(session: Session, job_id: str) -> Budgets:
    row = session.execute(
        select(Job.infra_retries, Job.stall_count, Job.disk_waits, Job.oom_level).where(Job.id == job_id)
    ).one()
    return Budgets(*row)


def disk_wait_seconds(waited: int) -> float:
    """Doubled at each wait for room on a disk, to a quarter of an hour."""
    return min(DISK_SECONDS * 2.0 ** min(waited, 10), MAX_DISK_SECONDS)


# --- saved states of a training -------------------------------------------------------------------------------------


def add_point(session: Session, claim: Claim, point: ResumePoint) -> Wish:
    """Record a state whose files are whole in storage; from here on the job may go on from it. Repeating it changes
    nothing: a commit may have succeeded of which only the answer was lost.

    A job that has come further than ever gets its budgets back: a week may hold more faults than an hour.
    """
    if session.get(ResumePoint, point.id) is not None:
        return _write_fenced(session, claim, attempt=Job.attempt)
    same = and_(ResumePoint.job_id == claim.job_id, ResumePoint.spec_sha256 == point.spec_sha256)
    furthest = session.scalar(select(func.max(ResumePoint.step)).where(same))
    given_back = dict.fromkeys(_GIVEN_BACK, 0) if furthest is None or point.step > furthest else {}
    said = NewEvent(f"Saved the training's state at step {point.step}")
    wish = _write_fenced(session, claim, events=[said], **given_back)
    session.add(point)
    return wish


#: The budgets that a training gets anew as it gets on. Its want of memory stays what it was found to be.
_GIVEN_BACK = ("lost_count", "infra_retries", "stall_count", "disk_waits")


def ready_points(session: Session, job_id: str) -> Sequence[ResumePoint]:
    """Those that the job may go on from, the newest first."""
    ready = and_(ResumePoint.job_id == job_id, ResumePoint.status == "ready")
    return session.scalars(select(ResumePoint).where(ready).order_by(*_NEWEST_FIRST)).all()


def set_point_aside(session: Session, claim: Claim, point: ResumePoint, why: str) -> Wish:
    """A point that nothing can go on from is not read again."""
    wish = _write_fenced(session, claim, events=[NewEvent(why, level="warn")], attempt=Job.attempt)
    session.execute(update(ResumePoint).where(ResumePoint.id == point.id).values(status="bad"))
    return wish


def drop_old_points(session: Session, claim: Claim, stored: ResumePoint) -> list[str]:
    """Forget what is older than the newest that are kept, and what fits another training than `stored` does. What it
    returns is to be deleted from storage once that is committed. To be called only after `stored` was read back from
    there."""
    _write_fenced(session, claim, attempt=Job.attempt)
    points = select(ResumePoint).where(ResumePoint.job_id == claim.job_id).order_by(*_NEWEST_FIRST)
    rows = session.scalars(points).all()
    fitting = [row.id for row in rows if row.status == "ready" and row.spec_sha256 == stored.spec_sha256]
    return _drop(session, [row for row in rows if row.id not in fitting[:KEPT_POINTS]])


def drop_ended_points(session: Session) -> list[str]:
    """For the sweep: forget those of jobs that need them no more. What it returns is as for `drop_old_points`.

    The jobs' rows stay locked until the commit: who runs one again comes before this or after.
    """
    long_failed = and_(Job.status == "failed", Job.finished_at <= db_now(-FAILED_POINTS_SECONDS))
    over = or_(Job.status.in_(("succeeded", "cancelled")), long_failed)
    found = select(ResumePoint).join(Job, ResumePoint.job_id == Job.id).where(over).limit(SWEEP_LIMIT)
    return _drop(session, session.scalars(found.with_for_update(skip_locked=True, of=Job)).all())


def _drop(session: Session, points: Sequence[ResumePoint]) -> list[str]:
    """The prefixes that no row names any more."""
    for point in points:
        session.delete(point)
    session.flush()
    prefixes = {point.prefix for point in points}
    named = session.scalars(select(ResumePoint.prefix).where(ResumePoint.prefix.in_(prefixes)))
    return sorted(prefixes - set(named))


_NEWEST_FIRST = (ResumePoint.step.desc(), ResumePoint.id.desc())


# --- by the job's owner ---------------------------------------------------------------------------------------------


def request_cancel(session: Session, job_id: str) -> None:
    """Cancel at once what no worker holds; ask the worker for the rest. Repeating it changes nothing.

    Raises Conflict where the job has already ended otherwise.
    """
    # Held from here on, so that the job cannot slip from one state to the next between two looks at it.
    status = session.execute(select(Job.status).where(Job.id == job_id).with_for_update()).scalar_one()
    if _end(session, job_id, Job.status.in_(CANCELLED_AT_ONCE), "cancelled", None):
        return
    asked = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status == "running", Job.wish != "cancel")
        .values(wish="cancel", phase="cancelling")
        .returning(Job.id)
    ).first()
    if asked is not None:
        add_events(session, job_id, [NewEvent("Cancelling: the worker ends what it runs")])
        return
    if status in {"succeeded", "failed"}:
        raise Conflict(
            f"Job {job_id} has already {status}; only a live job can be cancelled.", code="job_not_cancellable"
        )


def request_pause(session: Session, job_id: str) -> None:
    """Pause at once what no worker holds; ask the worker for the rest, which saves the training's state first.
    Repeating it changes nothing.

    Raises Conflict where the job has ended or is being cancelled.
    """
    job = _held(session, job_id)
    if job.status == "paused" or (job.status, job.wish) == ("running", "pause"):
        return
    if job.status in PAUSED_AT_ONCE:
        _change(session, job_id, NewEvent("The job is paused"), status="paused")
    elif (job.status, job.wish) == ("running", "run"):
        _change(session, job_id, NewEvent("Pausing: the worker saves what it has done"), wish="pause")
    else:
        raise _refused(job_id, job, "paused", "job_not_pausable")


def request_resume(session: Session, job_id: str) -> None:
    """paused -> queued, or validating_files where it was never admitted. A pause that the worker has not carried out
    is taken back. A job that goes on anyway is left alone, so that the request can be repeated.

    Raises Conflict where the job has ended or is being cancelled.
    """
    job = _held(session, job_id)
    if job.status == "paused":
        status = "queued" if job.admitted else "validating_files"
        _change(session, job_id, NewEvent("The job is resumed"), status=status, not_before=None)
    elif (job.status, job.wish) == ("running", "pause"):
        _change(session, job_id, NewEvent("The job is resumed before it was paused"), wish="run")
    elif job.status in TERMINAL or job.wish == "cancel":
        raise _refused(job_id, job, "resumed", "job_not_resumable")


def retry(session: Session, job_id: str) -> Job:
    """A new job with the request of one that failed or was cancelled; it goes on from what that one had saved.

    Raises Conflict where that one is in another state.
    """
    # Held from here on, so that its saved states are not forgotten meanwhile.
    old = session.scalars(select(Job).where(Job.id == job_id).with_for_update()).one()
    if old.status not in RETRYABLE:
        raise Conflict(
            f"Job {job_id} is '{old.status}'; only one that failed or was cancelled can be run again.",
            code="job_not_retryable",
        )
    job = create(session, Job(**{name: getattr(old, name) for name in _ASKED_FOR}, parent_id=old.id))
    points = ready_points(session, old.id)
    session.add_all(_handed_on(point, job.id) for point in points)
    start = f" from the state that it saved at step {points[0].step}" if points else ""
    add_events(session, job.id, [NewEvent(f"This job runs {old.id} again{start}")])
    return job


#: The columns that say what a job's owner asked for.
_ASKED_FOR = (
    "team_id",
    "kind",
    "model",
    "training_file_id",
    "validation_file_id",
    "suffix",
    "seed",
    "labels",
    "request",
)


def _handed_on(point: ResumePoint, job_id: str) -> ResumePoint:
    same = ("attempt", "step", "spec_sha256", "prefix", "bytes", "manifest", "status")
    return ResumePoint(id=new_id("rpt_"), job_id=job_id, **{name: getattr(point, name) for name in same})


def _held(session: Session, job_id: str) -> Any:
    """A job's state, which cannot change before the commit."""
    admitted = Job.spec.is_not(None).label("admitted")
    return session.execute(select(Job.status, Job.wish, admitted).where(Job.id == job_id).with_for_update()).one()


def _change(session: Session, job_id: str, said: NewEvent, **values: Any) -> None:
    session.execute(update(Job).where(Job.id == job_id).values(**values))
    add_events(session, job_id, [said])


def _refused(job_id: str, job: Any, act: str, code: str) -> Conflict:
    state = f"has already {job.status}" if job.status in ("succeeded", "failed") else "is being cancelled"
    state = "is 'cancelled'" if job.status == "cancelled" else state
    return Conflict(f"Job {job_id} {state} and cannot be {act}.", code=code)


# --- by the sweep ---------------------------------------------------------------------------------------------------


def sweep(
    session: Session, *, max_lost_workers: int, stale_worker_seconds: float, silent_lease_seconds: float
) -> Waiting:
    """Take jobs from dead workers, forget workers that are long gone, and say what waits for a nudge.

    `silent_lease_seconds` is what is left of a lease whose worker has said nothing for a while. It may still work, and
    nobody else may; but what is to be cancelled needs not wait, since a job that has ended takes no write.
    """
    silent = and_(Job.wish == "cancel", Job.lease_until <= db_now(silent_lease_seconds))
    over = and_(Job.status == "running", or_(silent, Job.lease_until <= db_now()))
    # Held from here on: what another sweep holds is its to take, and a cancel comes before this or after.
    found = select(Job.id, Job.attempt).where(over).limit(SWEEP_LIMIT).with_for_update(skip_locked=True)
    rows = session.execute(found).all()
    lost = [row.id for row in rows if _take_back(session, row.id, row.attempt, max_lost_workers)]
    gone = select(Worker).where(Worker.beat_at <= db_now(-stale_worker_seconds)).with_for_update(skip_locked=True)
    for worker in session.scalars(gone):
        session.delete(worker)
    return Waiting(
        jobs=_any(session, Job.id, and_(Job.status == "queued", _due())),
        admissions=_any(session, Job.id, admissible()),
        files=_any(session, File.id, file_waits()),
        pair_checks=_any(session, PairCheck.id, pair_check_waits()),
        lost=lost,
    )


def file_waits() -> ColumnElement[bool]:
    """Files that nobody has checked and nobody is checking."""
    free = or_(File.check_lease_until.is_(None), File.check_lease_until <= db_now())
    return and_(File.status == "uploaded", free)


def pair_check_waits() -> ColumnElement[bool]:
    """Checks of pairs that nobody has completed and nobody is at."""
    free = or_(PairCheck.check_lease_until.is_(None), PairCheck.check_lease_until <= db_now())
    return and_(PairCheck.status.in_(("queued", "running")), free)


def _take_back(session: Session, job_id: str, attempt: int, max_lost_workers: int) -> bool:
    """End the lease of a worker that stopped beating."""
    held = and_(Job.attempt == attempt, Job.status == "running")
    if _end(session, job_id, and_(held, Job.wish == "cancel"), "cancelled", None):
        return True
    stale = and_(held, Job.lease_until <= db_now())
    # One that was told to shut down, and was ended before it had given the job back, was lost through no job's fault.
    draining = select(Worker.id).where(Worker.id == Job.worker_id, Worker.draining).correlate(Job).exists()
    lost_count = Job.lost_count + case((draining, 0), else_=1)
    if _end(session, job_id, and_(stale, lost_count >= max_lost_workers), "failed", _poison(max_lost_workers)):
        return True
    changed = session.execute(
        update(Job)
        .where(Job.id == job_id, stale)
        .values(**_released(_QUEUED_OR_PAUSED), lost_count=lost_count)
        .returning(Job.status)
    ).first()
    if changed is None:
        return False
    again = "" if changed.status == "paused" else "; the job is queued again"
    add_events(session, job_id, _left(changed.status, f"The worker stopped answering{again}"))
    return True


def _poison(max_lost_workers: int) -> Cause:
    return Cause(
        code="worker_lost",
        message=f"The job's worker was lost {max_lost_workers} times.",
        hint="The job probably needs more memory than the worker has: use a smaller model, batch_size or max_length.",
        fault="infrastructure",
    )


# --- reading --------------------------------------------------------------------------------------------------------


def living_lanes(session: Session, queue: Queue, *, stale_worker_seconds: float) -> Sequence[LivingLane]:
    """What each worker that takes work from the queue just now can hold."""
    alive = and_(Worker.queue == queue, Worker.beat_at > db_now(-stale_worker_seconds), Worker.draining.is_(False))
    return [LivingLane(*row) for row in session.execute(select(Worker.device, Worker.lane_memory_bytes).where(alive))]


def waiting_for(job: Job, lanes_of: Callable[[Queue], Sequence[LivingLane]]) -> str | None:
    """Why a live job does not move, in a sentence; None while nothing is amiss. `lanes_of` a queue is asked only where
    the answer depends on it."""
    if job.status not in {"validating_files", "queued"}:
        return None
    queue: Queue = "light" if job.status == "validating_files" else "jobs"
    lanes = lanes_of(queue)
    if not lanes:
        return (
            f"No worker for the queue '{queue}' is running; the job waits. Start one: shadowft worker --queue {queue}"
        )
    if job.not_before is not None and job.not_before > datetime.now(UTC):
        return f"The job is tried again at {job.not_before:%H:%M:%S} UTC; its last event says why."
    if job.memory_bytes is None:
        return None
    needs = [_needed(job, lane.device) for lane in lanes]
    if all(need > lane.memory_bytes for need, lane in zip(needs, lanes, strict=True)):
        largest = max(lane.memory_bytes for lane in lanes)
        return (
            f"The job needs about {min(needs) / 2**30:.1f} GiB and the largest lane holds "
            f"{largest / 2**30:.1f} GiB; it waits for a larger worker."
        )
    return None


def _needed(job: Job, device: str) -> int:
    """Bytes that a lane on `device` must hold for an admitted job."""
    on_cpu = job.memory_bytes or 0
    return on_cpu if device == "cpu" else job.gpu_memory_bytes or on_cpu


# --- shared pieces --------------------------------------------------------------------------------------------------


def add_events(session: Session, job_id: str, events: Sequence[NewEvent]) -> None:
    """Append events; their numbers come from the job's row, which stays locked until the commit."""
    if not events:
        return
    count = session.execute(
        update(Job).where(Job.id == job_id).values(event_count=Job.event_count + len(events)).returning(Job.event_count)
    ).scalar_one()
    _insert_events(session, job_id, events, first=count - len(events) + 1)


def _insert_events(session: Session, job_id: str, events: Sequence[NewEvent], *, first: int) -> None:
    session.add_all(
        JobEvent(
            id=new_id("ftevent-"),
            job_id=job_id,
            seq=seq,
            level=event.level,
            type=event.type,
            message=clean(event.message)[:2048],
            data=event.data,
        )
        for seq, event in enumerate(events, start=first)
    )


def admissible() -> ColumnElement[bool]:
    """Jobs whose admission may be tried now."""
    return and_(Job.status == "validating_files", _due())


def _need(on_gpu: bool) -> ColumnElement[int | None]:
    return func.coalesce(Job.gpu_memory_bytes, Job.memory_bytes) if on_gpu else Job.memory_bytes.expression


def _due() -> ColumnElement[bool]:
    return or_(Job.not_before.is_(None), Job.not_before <= db_now())


def _holds(claim: Claim) -> ColumnElement[bool]:
    return and_(Job.attempt == claim.attempt, Job.status == "running", Job.lease_until > db_now())


def _fenced(claim: Claim) -> Update:
    statement = update(Job).where(Job.id == claim.job_id, _holds(claim))
    return statement.execution_options(synchronize_session=False)


def _write_fenced(session: Session, claim: Claim, *, events: Sequence[NewEvent] = (), **values: Any) -> Wish:
    counted = Job.event_count + len(events)
    row = session.execute(
        _fenced(claim).values(event_count=counted, **values).returning(Job.wish, Job.event_count)
    ).first()
    if row is None:
        raise LeaseLost(f"Job {claim.job_id} is no longer held by attempt {claim.attempt}.")
    _insert_events(session, claim.job_id, events, first=row.event_count - len(events) + 1)
    wish: Wish = row.wish
    return wish


#: Where a job goes that leaves its worker without having ended.
_QUEUED_OR_PAUSED: ColumnElement[str] = case((Job.wish == "pause", "paused"), else_="queued")


def _released(status: Status | ColumnElement[str]) -> dict[str, Any]:
    wish = case((Job.wish == "pause", "run"), else_=Job.wish)  # it is granted by now, or too late
    return {"status": status, "wish": wish, "phase": None, "lease_until": None, "worker_id": None, "progress": None}


def _ended(status: Status) -> dict[str, Any]:
    return {**_released(status), "finished_at": db_now()}


def _end(
    session: Session, job_id: str, guard: ColumnElement[bool], status: Status, cause: Cause | None, **also: Any
) -> bool:
    """Move a job to `failed` or `cancelled` if `guard` holds for it, with the event that says so."""
    values = {**_ended(status), "error": cause.as_dict() if cause else None, **also}
    changed = session.execute(update(Job).where(Job.id == job_id, guard).values(values).returning(Job.id)).first()
    if changed is None:
        return False
    message = f"The job failed: {cause.message}" if cause else "The job has been cancelled"
    add_events(session, job_id, [NewEvent(message, level="error" if cause else "info")])
    return True


def _any(session: Session, column: Any, where: ColumnElement[bool]) -> bool:
    return session.execute(select(column).where(where).limit(1)).first() is not None
