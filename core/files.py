"""What becomes of a team's files: how much room they take, who still reads one, when one has expired.

No verb commits: the caller does, and deletes from storage what the verb names only after that.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.db import db_now
from core.errors import QuotaExceeded
from core.ids import new_id
from core.jobs import SWEEP_LIMIT, TERMINAL
from core.keys import hold_team
from core.models import Artifact, File, Job, Upload, UploadPart


def add(session: Session, file: File, *, lifetime_seconds: int | None) -> File:
    """Add a file that waits for its check and, where it has a lifetime, expires.

    It gets its id here: files are listed in the order in which they came to be, and not in that in which their uploads
    began.
    """
    hold_team(session, file.team_id)
    file.id = new_id("file-")
    file.status = "uploaded"
    session.add(file)
    session.flush()
    if lifetime_seconds is not None:
        file.expires_at = file.created_at + timedelta(seconds=lifetime_seconds)
    return file


def live_reader(session: Session, file: File) -> str | None:
    """The id of a job that has not ended and reads the file."""
    live = session.scalars(select(Job).where(Job.team_id == file.team_id, Job.status.not_in(TERMINAL)))
    return next((job.id for job in live if file.id in job.files.values()), None)


def delete_expired(session: Session) -> list[str]:
    """Delete expired files that no live job reads, a sweep's worth of them; their storage keys."""
    expired = select(File).where(File.expires_at <= db_now()).order_by(File.expires_at).limit(SWEEP_LIMIT)
    unread = [
        file for file in session.scalars(expired.with_for_update(skip_locked=True)) if not live_reader(session, file)
    ]
    for file in unread:
        session.delete(file)
    return [file.storage_key for file in unread]


# --- room -----------------------------------------------------------------------------------------------------------


def used_bytes(session: Session, team_id: str) -> int:
    """What the team's files, the parts of its pending uploads and its artifacts take together."""
    parts = select(func.sum(UploadPart.bytes)).join(Upload).where(Upload.team_id == team_id)
    sums = (
        select(func.sum(File.bytes)).where(File.team_id == team_id),
        parts.where(Upload.status == "pending"),
        select(func.sum(Artifact.bytes)).where(Artifact.team_id == team_id),
    )
    return sum(int(session.scalar(query) or 0) for query in sums)


def take_room(session: Session, team_id: str, wanted_bytes: int, *, quota_bytes: int | None) -> None:
    """Raise QuotaExceeded where `wanted_bytes` more would pass the quota.

    The team stays held until the commit: of two uploads that each would just fit, one does.
    """
    if quota_bytes is None:
        return
    hold_team(session, team_id)
    used = used_bytes(session, team_id)
    if used + wanted_bytes > quota_bytes:
        raise over_quota(used, quota_bytes)


def over_quota(used: int, quota_bytes: int) -> QuotaExceeded:
    return QuotaExceeded(
        f"Your team's storage is full: {used:,} of {quota_bytes:,} bytes are taken, and this would pass the limit.",
        hint="Delete files or models that you no longer need, or ask the operator for a larger "
        "SHADOWFT_TEAM_STORAGE_BYTES.",
    )
