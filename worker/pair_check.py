"""Check pairs: the first stage from headers, the second in a capped child; the verdict goes to the check's row or job.

A light worker does one thing at a time, and admissions wait behind a check; so one check is done for each message, and
each part of it has an end: the child's processor time, the time for sigma, and the time for all of it. A check whose
worker dies is done again by another; one that kills each worker, or child, is given up.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import ColumnElement, and_, select, update
from sqlalchemy.exc import OperationalError

from core.db import db_now
from core.errors import Cause, LeaseLost, ShadowError, StepFailed
from core.fingerprint import model_fingerprint
from core.hub import pin
from core.ids import new_id
from core.job_spec import ModelSource, PairSource
from core.jobs import Wish, pair_check_waits
from core.models import PairCheck
from core.pairs import checked_source
from core.verdict import Finding, FirstStage, Outcome, Role, examine, staged, verdict_of
from worker.lease import Cancelled, Draining, Lease
from worker.model_cache import ModelCache, make_cache
from worker.pipeline import Context
from worker.step_runner import OVER_CPU_LIMIT, run_step
from worker.workspace import Workspace

#: What sigma may take of a check, and of an admission, behind which other jobs wait: 240 s read two models of 8 billion
#: parameters from a slow disk (16 GB each at 140 MB/s).
CHECK_SIGMA_SECONDS = 240.0
ADMISSION_SIGMA_SECONDS = 30.0
#: Processor time of the part that runs strangers' tokenizers and templates; honest ones take a few seconds.
TEXTS_CPU_SECONDS = 60
#: What the whole second stage may take of an admission.
ADMISSION_SECONDS = 180.0

#: Raised when the second stage finds other things than before, so that nobody reuses what an older version found.
FORMAT = 3

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Report:
    """What a check of both stages found."""

    base: ModelSource
    instruct: ModelSource
    findings: tuple[Finding, ...]
    #: As they are kept: each with its stage.
    kept_findings: list[dict[str, Any]]
    similarity: dict[str, Any] | None = None
    #: None where the second stage was not reached.
    fingerprint: str | None = None
    #: Whether a child looked at it now, and nobody before.
    is_new: bool = False

    @property
    def verdict(self) -> Outcome:
        return verdict_of(self.findings)

    def for_job(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "findings": self.kept_findings, "similarity": self.similarity}


@contextmanager
def settling(context: Context, *, param: str = "model") -> Iterator[Callable[[ModelSource], ModelSource]]:
    """Gives what settles a source: it pins it to a commit, or finds the folder once more where folders may be read.

    While this is open nobody removes what has been settled from the models' cache, so that it can be read to the end.
    """
    cache = make_cache(context.settings)
    with ExitStack() as held:

        def settle(source: ModelSource) -> ModelSource:
            checked = checked_source(source, context.settings.model_roots, param=param)
            settled = pin(checked, context.settings.model_cache_dir)
            held.enter_context(cache.hold(settled))
            return settled

        yield settle


# --- rows -------------------------------------------------------------------------------------------------------------


def check_next(context: Context) -> bool:
    """Do one check that waits; False where none does."""
    row = _claim(context)
    if row is None:
        return False
    structlog.contextvars.bind_contextvars(check_id=row.id)
    try:
        _check(context, row)
    finally:
        structlog.contextvars.unbind_contextvars("check_id")
    return True


def _claim(context: Context) -> PairCheck | None:
    with context.database.writing() as session:
        candidate = select(PairCheck.id).where(pair_check_waits()).order_by(PairCheck.id).limit(1)
        check_id = session.execute(
            update(PairCheck)
            .where(PairCheck.id == candidate.with_for_update(skip_locked=True).scalar_subquery(), pair_check_waits())
            .values(
                status="running",
                check_lease_until=db_now(context.settings.lease_seconds),
                check_tries=PairCheck.check_tries + 1,
            )
            .returning(PairCheck.id)
            .execution_options(synchronize_session=False)
        ).scalar()
        # Before the commit: after it another worker may have taken the row, and this one would act in its name.
        row = session.get(PairCheck, check_id) if check_id else None
        session.commit()
        return row


def _check(context: Context, row: PairCheck) -> None:
    tries = context.settings.max_infra_retries
    if row.check_tries > tries + 1:  # nobody came back to say why the earlier ones ended
        _fail(context, row, _lost(tries + 1))
        return
    try:
        with _lease(context, context.settings.inspect_timeout_seconds, lambda: _renew(context, row)) as lease:
            report = _report(context, row, lease)
    except Draining:
        _write(context, row, status="queued", check_tries=row.check_tries - 1)
    except LeaseLost:
        log.warning("pair_check_lost")
    except Cancelled:
        _fail(context, row, _too_slow(context.settings.inspect_timeout_seconds))
    except ShadowError as error:
        _give_up_or_wait(context, row, error.cause)
    except OperationalError:  # the database is away: the lease runs out, and a sweep has it checked again
        raise
    except Exception as error:  # what nobody foresaw, of the Hub's client say, must not look like a lost worker
        log.exception("pair_check_crashed")
        _give_up_or_wait(context, row, _unforeseen(error))
    else:
        _complete(context, row, report)


def _give_up_or_wait(context: Context, row: PairCheck, cause: Cause) -> None:
    if cause.fault != "user" and row.check_tries <= context.settings.max_infra_retries:
        log.warning("pair_check_broke", code=cause.code, cause=cause.message)
        return  # the lease runs out, and a sweep has it checked again
    _fail(context, row, cause)


def _report(context: Context, row: PairCheck, lease: Lease) -> Report:
    with settling(context) as settle:
        first = examine(
            ModelSource.model_validate(row.base),
            ModelSource.model_validate(row.instruct),
            settle=settle,
            cache=context.settings.model_cache_dir,
        )
        if row.depth == "headers":
            return of_first_stage(first)
        owner = f"{row.id}-{row.check_tries}"
        return look_further(context, first, owner, lease, sigma_seconds=CHECK_SIGMA_SECONDS, insist=True)


def _lease(context: Context, seconds: float, renew: Callable[[], None]) -> Lease:
    """A lease that is `Cancelled` once `seconds` are over."""
    settings = context.settings
    end = time.monotonic() + seconds

    def beat() -> Wish:
        if time.monotonic() > end:
            return "cancel"
        renew()
        return "run"

    return Lease(
        beat, lease_seconds=settings.lease_seconds, beat_seconds=settings.beat_seconds, draining=context.draining
    )


def _held_by(row: PairCheck) -> ColumnElement[bool]:
    return and_(PairCheck.id == row.id, PairCheck.status == "running", PairCheck.check_tries == row.check_tries)


def _renew(context: Context, row: PairCheck) -> None:
    if not _write(context, row, check_lease_until=db_now(context.settings.lease_seconds)):
        raise LeaseLost(f"The check {row.id} is no longer held by try {row.check_tries}.")


def _complete(context: Context, row: PairCheck, report: Report) -> None:
    kept = _write(context, row, **_completed(report))
    log.info("pair_checked", verdict=report.verdict, kept=kept)


def _completed(report: Report) -> dict[str, Any]:
    return {
        "status": "completed",
        "base": report.base.model_dump(),
        "instruct": report.instruct.model_dump(),
        "findings": report.kept_findings,
        "similarity": report.similarity,
        "fingerprint": report.fingerprint,
        "finished_at": db_now(),
    }


def _fail(context: Context, row: PairCheck, cause: Cause) -> None:
    _write(context, row, status="failed", error=cause.as_dict(), finished_at=db_now())
    log.warning("pair_check_failed", code=cause.code, cause=cause.message)


def _write(context: Context, row: PairCheck, **values: Any) -> bool:
    """False where a later try has the check by now."""
    released = {} if "check_lease_until" in values else {"check_lease_until": None}
    with context.database.writing() as session:
        changed = session.execute(
            update(PairCheck)
            .where(_held_by(row))
            .values(**values, **released)
            .returning(PairCheck.id)
            .execution_options(synchronize_session=False)
        ).first()
        session.commit()
    return changed is not None


# --- a job's admission ------------------------------------------------------------------------------------------------


def check_for_job(context: Context, first: FirstStage, *, job_id: str, team_id: str, pair: PairSource) -> Report:
    """The second stage for a job that is about to be admitted; what is new about the pair is kept for the next one.
    The caller holds what `first` has settled.

    Raises Draining, and StepFailed where the second stage does not come to an end.
    """
    owner = f"{job_id}-{time.monotonic_ns()}"
    try:
        with _lease(context, ADMISSION_SECONDS, lambda: None) as lease:
            report = look_further(context, first, owner, lease, sigma_seconds=ADMISSION_SIGMA_SECONDS, insist=False)
    except Cancelled:
        raise StepFailed(_too_slow(ADMISSION_SECONDS)) from None
    if report.is_new:
        _keep(context, report, team_id, pair.name)
    return report


def _keep(context: Context, report: Report, team_id: str, pair: str) -> None:
    row = PairCheck(id=new_id("pchk_"), team_id=team_id, pair=pair, depth="full", **_completed(report))
    with context.database.writing() as session:
        session.add(row)
        session.commit()


# --- the second stage -------------------------------------------------------------------------------------------------


def look_further(
    context: Context, first: FirstStage, owner: str, lease: Lease, *, sigma_seconds: float, insist: bool
) -> Report:
    """Add the second stage to the first, unless that refuses the pair already.

    What was found before on the very same files is found again without looking; with `insist` only if sigma was
    measured then, or cannot be now. `owner` names the workspace. The caller holds what `first` has settled.
    """
    if verdict_of(first.findings) == "refuse":
        return of_first_stage(first)
    cache = make_cache(context.settings)
    sources = _sources(first)
    fingerprint = fingerprint_of(first)
    at_hand = all(cache.weights_at_hand(source) for source in sources.values())
    known = _known(context, fingerprint)
    if known is not None and _is_enough(known, at_hand=at_hand, insist=insist):
        findings = [one for one in known.findings if one["stage"] == "files"]
        return _of_both(first, findings, known.similarity, fingerprint, is_new=False)
    folders = {role: _folder(cache, source, lease) for role, source in sources.items()}
    asked = {"weights": at_hand, "texts_cpu_seconds": TEXTS_CPU_SECONDS, "similarity_seconds": sigma_seconds}
    found = _inspect(context, owner, folders, asked, lease)
    return _of_both(first, staged("files", found["findings"]), found["similarity"], fingerprint, is_new=True)


def of_first_stage(first: FirstStage) -> Report:
    """What a check says that goes no further."""
    kept = staged("headers", [finding.as_dict() for finding in first.findings])
    return Report(first.base, first.instruct, first.findings, kept)


def _of_both(
    first: FirstStage,
    files: list[dict[str, Any]],
    similarity: dict[str, Any] | None,
    fingerprint: str,
    *,
    is_new: bool,
) -> Report:
    begun = of_first_stage(first)
    found = [Finding(**{name: value for name, value in one.items() if name != "stage"}) for one in files]
    return Report(
        base=first.base,
        instruct=first.instruct,
        findings=(*first.findings, *found),
        kept_findings=[*begun.kept_findings, *files],
        similarity=similarity,
        fingerprint=fingerprint,
        is_new=is_new,
    )


def _sources(first: FirstStage) -> dict[Role, ModelSource]:
    """Of the models that matter, which are those that were read."""
    return {role: first.base if role == "base" else first.instruct for role in first.heads}


def fingerprint_of(first: FirstStage) -> str:
    """Of all that the second stage reads, and of what it makes of it."""
    sources = _sources(first)
    models = {role: model_fingerprint(source, first.heads[role].checkpoint) for role, source in sources.items()}
    return hashlib.sha256(json.dumps([FORMAT, models], sort_keys=True).encode()).hexdigest()


def _known(context: Context, fingerprint: str) -> PairCheck | None:
    same = and_(PairCheck.fingerprint == fingerprint, PairCheck.status == "completed")
    with context.database.reading() as session:
        return session.scalar(select(PairCheck).where(same).order_by(PairCheck.id.desc()).limit(1))


def _is_enough(known: PairCheck, *, at_hand: bool, insist: bool) -> bool:
    """Whether an earlier check needs not be repeated: for the sake of sigma, or because somebody insists who may have
    removed what it refused."""
    if any(one["level"] == "refuse" for one in known.findings):
        return not insist
    if known.similarity is not None or not at_hand:
        return True
    return not insist and not any(one["code"] == "weights_not_here" for one in known.findings)


def _folder(cache: ModelCache, source: ModelSource, lease: Lease) -> Path:
    return cache.weights_at_hand(source) or cache.fetch_small(source, lease.check)


def _inspect(
    context: Context, owner: str, folders: dict[Role, Path], asked: dict[str, Any], lease: Lease
) -> dict[str, Any]:
    with _workspace(context, owner) as workspace:
        for role, folder in folders.items():
            (workspace.inputs / role).symlink_to(folder)
        workspace.pair_file.write_text(json.dumps(asked))
        try:
            return run_step(
                "inspect",
                workspace,
                lease=lease,
                device="cpu",
                grace_seconds=context.settings.cancel_grace_seconds,
                on_lines=lambda lines: None,
            )
        except StepFailed as error:
            if error.code != OVER_CPU_LIMIT:
                raise StepFailed(_without_end(error.cause)) from error
            return {"findings": [_endless().as_dict()], "similarity": None}


@contextmanager
def _workspace(context: Context, owner: str) -> Iterator[Workspace]:
    workspace = Workspace(context.settings.work_dir / f"check-{owner}")
    workspace.inputs.mkdir(parents=True)
    try:
        yield workspace
    finally:
        shutil.rmtree(workspace.root, ignore_errors=True)


# --- words ------------------------------------------------------------------------------------------------------------


def _endless() -> Finding:
    return Finding(
        "refuse",
        "endless_tokenizer",
        "The models' tokenizers and chat template did not finish with a few short texts in the processor time that "
        "they may take.",
        "Take the tokenizer files and the template of the models' own release.",
    )


def _without_end(cause: Cause) -> Cause:
    """Of a child that died. That may be a matter of the moment, so it is no finding: those are kept."""
    if cause.fault == "user":
        return cause
    return replace(
        cause,
        message=f"The models could not be looked at to the end. {cause.message}",
        hint="Check the pair again. If that stays so, its files are damaged, or need more memory than the worker has.",
        retryable=True,
    )


def _unforeseen(error: Exception) -> Cause:
    said = (str(error).splitlines() or [""])[0][:200]
    return Cause(
        code="pair_check_crashed",
        message=f"The pair's check stopped on an unexpected {type(error).__name__}: {said}",
        hint="Check the pair again; the operator finds more in the log of the light worker.",
        retryable=True,
        fault="infrastructure",
    )


def _too_slow(seconds: float) -> Cause:
    return Cause(
        code="pair_check_too_slow",
        message=f"The pair could not be checked within {seconds:.0f} seconds.",
        hint="The Hub or the worker's disk is slow just now; try again.",
        retryable=True,
        fault="infrastructure",
    )


def _lost(tries: int) -> Cause:
    return Cause(
        code="worker_lost",
        message=f"The worker that checked the pair was lost {tries} times.",
        hint="The check probably needs more memory than the worker has.",
        fault="infrastructure",
    )
