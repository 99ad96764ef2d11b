"""A job, told in order; the only file that decides a job's fate."""

from __future__ import annotations

import errno
import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import structlog
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from core import jobs
from core.config import Settings
from core.db import Database
from core.errors import Cause, LeaseLost, ShadowError, StepFailed
from core.job_spec import JobSpec
from core.jobs import Claim, NewEvent, Phase, Wish
from core.models import Job, Team
from core.storage import Storage
from worker import inputs, publish
from worker.lease import AWAY, Cancelled, Draining, Lease, Pausing, TimeUp
from worker.phase_clock import PhaseClock
from worker.progress import Line, Metrics, Note, Saved, Step
from worker.resume_manifest import PointRefused
from worker.resume_points import Place, PointKeeper, discard, restore
from worker.step_runner import Patience, run_step
from worker.workspace import Workspace, open_workspace, remove_workspaces, write_durably

#: How often a training's micro-batch is halved, where it runs out of memory.
MAX_OOM_LEVEL = 3
#: How often a step that made no progress is begun again.
MAX_STALLS = 1
#: How often a step is tried again that was killed from outside and would not need less memory another time.
MAX_KILLS = 1
#: Times a training's patience that another step may say nothing: its steps are whole tensors, files and models.
QUIET_TIMES = 4
#: Lines of a step that are kept while the database is away; of more, the newest.
MAX_UNWRITTEN = 10_000

log = structlog.get_logger(__name__)


class OutOfMemory(StepFailed):
    """The training ran out of memory, and would need less with a smaller micro-batch."""


@dataclass(frozen=True)
class Context:
    """What a worker lends to each job that it runs."""

    settings: Settings
    database: Database
    storage: Storage
    device: str
    draining: threading.Event


@dataclass(frozen=True)
class Run:
    """One attempt at one job."""

    context: Context
    claim: Claim
    team_id: str
    spec: JobSpec
    workspace: Workspace
    lease: Lease
    clock: PhaseClock
    #: What a step said while the database was away.
    unwritten: list[Line] = field(default_factory=list)

    def enter(self, phase: Phase, message: str) -> None:
        ended = self.clock.turn_to(phase)

        def write(session: Session) -> Wish:
            session.add_all([ended] if ended else [])
            return jobs.enter_phase(session, self.claim, phase, message)

        self.lease.heard(self.lease.write(self.context.database, write))
        self.lease.check()

    def train(self) -> None:
        """Train, from the newest saved state on that the trainer takes."""
        place = Place(self.claim, self.workspace, self.context.database, self.context.storage, self.lease)
        while not self.workspace.done("train").exists():
            point = restore(place, self.workspace.spec())
            if point is not None:
                self.clock.stop()  # the part that is left would be taken for a quick training
            try:
                self._train_on(place)
            except StepFailed as error:
                if point is None or error.cause.code != PointRefused.default_code:
                    raise
                discard(place, point, error.cause.message)

    def _train_on(self, place: Place) -> None:
        """Train, and have the states stored that are saved meanwhile."""
        settings = self.context.settings
        oom_level = place.read(jobs.budgets).oom_level
        conditions = {"save_seconds": settings.save_seconds, "oom_level": oom_level}
        write_durably(self.workspace.conditions_file, json.dumps(conditions).encode())
        patience = Patience(save_grace_seconds=settings.save_grace_seconds, stall_seconds=settings.stall_seconds)
        micro_batch = 0  # until the training says it
        with PointKeeper(place) as keeper:

            def follow(lines: Sequence[Line]) -> None:
                nonlocal micro_batch
                for line in lines:
                    if isinstance(line, Saved):
                        keeper.take(line.step)
                    if isinstance(line, Note):
                        micro_batch = line.data.get("micro_batch_size", micro_batch)
                self.record(lines)

            try:
                self.step("train", on_lines=follow, patience=patience)
            except StepFailed as error:
                if _needs_less_at_once(error.cause, micro_batch):
                    raise OutOfMemory(error.cause) from error
                raise

    def step(
        self,
        name: str,
        *,
        on_lines: Callable[[Sequence[Line]], None] | None = None,
        patience: Patience | None = None,
    ) -> dict[str, Any]:
        settings = self.context.settings
        try:
            result = run_step(
                name,
                self.workspace,
                lease=self.lease,
                device=self.context.device,
                grace_seconds=settings.cancel_grace_seconds,
                on_lines=on_lines or self.record,
                patience=patience or Patience(stall_seconds=QUIET_TIMES * settings.stall_seconds),
            )
        finally:
            if self.unwritten:
                self.lease.outlast(self._write)
        self.clock.did_step(name, result)
        return result

    def record(self, lines: Sequence[Line]) -> None:
        """Keep what a step said. A database that is away is told next time: the step goes on while the lease holds."""
        self.unwritten.extend(lines)
        del self.unwritten[:-MAX_UNWRITTEN]
        try:
            self._write()
        except AWAY as error:
            log.warning("lines_kept", lines=len(self.unwritten), error=type(error).__name__)

    def _write(self) -> None:
        """Turn a step's lines into progress, metrics and events, in one write."""
        lines = self.unwritten
        metrics = [_filled(line) for line in lines if isinstance(line, Metrics)]
        events = [event for line in lines for event in _events(line)]
        with self.context.database.writing() as session:
            wish = jobs.record(session, self.claim, progress=_progress(lines), metrics=metrics, events=events)
            session.commit()
        self.unwritten.clear()
        self.lease.heard(wish)


