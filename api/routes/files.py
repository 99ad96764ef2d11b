"""Files: upload, list, retrieve, content, delete, and what the check found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.deps import After, CallerDep, Page, Service, ServiceDep, cursor, json_answer, owned, page, timestamp
from api.download import DOWNLOADS, WantedDep, download
from api.multipart import Form, Limit, arriving, receive_form
from api.strict_json import StrictRoute
from core import files
from core.broker import nudge
from core.errors import Conflict, InvalidInput, TooLarge
from core.ids import new_id
from core.keys import Caller
from core.models import File

router = APIRouter(prefix="/files", tags=["Files"], route_class=StrictRoute)

#: What clients may upload; `fine-tune-results` is made by jobs.
PURPOSES = ("fine-tune", "evals", "user_data")

#: A file that expires lives for an hour at least and for thirty days at most.
MIN_LIFETIME_SECONDS = 3600
MAX_LIFETIME_SECONDS = 30 * 24 * 3600

_EXAMPLE: dict[str, JsonValue] = {
    "id": "file-01kqp3v9w8d6m4t2s0x7z5y1ab",
    "object": "file",
    "bytes": 120_000,
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "created_at": 1_790_000_000,
    "expires_at": None,
    "filename": "support.jsonl",
    "purpose": "fine-tune",
    "status": "processed",
    "status_details": None,
    "validation": {"ok": True, "rows": 500},
}


class FileObject(BaseModel):
    """An uploaded file. `status` goes from `uploaded` to `processed`, or to `error` with the reason in
    `status_details`."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [_EXAMPLE]})

    id: str = Field(description="`file-…`")
    object: Literal["file"] = Field("file", description="Always `file`.")
    bytes: int = Field(description="Its size.")
    sha256: str = Field(description="Of its bytes, in hexadecimal.")
    created_at: int = Field(description="Unix seconds.")
    expires_at: int | None = Field(
        description="Unix seconds: when it is deleted, unless a live job reads it then. Null: never."
    )
    filename: str = Field(description="A label only; several files may have the same.")
    purpose: Literal["fine-tune", "evals", "user_data", "fine-tune-results"] = Field(
        description="As the upload named it; `fine-tune-results` are the metrics that a job made."
    )
    status: Literal["uploaded", "processed", "error"] = Field(
        description="`uploaded`: not checked yet. `processed`: a job can use it. `error`: none can."
    )
    status_details: str | None = Field(description="Why the status is `error`. Null: it is not.")
    validation: dict[str, Any] | None = Field(
        description="What the check found: rows, format, warnings; `GET /v1/files/{file_id}/report` shows the same. "
        "Null: not checked yet."
    )


class DeletedFile(BaseModel):
    id: str = Field(description="The file that was.")
    object: Literal["file"] = Field("file", description="Always `file`.")
    deleted: bool = Field(description="Always true.")


def render(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "sha256": file.sha256,
        "created_at": timestamp(file.created_at),
        "expires_at": timestamp(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
        "status_details": file.status_details,
        "validation": file.report,
    }


_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "JSONL, or a JSON array."},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": MIN_LIFETIME_SECONDS,
                            "maximum": MAX_LIFETIME_SECONDS,
                            "description": "The file is deleted so long after its creation; without it, never.",
                        },
                    },
                }
            }
        },
    }
}


