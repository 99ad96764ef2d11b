"""Uploads: a large file by parts, in any order and at once, then put together."""

from __future__ import annotations

from typing import Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from api.deps import CallerDep, Service, ServiceDep, StrictModel, owned, timestamp
from api.idempotency import IntentDep, first_answer, replayed
from api.multipart import Form, Limit, arriving, clean_filename, receive_form
from api.routes import files as file_routes
from api.routes.files import (
    MAX_LIFETIME_SECONDS,
    MIN_LIFETIME_SECONDS,
    FileObject,
    dropped_on_failure,
    limit_within_quota,
    new_storage_key,
)
from api.strict_json import StrictRoute
from core import files, uploads
from core.broker import nudge
from core.errors import InvalidInput, TooLarge, Unavailable
from core.ids import new_id
from core.keys import Caller
from core.models import File, Upload, UploadPart
from core.uploads import MAX_PART_BYTES

router = APIRouter(prefix="/uploads", tags=["Uploads"], route_class=StrictRoute)


class ExpiresAfter(StrictModel):
    anchor: Literal["created_at"] = Field(description="Always `created_at`: from the finished file's creation on.")
    seconds: int = Field(ge=MIN_LIFETIME_SECONDS, le=MAX_LIFETIME_SECONDS, description="How long the file is kept.")


class UploadRequest(StrictModel):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "bytes": 2_147_483_648,
                    "filename": "support.jsonl",
                    "mime_type": "text/jsonl",
                    "purpose": "fine-tune",
                }
            ]
        }
    )

    bytes: int = Field(ge=1, description="The file's whole size.")
    filename: str = Field(min_length=1, max_length=512, description="A label only.")
    mime_type: str = Field(min_length=1, max_length=255, description="Kept as a remark; the check looks at the rows.")
    purpose: Literal["fine-tune", "evals", "user_data"] = Field(
        description="`fine-tune`: rows to train on. `evals`: rows to measure on. `user_data`: anything else."
    )
    expires_after: ExpiresAfter | None = Field(None, description="Of the finished file; without it, it is kept.")


class CompleteRequest(StrictModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"part_ids": ["part_01kqp3v9", "part_01kqp3wa"]}]})

    part_ids: list[str] = Field(min_length=1, description="Every part of the file, in the file's order.")
    md5: str | None = Field(
        None, pattern=r"^[0-9a-fA-F]{32}$", description="Of the whole file, in hexadecimal; compared where it is given."
    )


class UploadObject(BaseModel):
    """A file on its way in. A `pending` one takes parts until `expires_at`, an hour after its creation."""

    id: str = Field(description="`upload_…`")
    object: Literal["upload"] = Field("upload", description="Always `upload`.")
    bytes: int = Field(description="The file's whole size, as declared.")
    created_at: int = Field(description="Unix seconds.")
    expires_at: int = Field(description="Unix seconds: until then parts are taken.")
    filename: str = Field(description="What the finished file is called.")
    purpose: Literal["fine-tune", "evals", "user_data"] = Field(description="The finished file's.")
    status: Literal["pending", "completed", "cancelled", "expired"] = Field(
        description="`pending`: parts are taken. The others are final."
    )
    file: FileObject | None = Field(
        description="The finished file. Null: not completed, or the file has been deleted since."
    )


class PartObject(BaseModel):
    """One part of an upload."""

    id: str = Field(description="`part_…`; completing the upload names it.")
    object: Literal["upload.part"] = Field("upload.part", description="Always `upload.part`.")
    upload_id: str = Field(description="The upload that it belongs to.")
    created_at: int = Field(description="Unix seconds.")
    bytes: int = Field(description="Its size.")
    sha256: str = Field(description="Of its bytes, in hexadecimal.")


def _render(upload: Upload, file: File | None) -> dict[str, Any]:
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": timestamp(upload.created_at),
        "expires_at": timestamp(upload.expires_at),
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "file": file_routes.render(file) if file else None,
    }


@router.post("", response_model=UploadObject)
def create_upload(body: UploadRequest, caller: CallerDep, service: ServiceDep, intent: IntentDep) -> Response:
    """Begin to send a large file by parts.

    Then send each part of at most 64 MB, in any order and at once if you like, and complete the upload with the parts'
    ids in the file's order. `client.uploads.upload_file_chunked` does all of it.
    """
    most = service.settings.max_upload_bytes
    if body.bytes > most:
        raise InvalidInput(
            f"Invalid value for 'bytes': {body.bytes:,}; this server takes files of at most {most:,} bytes.",
            param="bytes",
        )
    upload = Upload(
        id=new_id("upload_"),
        team_id=caller.team_id,
        filename=clean_filename(body.filename),
        mime_type=body.mime_type,
        purpose=body.purpose,
        bytes=body.bytes,
        file_lifetime_seconds=body.expires_after.seconds if body.expires_after else None,
    )
    with service.database.writing() as session:
        if (earlier := replayed(session, intent)) is not None:
            return earlier
        files.take_room(session, caller.team_id, body.bytes, quota_bytes=service.settings.team_storage_bytes)
        uploads.create(session, upload)
        answer = first_answer(session, intent, _render(upload, None))
        session.commit()
        return answer


_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "additionalProperties": False,
                    "properties": {
                        "data": {"type": "string", "format": "binary", "description": "At most 67,108,864 bytes."}
                    },
                }
            }
        },
    }
}