def run(context: Context, claim: Claim) -> None:
    """Take a claimed job to where it can be taken."""
    structlog.contextvars.bind_contextvars(job_id=claim.job_id, attempt=claim.attempt)
    log.info("job_claimed")
    try:
        with _lease(context, claim) as lease:
            _see_through(context, claim, lease)
    except LeaseLost:
        log.warning("lease_lost")
    finally:
        with suppress(SQLAlchemyError):  # a sweep cleans up as well
            _clean_up(context, claim)
        structlog.contextvars.unbind_contextvars("job_id", "attempt")


def _see_through(context: Context, claim: Claim, lease: Lease) -> None:
    """Run the job, and settle how it ended while the lease still moves on."""
    attempt = Attempt(context, claim, lease)
    try:
        opened = lease.outlast(lambda: _open(context, claim, lease))
        with inputs.holding_models(opened.spec, context.settings):
            _tell(opened)
    except LeaseLost:
        raise
    except Cancelled:
        attempt.settle(jobs.finish_cancelled)
    except Draining:
        attempt.settle(jobs.put_back, "The worker is shutting down; the job is queued again")
    except Pausing:
        attempt.settle(jobs.put_back, None)
    except TimeUp:
        attempt.settle(jobs.fail, _time_up())
    except OutOfMemory as error:
        attempt.ease(error.cause)
    except ShadowError as error:
        attempt.judge(error.cause)
    except OSError as error:
        log.exception("job_crashed")
        attempt.judge(_disk_full() if error.errno in (errno.ENOSPC, errno.EDQUOT) else _our_fault())
    except Exception:  # the job must not stay running because of a fault of ours
        log.exception("job_crashed")
        attempt.judge(_our_fault())


def _tell(run: Run) -> None:
    """The job's story."""
    spec = run.spec
    inputs.fetch(spec, run.workspace, storage=run.context.storage, settings=run.context.settings, check=run.lease.check)
    if spec.kind == "fine_tune":
        run.enter("training", _training(spec))
        run.train()
    run.enter("grafting", _grafting(spec))
    run.step("graft")
    verdict = ""
    if spec.evaluation.left_out is None:
        run.enter("evaluating", "Comparing the models on held-out rows")
        verdict = run.step("evaluate")["verdict"]["summary"]
    run.enter("publishing", f"Publishing. {verdict}".strip())
    _publish(run)


def _training(spec: JobSpec) -> str:
    return f"Training the {'base' if spec.strategy == 'shadow' else 'instruct'} model ({spec.tuning.type})"


