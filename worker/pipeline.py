"""A job, told in order; the only file that decides a job's fate."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import select

from core import jobs
from core.config import Settings
from core.db import Database
from core.errors import Cause, LeaseLost, ShadowError
from core.job_spec import JobSpec
from core.jobs import Claim, NewEvent, Phase, Wish
from core.models import Job
from core.storage import Storage
from worker import inputs, publish
from worker.lease import Cancelled, Draining, Lease
from worker.phase_clock import PhaseClock
from worker.progress import Line, Metrics, Note, Step
from worker.step_runner import run_step
from worker.workspace import Workspace

log = structlog.get_logger(__name__)


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

    def enter(self, phase: Phase, message: str) -> None:
        ended = self.clock.turn_to(phase)
        with self.context.database.writing() as session:
            wish = jobs.enter_phase(session, self.claim, phase, message)
            session.add_all([ended] if ended else [])
            session.commit()
        self.lease.heard(wish)
        self.lease.check()

    def step(self, name: str) -> dict[str, Any]:
        result = run_step(
            name,
            self.workspace,
            lease=self.lease,
            device=self.context.device,
            grace_seconds=self.context.settings.cancel_grace_seconds,
            on_lines=self.record,
        )
        self.clock.did_step(name, result)
        return result

    def record(self, lines: Sequence[Line]) -> None:
        """Turn a step's lines into progress, metrics and events, in one write."""
        metrics = [_filled(line) for line in lines if isinstance(line, Metrics)]
        events = [event for line in lines for event in _events(line)]
        with self.context.database.writing() as session:
            wish = jobs.record(session, self.claim, progress=_progress(lines), metrics=metrics, events=events)
            session.commit()
        self.lease.heard(wish)


def run(context: Context, claim: Claim) -> None:
    """Take a claimed job to where it can be taken."""
    structlog.contextvars.bind_contextvars(job_id=claim.job_id, attempt=claim.attempt)
    log.info("job_claimed")
    try:
        with _lease(context, claim) as lease:
            opened = _open(context, claim, lease)
            with inputs.holding_models(opened.spec, context.settings):
                _tell(opened)
    except LeaseLost:
        log.warning("lease_lost")
    except Cancelled:
        _settle(context, claim, jobs.finish_cancelled)
    except Draining:
        _settle(context, claim, jobs.put_back, "The worker is shutting down; the job is queued again")
    except ShadowError as error:
        _judge(context, claim, error.cause)
    except Exception:  # the job must not stay running because of a fault of ours
        log.exception("job_crashed")
        _judge(context, claim, _our_fault())
    finally:
        _clean_up(context, claim)
        structlog.contextvars.unbind_contextvars("job_id", "attempt")


def _tell(run: Run) -> None:
    """The job's story."""
    spec = run.spec
    inputs.fetch(spec, run.workspace, storage=run.context.storage, settings=run.context.settings, check=run.lease.check)
    if spec.kind == "fine_tune":
        run.enter("training", _training(spec))
        run.step("train")
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
    with run.context.database.writing() as session:
        if not jobs.succeed(session, run.claim, outcome):
            raise Cancelled
        session.add_all([ended] if ended else [])
        session.commit()
    log.info("job_succeeded", model=run.spec.fine_tuned_model)


def _lease(context: Context, claim: Claim) -> Lease:
    settings = context.settings

    def beat() -> Wish:
        with context.database.writing() as session:
            wish = jobs.beat(session, claim, lease_seconds=settings.lease_seconds)
            session.commit()
        return wish

    return Lease(
        beat,
        lease_seconds=settings.lease_seconds,
        beat_seconds=settings.beat_seconds,
        draining=context.draining,
    )


def _open(context: Context, claim: Claim, lease: Lease) -> Run:
    with context.database.reading() as session:
        row = session.execute(select(Job.team_id, Job.spec).where(Job.id == claim.job_id)).one()
    spec = JobSpec.model_validate(row.spec)
    workspace = Workspace(context.settings.work_dir / claim.job_id)
    return Run(
        context=context,
        claim=claim,
        team_id=row.team_id,
        spec=spec,
        workspace=workspace,
        lease=lease,
        clock=PhaseClock(spec, workspace, claim, context.device),
    )


def _judge(context: Context, claim: Claim, cause: Cause) -> None:
    """Try again what the infrastructure failed, while the budget lasts; end the rest with its cause."""
    if cause.retryable and cause.fault == "infrastructure":
        with context.database.reading() as session:
            tried = jobs.infra_retries(session, claim)
        if tried < context.settings.max_infra_retries:
            delay = jobs.retry_delay_seconds(tried)
            reason = f"{cause.message} The job is tried again in about {delay:.0f} s"
            _settle(context, claim, jobs.put_back, reason, charged=True, delay_seconds=delay)
            return
    log.warning("job_failed", code=cause.code, cause=cause.message)
    _settle(context, claim, jobs.fail, cause)


def _settle(context: Context, claim: Claim, verb: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    try:
        with context.database.writing() as session:
            verb(session, claim, *args, **kwargs)
            session.commit()
    except LeaseLost:
        log.warning("lease_lost")


def _clean_up(context: Context, claim: Claim) -> None:
    """A job that has ended needs its workspace no more, nor anything stored but not published."""
    with context.database.reading() as session:
        job = session.execute(select(Job.status, Job.attempt).where(Job.id == claim.job_id)).one()
    if job.status in jobs.TERMINAL:
        shutil.rmtree(context.settings.work_dir / claim.job_id, ignore_errors=True)
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
