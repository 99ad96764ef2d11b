"""A large file on its way in by parts: every verb that changes an upload.

    (new) -> pending -> completed | cancelled | expired

Parts come in any order, also at once; `complete` names them in theirs. No verb commits: the caller does, and deletes
from storage what the verb names only after that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from core import files
from core.db import db_now
from core.errors import Conflict, InvalidInput
from core.jobs import SWEEP_LIMIT
from core.models import File, Upload, UploadPart
from core.storage import Storage, Stored, pieces_of

LIFETIME = timedelta(hours=1)
MAX_PART_BYTES = 64 * 1024 * 1024


def create(session: Session, upload: Upload) -> Upload:
    # The moment of its making is the database's, so that the end of its life is, too.
    upload.created_at = session.execute(select(db_now())).scalar_one()
    upload.expires_at = upload.created_at + LIFETIME
    session.add(upload)
    session.flush()
    return upload


def require_pending(session: Session, upload_id: str) -> Upload:
    """The upload, held until the transaction ends. Raises Conflict where it is pending no more."""
    late = (Upload.expires_at <= db_now()).label("late")
    held = select(Upload, late).where(Upload.id == upload_id).with_for_update()
    # What the session has read of it before is another request's past.
    row = session.execute(held, execution_options={"populate_existing": True}).one()
    upload: Upload = row.Upload
    status = "expired" if upload.status == "pending" and row.late else upload.status
    if status != "pending":
        raise Conflict(
            f"The upload {upload_id} is {status}; only a pending one can be changed.",
            code="upload_not_pending",
            hint="Create a new upload.",
        )
    return upload


def add_part(session: Session, part: UploadPart, *, quota_bytes: int | None) -> None:
    upload = require_pending(session, part.upload_id)
    files.take_room(session, upload.team_id, part.bytes, quota_bytes=quota_bytes)
    session.add(part)
    session.flush()


def cancel(session: Session, upload_id: str) -> list[str]:
    """pending -> cancelled. The parts' storage keys. Repeating it changes nothing."""
    status = session.execute(select(Upload.status).where(Upload.id == upload_id).with_for_update()).scalar_one()
    if status == "cancelled":
        return []
    require_pending(session, upload_id).status = "cancelled"
    return _forget_parts(session, upload_id)


def expire(session: Session) -> list[str]:
    """pending -> expired where an upload's hour is over, a sweep's worth of them. The parts' storage keys."""
    due = select(Upload).where(Upload.status == "pending", Upload.expires_at <= db_now()).limit(SWEEP_LIMIT)
    keys = []
    for upload in session.scalars(due.with_for_update(skip_locked=True)):
        upload.status = "expired"
        keys += _forget_parts(session, upload.id)
    return keys


def _forget_parts(session: Session, upload_id: str) -> list[str]:
    deleted = delete(UploadPart).where(UploadPart.upload_id == upload_id).returning(UploadPart.storage_key)
    return list(session.scalars(deleted.execution_options(synchronize_session=False)))


# --- completion -----------------------------------------------------------------------------------------------------


def is_completed_with(upload: Upload, part_ids: Sequence[str], md5: str | None) -> bool:
    """Whether it was completed with the very same request, whose answer then is the same again."""
    return upload.status == "completed" and (upload.part_ids, upload.md5) == (list(part_ids), md5)


def parts_in_order(session: Session, upload: Upload, part_ids: Sequence[str]) -> list[UploadPart]:
    """The parts that make the file. Raises InvalidInput for one unknown or named twice, and for a wrong sum."""
    found = {part.id: part for part in session.scalars(select(UploadPart).where(UploadPart.upload_id == upload.id))}
    for index, part_id in enumerate(part_ids):
        if part_id not in found:
            raise InvalidInput(
                f"The upload {upload.id} has no part {part_id[:100]!r}.",
                code="part_not_found",
                param=f"part_ids.{index}",
            )
    if len(set(part_ids)) < len(part_ids):
        twice = next(part_id for part_id in part_ids if part_ids.count(part_id) > 1)
        raise InvalidInput(f"The part {twice!r} is named twice; name each part once.", param="part_ids")
    parts = [found[part_id] for part_id in part_ids]
    total = sum(part.bytes for part in parts)
    if total != upload.bytes:
        raise InvalidInput(
            f"The {len(parts)} parts hold {total:,} bytes, and the upload was declared with {upload.bytes:,}. "
            "Name every part, in the file's order.",
            code="size_mismatch",
            param="part_ids",
        )
    return parts


def assemble(storage: Storage, key: str, parts: Sequence[UploadPart], md5: str | None) -> Stored:
    """Store the parts' contents, one after the other, as one object.

    Raises InvalidInput where its MD5 is not `md5`, and FileNotFoundError where a part has been deleted meanwhile.
    """
    incoming = storage.receive(key)
    whole = hashlib.md5(usedforsecurity=False)
    try:
        for part in parts:
            with storage.path(part.storage_key).open("rb") as file:
                for piece in pieces_of(file):
                    incoming.write(piece)
                    if md5 is not None:
                        whole.update(piece)
        if md5 is not None and whole.hexdigest() != md5:
            raise InvalidInput(
                f"The file's MD5 is {whole.hexdigest()}, and you said {md5}. Name the parts in the file's order, or "
                "send the damaged one again.",
                code="checksum_mismatch",
                param="md5",
            )
    except BaseException:
        incoming.drop()
        raise
    return incoming.keep()


def complete(session: Session, upload: Upload, file: File, part_ids: Sequence[str], md5: str | None) -> list[str]:
    """pending -> completed, with its file. The storage keys of all its parts. `upload` is held: `require_pending`."""
    files.add(session, file, lifetime_seconds=upload.file_lifetime_seconds)
    upload.part_ids, upload.md5, upload.file_id = list(part_ids), md5, file.id
    upload.status = "completed"
    return _forget_parts(session, upload.id)