def _grafting(spec: JobSpec) -> str:
    if spec.strategy == "direct":
        return "Adding the learned change to the instruct model it was learned on"
    if spec.delta is not None:
        what, where = f"what {spec.delta.job_id} learned", f"the instruct model of {spec.pair.name}"
    else:
        what, where = "the learned change", "the instruct model"
    scales = ", ".join(f"{scale:g}" for scale in spec.scales)
    return f"Grafting {what} onto {where} (scale {scales})"


def _publish(run: Run) -> None:
    outcome = publish.publish(
        run.spec,
        run.workspace,
        run.claim,
        team_id=run.team_id,
        storage=run.context.storage,
        check=run.lease.check,
    )
    run.clock.did(sum(artifact.bytes for artifact in outcome.artifacts))
    ended = run.clock.end()

    def succeed(session: Session) -> bool:
        succeeded = jobs.succeed(session, run.claim, outcome)
        session.add_all([ended] if ended and succeeded else [])
        return succeeded

    if not run.lease.write(run.context.database, succeed):
        raise Cancelled
    log.info("job_succeeded", model=run.spec.fine_tuned_model)


def _lease(context: Context, claim: Claim) -> Lease:
    settings = context.settings
    counted = time.monotonic()

    def beat() -> Wish:
        nonlocal counted
        now = time.monotonic()
        with context.database.writing() as session:
            ran = now - counted
            wish = jobs.beat(session, claim, lease_seconds=settings.lease_seconds, ran_seconds=ran)
            session.commit()
        counted = now
        return wish

    return Lease(
        beat,
        lease_seconds=settings.lease_seconds,
        beat_seconds=settings.beat_seconds,
        draining=context.draining,
        run_seconds=_seconds_left(context, claim),
    )


def _seconds_left(context: Context, claim: Claim) -> float:
    """How long the job may still run, by its team's limit."""
    with context.database.reading() as session:
        query = select(Team.max_job_seconds, Job.run_seconds).join(Job, Job.team_id == Team.id)
        row = session.execute(query.where(Job.id == claim.job_id)).one()
    return math.inf if row.max_job_seconds is None else row.max_job_seconds - row.run_seconds


def _open(context: Context, claim: Claim, lease: Lease) -> Run:
    with context.database.reading() as session:
        row = session.execute(select(Job.team_id, Job.spec).where(Job.id == claim.job_id)).one()
    spec = JobSpec.model_validate(row.spec)
    workspace = open_workspace(context.settings.work_dir, claim.job_id, claim.attempt)
    return Run(
        context=context,
        claim=claim,
        team_id=row.team_id,
        spec=spec,
        workspace=workspace,
        lease=lease,
        clock=PhaseClock(spec, workspace, claim, context.device),
    )


def _needs_less_at_once(cause: Cause, micro_batch: int) -> bool:
    """The trainer knows it; of one that was killed, what it said before tells. One that had said nothing was loading
    its model, for which no batch is too large."""
    if cause.code == "step_killed":
        return micro_batch > 1
    return cause.code == "out_of_memory" and cause.retryable


@dataclass(frozen=True)
class Again:
    """Another try: what it is charged to, and how long the job waits for it."""

    charge: jobs.Budget
    delay_seconds: float


def another_try(cause: Cause, spent: jobs.Budgets, max_infra_retries: int) -> Again | None:
    """What may help against the cause, as far as the budgets go."""
    if cause.code == "step_killed":
        max_infra_retries = min(MAX_KILLS, max_infra_retries)
    elif not cause.retryable or cause.fault != "infrastructure":
        return None
    if cause.code == "disk_full":  # passes by itself once somebody has made room
        return Again("disk_waits", jobs.disk_wait_seconds(spent.disk_waits))
    if cause.code == "step_stalled":
        return Again("stall_count", 0) if spent.stall_count < MAX_STALLS else None
    if spent.infra_retries < max_infra_retries:
        return Again("infra_retries", jobs.retry_delay_seconds(spent.infra_retries))
    return None


