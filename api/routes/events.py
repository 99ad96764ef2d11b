"""A job's events."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.deps import After, CallerDep, Page, ServiceDep, page, timestamp
from api.routes.jobs import own_job
from core.errors import InvalidInput
from core.models import JobEvent

router = APIRouter(prefix="/fine_tuning/jobs/{job_id}/events", tags=["Fine-tuning jobs"])


@router.get("", response_model=Page)
def list_events(
    job_id: str,
    caller: CallerDep,
    service: ServiceDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> dict[str, Any]:
    """What happened to the job, newest first."""
    with service.database.reading() as session:
        own_job(session, job_id, caller)
        query = select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq.desc()).limit(limit + 1)
        if after is not None:
            query = query.where(JobEvent.seq < _seq(session, job_id, after))
        return page([_render(event) for event in session.scalars(query)], limit)


def _seq(session: Session, job_id: str, event_id: str) -> int:
    event = session.get(JobEvent, event_id)
    if event is None or event.job_id != job_id:
        raise InvalidInput(f"The cursor 'after' names no event of this job: {event_id[:100]!r}.", param="after")
    return event.seq


def _render(event: JobEvent) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": timestamp(event.created_at),
        "level": event.level,
        "type": event.type,
        "message": event.message,
        "data": event.data,
    }