@router.post("/{upload_id}/parts", response_model=PartObject, openapi_extra=_FORM)
async def create_part(request: Request, upload_id: str, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """Send one part. It is on the disk when this answers; its place in the file is named when the upload is completed.

    A part that was sent twice, because its answer was lost, counts only where `part_ids` names it.
    """
    upload = await to_thread.run_sync(_pending, service, upload_id, caller)
    limit = await limit_within_quota(_part_limit(upload), caller, service)
    limit.check(request.headers)
    part_id = new_id("part_")
    key = f"uploads/{part_id}"
    async with arriving(service.storage, key) as incoming:
        _check(await receive_form(request, incoming, part="data", limit=limit))
        stored = await to_thread.run_sync(incoming.keep)
    part = UploadPart(id=part_id, upload_id=upload_id, bytes=stored.bytes, sha256=stored.sha256, storage_key=key)
    return await to_thread.run_sync(_keep_part, service, part)


def _pending(service: Service, upload_id: str, caller: Caller) -> Upload:
    with service.database.reading() as session:
        _own(session, upload_id, caller)
        return uploads.require_pending(session, upload_id)


def _part_limit(upload: Upload) -> Limit:
    whole = TooLarge(
        f"The part is larger than the whole upload, which was declared with {upload.bytes:,} bytes.", param="data"
    )
    part = TooLarge(f"The part is larger than {MAX_PART_BYTES:,} bytes; send smaller parts.", param="data")
    return min(Limit(upload.bytes, whole), Limit(MAX_PART_BYTES, part), key=lambda limit: limit.bytes)


def _check(form: Form) -> None:
    if form.filename is None:
        raise InvalidInput("Missing required parameter: 'data'.", code="missing_required_parameter", param="data")
    if form.fields:
        name = min(form.fields)
        raise InvalidInput(f"Unknown parameter: '{name}'.", code="unknown_parameter", param=name)
    if form.bytes == 0:
        raise InvalidInput("The part is empty.", param="data")


def _keep_part(service: Service, part: UploadPart) -> dict[str, Any]:
    with service.database.writing() as session:
        with dropped_on_failure(service, part.storage_key):
            uploads.add_part(session, part, quota_bytes=service.settings.team_storage_bytes)
        session.commit()
        return {
            "id": part.id,
            "object": "upload.part",
            "upload_id": part.upload_id,
            "created_at": timestamp(part.created_at),
            "bytes": part.bytes,
            "sha256": part.sha256,
        }


@router.post("/{upload_id}/complete", response_model=UploadObject)
def complete_upload(upload_id: str, body: CompleteRequest, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """Put the parts together, in the order of `part_ids`. The file is then checked as any other.

    Their sizes must add up to the declared `bytes`. Completing again with the same request gives the same file,
    with an `Idempotency-Key` or without; with another one it is an error.
    """
    body.md5 = body.md5 and body.md5.lower()
    with service.database.reading() as session:
        _own(session, upload_id, caller)
        # Held, so that the parts do not go with another request between two looks.
        upload = session.get_one(Upload, upload_id, with_for_update=True, populate_existing=True)
        if uploads.is_completed_with(upload, body.part_ids, body.md5):
            return _render_completed(session, upload)
        uploads.require_pending(session, upload_id)
        parts = uploads.parts_in_order(session, upload, body.part_ids)
    try:
        file = _assemble(service, upload, parts, body.md5)
    except FileNotFoundError:  # the parts went with the upload: another request has just ended it
        return _ended_meanwhile(service, upload_id, body)
    return _complete(service, upload_id, body, file)


def _assemble(service: Service, upload: Upload, parts: list[UploadPart], md5: str | None) -> File:
    """The file's row, its content being in storage."""
    key = new_storage_key(upload.team_id)
    stored = uploads.assemble(service.storage, key, parts, md5)
    return File(
        team_id=upload.team_id,
        filename=upload.filename,
        purpose=upload.purpose,
        bytes=stored.bytes,
        sha256=stored.sha256,
        storage_key=key,
    )


def _ended_meanwhile(service: Service, upload_id: str, body: CompleteRequest) -> dict[str, Any]:
    with service.database.reading() as session:
        upload = session.get_one(Upload, upload_id)
        if uploads.is_completed_with(upload, body.part_ids, body.md5):
            return _render_completed(session, upload)
        uploads.require_pending(session, upload_id)
    raise Unavailable(f"The server's storage has lost a part of the upload {upload_id}.", hint="Send it again whole.")


def _complete(service: Service, upload_id: str, body: CompleteRequest, file: File) -> dict[str, Any]:
    """With `file`, or with that of a request which did the same meanwhile: of many at once, one makes the file."""
    with service.database.writing() as session:
        with dropped_on_failure(service, file.storage_key):
            upload = session.get_one(Upload, upload_id, with_for_update=True)
            if uploads.is_completed_with(upload, body.part_ids, body.md5):
                service.storage.delete(file.storage_key)
                return _render_completed(session, upload)
            uploads.require_pending(session, upload_id)
            part_keys = uploads.complete(session, upload, file, body.part_ids, body.md5)
            answer = _render(upload, file)
        session.commit()
        nudge("check_file")
    _delete(service, part_keys)
    return answer


@router.post("/{upload_id}/cancel", response_model=UploadObject)
def cancel_upload(upload_id: str, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """Give the upload up and delete its parts. Cancelling again changes nothing."""
    with service.database.writing() as session:
        upload = _own(session, upload_id, caller)
        part_keys = uploads.cancel(session, upload_id)
        session.commit()
        answer = _render(upload, None)
    _delete(service, part_keys)
    return answer


def _delete(service: Service, keys: list[str]) -> None:
    for key in keys:
        service.storage.delete(key)


def _render_completed(session: Session, upload: Upload) -> dict[str, Any]:
    return _render(upload, session.get(File, upload.file_id))


def _own(session: Session, upload_id: str, caller: Caller) -> Upload:
    return owned(session, Upload, upload_id, caller, what="upload", code="upload_not_found")