@router.post("", response_model=FileObject, openapi_extra=_FORM)
async def create_file(request: Request, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """Upload a dataset.

    Rows may be OpenAI chat (`messages`), `prompt`/`completion`, Alpaca (`instruction`, `input`, `output`) or ShareGPT
    (`conversations`), as JSONL or one JSON array. The rows are checked right after the upload. A file that is larger
    than this route takes goes up by parts: `POST /v1/uploads`.

    No `Idempotency-Key` is read here: a file that is sent again, because its answer was lost, is a second file, which
    does nothing but take room until it is deleted. `POST /v1/uploads` reads one.
    """
    most = service.settings.max_file_bytes
    refusal = TooLarge(
        f"The file is larger than {most:,} bytes, the limit of this route.",
        hint="Send it by parts: POST /v1/uploads, or client.uploads.upload_file_chunked.",
        param="file",
    )
    limit = await limit_within_quota(Limit(most, refusal), caller, service)
    limit.check(request.headers)
    key = new_storage_key(caller.team_id)
    async with arriving(service.storage, key) as incoming:
        form = await receive_form(request, incoming, part="file", limit=limit)
        purpose, lifetime = _purpose(form), _lifetime(form)
        stored = await to_thread.run_sync(incoming.keep)
    row = File(
        team_id=caller.team_id,
        filename=form.filename,
        purpose=purpose,
        bytes=stored.bytes,
        sha256=stored.sha256,
        storage_key=key,
    )
    return await to_thread.run_sync(_keep, service, row, lifetime)


def new_storage_key(team_id: str) -> str:
    return new_id(f"files/{team_id}/")


async def limit_within_quota(own: Limit, caller: Caller, service: Service) -> Limit:
    """The route's own limit, or what the team's quota still has room for where that is less."""
    quota = service.settings.team_storage_bytes
    if quota is None:
        return own

    def used_bytes() -> int:
        with service.database.reading() as session:
            return files.used_bytes(session, caller.team_id)

    used = await to_thread.run_sync(used_bytes)
    return min(own, Limit(max(0, quota - used), files.over_quota(used, quota)), key=lambda limit: limit.bytes)


def _purpose(form: Form) -> str:
    if form.filename is None:
        raise InvalidInput("Missing required parameter: 'file'.", code="missing_required_parameter", param="file")
    unknown = form.fields.keys() - {"purpose", "expires_after[anchor]", "expires_after[seconds]"}
    if unknown:
        name = min(unknown)
        raise InvalidInput(f"Unknown parameter: '{name}'.", code="unknown_parameter", param=name)
    if "purpose" not in form.fields:
        raise InvalidInput("Missing required parameter: 'purpose'.", code="missing_required_parameter", param="purpose")
    purpose = form.fields["purpose"]
    if purpose not in PURPOSES:
        raise InvalidInput(
            f"Invalid value for 'purpose': {purpose[:100]!r}; this server takes {', '.join(PURPOSES)}.", param="purpose"
        )
    if form.bytes == 0:
        raise InvalidInput("The file is empty.", code="invalid_training_file", param="file")
    return purpose


def _lifetime(form: Form) -> int | None:
    """Seconds from `expires_after`, whose two fields come together or not at all."""
    anchor, seconds = form.fields.get("expires_after[anchor]"), form.fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidInput(
            f"Invalid value for 'expires_after[anchor]': {(anchor or '')[:100]!r}; the only anchor is 'created_at'.",
            param="expires_after[anchor]",
        )
    digits = seconds or ""
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 10):
        digits = "0"
    if not MIN_LIFETIME_SECONDS <= int(digits) <= MAX_LIFETIME_SECONDS:
        raise InvalidInput(
            f"Invalid value for 'expires_after[seconds]': {(seconds or '')[:100]!r}; send a whole number from "
            f"{MIN_LIFETIME_SECONDS} to {MAX_LIFETIME_SECONDS}.",
            param="expires_after[seconds]",
        )
    return int(digits)


def _keep(service: Service, row: File, lifetime: int | None) -> dict[str, Any]:
    with service.database.writing() as session:
        with dropped_on_failure(service, row.storage_key):
            files.take_room(session, row.team_id, row.bytes, quota_bytes=service.settings.team_storage_bytes)
            files.add(session, row, lifetime_seconds=lifetime)
            answer = render(row)
        session.commit()
        nudge("check_file")
    return answer


@contextmanager
def dropped_on_failure(service: Service, key: str) -> Iterator[None]:
    """Delete the stored object where the block fails. A commit does not belong into it: one that fails may still have
    happened, and then the row needs its content; where it has not, a sweep finds the stray."""
    try:
        yield
    except BaseException:
        service.storage.delete(key)
        raise


@router.get("", response_model=Page[FileObject])
def list_files(
    caller: CallerDep,
    service: ServiceDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> Response:
    """List the team's files, newest first or, with `order=asc`, oldest first."""
    with service.database.reading() as session:
        filters = [File.team_id == caller.team_id, *([] if purpose is None else [File.purpose == purpose])]
        query = select(File).where(*filters).limit(limit + 1)
        query = query.order_by(File.id.desc() if order == "desc" else File.id)
        if (last := cursor(session, File, after, caller, *filters)) is not None:
            query = query.where(File.id < last.id if order == "desc" else File.id > last.id)
        return json_answer(page([render(file) for file in session.scalars(query)], limit))


@router.get("/{file_id}", response_model=FileObject)
def retrieve_file(file_id: str, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """One file's status."""
    with service.database.reading() as session:
        return render(_own(session, file_id, caller))


@router.get("/{file_id}/content", response_class=Response, responses=DOWNLOADS)
def file_content(file_id: str, caller: CallerDep, service: ServiceDep, wanted: WantedDep) -> Response:
    """The file's bytes as they were uploaded."""
    with service.database.reading() as session:
        file = _own(session, file_id, caller)
    return download(wanted, service.storage.path(file.storage_key), filename=file.filename, sha256=file.sha256)


router.add_api_route("/{file_id}/content", file_content, methods=["HEAD"], include_in_schema=False)


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
        # Held before its readers are looked for: a job that is being made holds its files, too.
        file = _own(session, file_id, caller, held=True)
        if (job_id := files.live_reader(session, file)) is not None:
            raise Conflict(
                f"The file {file_id} is in use by the job {job_id}; cancel the job first.", code="file_in_use"
            )
        session.delete(file)
        session.commit()
    service.storage.delete(file.storage_key)
    return {"id": file_id, "object": "file", "deleted": True}


def _own(session: Session, file_id: str, caller: Caller, *, held: bool = False) -> File:
    return owned(session, File, file_id, caller, what="file", code="file_not_found", held=held)
