"""A job's events: in pages, or as a stream."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.deps import After, CallerDep, Page, ServiceDep, json_answer, page
from api.event_stream import EventStream, render
from api.routes.jobs import own_job
from api.strict_json import StrictRoute
from core.errors import InvalidInput
from core.jobs import TERMINAL
from core.keys import Caller
from core.models import Job, JobEvent

router = APIRouter(prefix="/fine_tuning/jobs/{job_id}/events", tags=["Fine-tuning jobs"], route_class=StrictRoute)

DEFAULT_LIMIT = 20


class EventObject(BaseModel):
    """Something that happened to a job."""

    id: str = Field(description="`ftevent-…`; a stream can be taken up after it.")
    object: Literal["fine_tuning.job.event"] = Field(
        "fine_tuning.job.event", description="Always `fine_tuning.job.event`."
    )
    created_at: int = Field(description="Unix seconds.")
    level: Literal["info", "warn", "error"] = Field(description="`error` stands in the last event of a failed job.")
    type: Literal["message", "metrics"] = Field(description="`metrics`: a step's numbers, in `data`.")
    message: str = Field(description="In words: `Step 3/120: training loss=1.31`.")
    data: dict[str, Any] | None = Field(
        description="Of metrics: `step`, `total_steps`, `train_loss`, `valid_loss` and more. Null: nothing to add."
    )


_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "text/event-stream": {
                "example": 'id: ftevent-01k9\ndata: {"object": "fine_tuning.job.event", "message": "…"}\n\n',
            }
        }
    },
    204: {"description": "A stream that is taken up after the job's last event: there is nothing more to come."},
}


@router.get("", response_model=Page[EventObject], responses=_RESPONSES)
def list_events(
    job_id: str,
    request: Request,
    caller: CallerDep,
    service: ServiceDep,
    after: After = None,
    limit: Annotated[int | None, Query(ge=1, le=1000, description=f"Null: {DEFAULT_LIMIT}.")] = None,
    stream: Annotated[
        bool,
        Query(
            description="Send every event, the oldest first, as Server-Sent Events while they happen; the stream ends "
            "with `[DONE]` after the job's last one, and without it where the key is revoked or the server ends."
        ),
    ] = False,
    last_event_id: Annotated[
        str | None,
        Header(alias="Last-Event-ID", description="Take a stream up after this event. An `EventSource` sends it."),
    ] = None,
) -> Response:
    """What happened to the job: in pages, newest first, or with `stream=true` as it happens."""
    with service.database.reading() as session:
        job = own_job(session, job_id, caller)
        if stream:
            _refuse_pages(after, limit)
            return _stream(request, job, _position(session, job, last_event_id), caller)
        limit = limit or DEFAULT_LIMIT
        query = select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq.desc()).limit(limit + 1)
        if after is not None:
            query = query.where(JobEvent.seq < _seq(session, job_id, after, "after"))
        return json_answer(page([render(event) for event in session.scalars(query)], limit))


def _stream(request: Request, job: Job, position: int, caller: Caller) -> Response:
    if position and position == job.event_count and job.status in TERMINAL:
        return Response(status_code=204)  # at which an `EventSource` stops asking
    return EventStream(request.app.state.feed, job, position, caller)


def _refuse_pages(after: str | None, limit: int | None) -> None:
    for name, value in (("after", after), ("limit", limit)):
        if value is not None:
            raise InvalidInput(
                f"A stream has no pages; leave out '{name}', and take it up again with the header Last-Event-ID.",
                param=name,
            )


def _position(session: Session, job: Job, last_event_id: str | None) -> int:
    return 0 if last_event_id is None else _seq(session, job.id, last_event_id, "Last-Event-ID")


def _seq(session: Session, job_id: str, event_id: str, param: str) -> int:
    event = session.get(JobEvent, event_id)
    if event is None or event.job_id != job_id:
        raise InvalidInput(f"The cursor '{param}' names no event of this job: {event_id[:100]!r}.", param=param)
    return event.seq