@dataclass(frozen=True)
class Attempt:
    """Decides what becomes of a job whose attempt ended otherwise than in success."""

    context: Context
    claim: Claim
    lease: Lease

    def ease(self, cause: Cause) -> None:
        """Try again at once with half the rows at a time, the effective batch unchanged; a few times."""
        tried = self._budgets().oom_level
        if tried >= MAX_OOM_LEVEL:
            self._fail(cause)
            return
        reason = (
            f"{cause.message} The training goes on with half the rows at a time and the same effective batch "
            f"({tried + 1} of {MAX_OOM_LEVEL}); the job is queued again"
        )
        self.settle(jobs.put_back, reason, charge="oom_level")

    def judge(self, cause: Cause) -> None:
        """Try again what another try may not meet, while the budget lasts; end the rest with its cause."""
        again = another_try(cause, self._budgets(), self.context.settings.max_infra_retries)
        if again is None:
            self._fail(cause)
            return
        when = f"in about {again.delay_seconds:.0f} s" if again.delay_seconds else "at once"
        reason = f"{cause.message} The job is tried again {when}"
        if again.charge == "disk_waits":
            reason = f"{cause.message} What is done is kept, and the job is tried again {when}. {cause.hint}"
        self.settle(jobs.put_back, reason.strip(), charge=again.charge, delay_seconds=again.delay_seconds)

    def _budgets(self) -> jobs.Budgets:
        def read() -> jobs.Budgets:
            with self.context.database.reading() as session:
                return jobs.budgets(session, self.claim.job_id)

        return self.lease.outlast(read)

    def _fail(self, cause: Cause) -> None:
        log.warning("job_failed", code=cause.code, cause=cause.message)
        self.settle(jobs.fail, cause)

    def settle(self, verb: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        self.lease.write(self.context.database, lambda session: verb(session, self.claim, *args, **kwargs))


def _clean_up(context: Context, claim: Claim) -> None:
    """A job that has ended needs its workspace no more, nor anything stored but not published. The states that its
    training saved are the sweep's to remove: one that failed can be run again from them."""
    with context.database.reading() as session:
        job = session.execute(select(Job.status, Job.attempt).where(Job.id == claim.job_id)).one()
    if job.status in jobs.TERMINAL:
        remove_workspaces(context.settings.work_dir, claim.job_id)
        for attempt in range(1, job.attempt + 1):
            if (job.status, job.attempt) != ("succeeded", attempt):
                context.storage.delete(publish.prefix(Claim(claim.job_id, attempt)))


def _our_fault() -> Cause:
    return Cause(
        code="internal_error",
        message="The worker met an unexpected error.",
        hint="The operator finds it in the worker's log.",
        retryable=True,
        fault="infrastructure",
    )


def _disk_full() -> Cause:
    return Cause(
        code="disk_full",
        message="The worker's disk is full.",
        hint="The operator frees space where SHADOWFT_DATA_DIR lies.",
        retryable=True,
        fault="infrastructure",
    )


def _time_up() -> Cause:
    return Cause(
        code="time_limit",
        message="The job has run as long as a job of its team may.",
        hint="Run it again (POST /v1/fine_tuning/jobs/{id}/retry): it goes on from its last saved state. Or use fewer "
        "epochs, or ask the operator for a longer limit.",
    )


def _progress(lines: Sequence[Line]) -> dict[str, Any] | None:
    steps = [line for line in lines if isinstance(line, Step)]
    if not steps:
        return None
    last = steps[-1]
    return {"step": last.step, "total_steps": last.total_steps, "loss": last.loss}


def _filled(line: Metrics) -> dict[str, Any]:
    values = {name: getattr(line, name) for name in line.__struct_fields__}
    return {name: value for name, value in values.items() if value is not None}


def _events(line: Line) -> list[NewEvent]:
    if isinstance(line, Note):
        return [NewEvent(line.message, level=line.level, data=line.data or None)]
    if isinstance(line, Metrics) and line.train_loss is not None:
        return [NewEvent(_step_message(line), type="metrics", data=_filled(line))]
    return []


def _step_message(line: Metrics) -> str:
    """Worded as the scripts expect that read such lines."""
    measured = {
        "training loss": line.train_loss,
        "validation loss": line.valid_loss,
        "full validation loss": line.full_valid_loss,
    }
    losses = ", ".join(f"{name}={loss:.4f}" for name, loss in measured.items() if loss is not None)
    return f"Step {line.step}/{line.total_steps}: {losses}"
