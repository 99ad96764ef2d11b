"""Files: upload, list, retrieve, content, delete, and what the check found."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.requests import ClientDisconnect

from api.deps import After, CallerDep, Page, Service, ServiceDep, cursor, owned, page, timestamp
from api.multipart import Upload, UploadReader
from api.strict_json import StrictRoute
from core.broker import nudge
from core.errors import Conflict, InvalidInput
from core.ids import new_id
from core.jobs import TERMINAL
from core.keys import Caller
from core.models import File, Job

router = APIRouter(prefix="/files", tags=["Files"], route_class=StrictRoute)

#: What clients may upload; `fine-tune-results` is made by jobs.
PURPOSES = ("fine-tune", "evals", "user_data")


class FileObject(BaseModel):
    """An uploaded file. `status` goes from `uploaded` to `processed`, or to `error` with the reason in
    `status_details`."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["file"] = "file"
    bytes: int
    sha256: str
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    #: What the check found, once it is done: rows, format, warnings.
    validation: dict[str, Any] | None


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: bool


def render(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "sha256": file.sha256,
        "created_at": timestamp(file.created_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
        "status_details": file.status_details,
        "validation": file.report,
    }


_UPLOAD_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "JSONL, or a JSON array."},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                    },
                }
            }
        },
    }
}


@router.post("", response_model=FileObject, openapi_extra=_UPLOAD_SCHEMA)
async def create_file(request: Request, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """Upload a dataset.

    Rows may be OpenAI chat (`messages`), `prompt`/`completion`, Alpaca (`instruction`, `input`, `output`) or ShareGPT
    (`conversations`), as JSONL or one JSON array. The rows are checked right after the upload.
    """
    file_id = new_id("file-")
    key = f"files/{caller.team_id}/{file_id}"
    incoming = service.storage.receive(key)
    try:
        reader = UploadReader(
            request.headers.get("content-type", ""), incoming, max_bytes=service.settings.max_file_bytes
        )
        upload = await reader.read(_body(request))
        purpose = _purpose(upload)
    except BaseException:
        incoming.drop()
        raise
    stored = await to_thread.run_sync(incoming.keep)
    row = File(
        id=file_id,
        team_id=caller.team_id,
        filename=upload.filename,
        purpose=purpose,
        bytes=stored.bytes,
        sha256=stored.sha256,
        storage_key=key,
        status="uploaded",
    )
    return await to_thread.run_sync(_keep, service, row)


async def _body(request: Request) -> AsyncIterator[bytes]:
    try:
        async for piece in request.stream():
            yield piece
    except ClientDisconnect as error:
        raise InvalidInput("The upload ended before its last byte.", code="upload_cut") from error


def _purpose(upload: Upload) -> str:
    if upload.filename is None:
        raise InvalidInput("Missing required parameter: 'file'.", code="missing_required_parameter", param="file")
    unknown = upload.fields.keys() - {"purpose"}
    if unknown:
        name = min(unknown)
        raise InvalidInput(f"Unknown parameter: '{name}'.", code="unknown_parameter", param=name)
    if "purpose" not in upload.fields:
        raise InvalidInput("Missing required parameter: 'purpose'.", code="missing_required_parameter", param="purpose")
    purpose = upload.fields["purpose"]
    if purpose not in PURPOSES:
        raise InvalidInput(
            f"Invalid value for 'purpose': {purpose[:100]!r}; this server takes {', '.join(PURPOSES)}.", param="purpose"
        )
    if upload.bytes == 0:
        raise InvalidInput("The file is empty.", code="invalid_training_file", param="file")
    return purpose


def _keep(service: Service, row: File) -> dict[str, Any]:
    try:
        with service.database.writing() as session:
            session.add(row)
            session.commit()
            nudge("check_file")
            return render(row)
    except BaseException:
        service.storage.delete(row.storage_key)
        raise


@router.get("", response_model=Page)
def list_files(
    caller: CallerDep,
    service: ServiceDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """List the team's files."""
    with service.database.reading() as session:
        last = cursor(session, File, after, caller)
        query = select(File).where(File.team_id == caller.team_id).limit(limit + 1)
        query = query.order_by(File.id.desc() if order == "desc" else File.id)
        if purpose is not None:
            query = query.where(File.purpose == purpose)
        if last is not None:
            query = query.where(File.id < last.id if order == "desc" else File.id > last.id)
        return page([render(file) for file in session.scalars(query)], limit)


@router.get("/{file_id}", response_model=FileObject)
def retrieve_file(file_id: str, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """One file's status."""
    with service.database.reading() as session:
        return render(_own(session, file_id, caller))


@router.get("/{file_id}/content", response_class=FileResponse)
def file_content(file_id: str, caller: CallerDep, service: ServiceDep) -> FileResponse:
    """The file's bytes as they were uploaded. `Range` is understood."""
    with service.database.reading() as session:
        file = _own(session, file_id, caller)
    return FileResponse(
        service.storage.path(file.storage_key),
        media_type="application/octet-stream",
        filename=file.filename,
        headers={"etag": f'"{file.sha256}"'},
    )


@router.get("/{file_id}/report")
def file_report(file_id: str, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """What the check found, row by row. While the file is still `uploaded` there is none yet."""
    with service.database.reading() as session:
        file = _own(session, file_id, caller)
    if file.report is None:
        raise Conflict(f"The file {file_id} has no report: its status is '{file.status}'.", code="report_not_ready")
    return file.report


@router.delete("/{file_id}", response_model=DeletedFile)
def delete_file(file_id: str, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """Delete a file, unless a live job still reads it."""
    with service.database.writing() as session:
        file = _own(session, file_id, caller)
        _refuse_if_in_use(session, file_id)
        session.delete(file)
        session.commit()
    service.storage.delete(file.storage_key)
    return {"id": file_id, "object": "file", "deleted": True}


def _own(session: Session, file_id: str, caller: Caller) -> File:
    return owned(session, File, file_id, caller, what="file", code="file_not_found")


def _refuse_if_in_use(session: Session, file_id: str) -> None:
    live = session.scalars(select(Job).where(Job.status.not_in(TERMINAL)))
    for job in live:
        if file_id in job.files.values():
            raise Conflict(
                f"The file {file_id} is in use by the job {job.id}; cancel the job first.", code="file_in_use"
            )
