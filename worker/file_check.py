"""Check uploaded files: each in a capped child, its verdict on the file's row."""

from __future__ import annotations

import shutil
import time
from typing import Any

import structlog
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from core.db import db_now
from core.errors import Cause, LeaseLost, ShadowError
from core.jobs import Wish, file_waits
from core.models import File
from worker.lease import Cancelled, Draining, Lease
from worker.pipeline import Context
from worker.step_runner import run_step
from worker.workspace import Workspace

log = structlog.get_logger(__name__)


def check_waiting(context: Context) -> int:
    """Check every file that waits for it; the number of files checked."""
    checked = 0
    while not context.draining.is_set() and (file := _claim(context)) is not None:
        _check(context, file)
        checked += 1
    return checked


def _claim(context: Context) -> File | None:
    with context.database.writing() as session:
        candidate = select(File.id).where(file_waits()).order_by(File.id).limit(1).with_for_update(skip_locked=True)
        file_id = session.execute(
            update(File)
            .where(File.id == candidate.scalar_subquery(), file_waits())
            .values(check_lease_until=db_now(context.settings.lease_seconds), check_tries=File.check_tries + 1)
            .returning(File.id)
            .execution_options(synchronize_session=False)
        ).scalar()
        session.commit()
        return session.get(File, file_id) if file_id else None


def _check(context: Context, file: File) -> None:
    try:
        report = _inspect(context, file)
    except (Draining, LeaseLost):
        _release(context, file)
        return
    except Cancelled:
        report = _unreadable(_too_slow(context.settings.inspect_timeout_seconds))
    except ShadowError as error:
        if error.cause.fault != "user" and file.check_tries <= context.settings.max_infra_retries:
            log.warning("file_check_broke", file_id=file.id, code=error.code, cause=error.message)
            return  # the lease runs out, and a sweep has it checked again
        report = _unreadable(error.cause)
    with context.database.writing() as session:
        _keep_verdict(session, file.id, report)
        session.commit()
    log.info("file_checked", file_id=file.id, ok=report["ok"])


def _inspect(context: Context, file: File) -> dict[str, Any]:
    workspace = Workspace(context.settings.work_dir / f"check-{file.id}-{file.check_tries}")
    try:
        workspace.inputs.mkdir(parents=True)
        context.storage.fetch(file.storage_key, workspace.inputs / "file")
        with _lease(context, file) as lease:
            result = run_step(
                "inspect",
                workspace,
                lease=lease,
                device="cpu",
                grace_seconds=context.settings.cancel_grace_seconds,
                on_lines=lambda lines: None,
            )
        report: dict[str, Any] = result["report"]
        return report
    finally:
        shutil.rmtree(workspace.root, ignore_errors=True)


def _lease(context: Context, file: File) -> Lease:
    settings = context.settings
    end = time.monotonic() + settings.inspect_timeout_seconds

    def beat() -> Wish:
        if time.monotonic() > end:
            return "cancel"
        with context.database.writing() as session:
            session.execute(
                update(File).where(File.id == file.id).values(check_lease_until=db_now(settings.lease_seconds))
            )
            session.commit()
        return "run"

    return Lease(
        beat, lease_seconds=settings.lease_seconds, beat_seconds=settings.beat_seconds, draining=context.draining
    )


def _release(context: Context, file: File) -> None:
    with context.database.writing() as session:
        session.execute(update(File).where(File.id == file.id).values(check_lease_until=None))
        session.commit()


def _too_slow(seconds: float) -> Cause:
    return Cause(
        code="invalid_training_file",
        message=f"The file could not be checked within {seconds:.0f} seconds. Split it into smaller files.",
    )


def _unreadable(cause: Cause) -> dict[str, Any]:
    return {"ok": False, "summary": cause.message, "rows": 0, "errors": {cause.code: 0}, "first_errors": []}


def _keep_verdict(session: Session, file_id: str, report: dict[str, Any]) -> None:
    session.execute(
        update(File)
        .where(File.id == file_id, File.status == "uploaded")
        .values(
            status="processed" if report["ok"] else "error",
            status_details=None if report["ok"] else report["summary"][:1024],
            report=report,
            check_lease_until=None,
        )
    )
