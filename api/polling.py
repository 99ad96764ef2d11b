"""Cheap answers to clients that ask again and again how a job stands.

What a status costs is a thread, one select and little else: the select is made once, it is read without the ORM, and
the row is compared with the client's tag before anything is rendered.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from fastapi import Request, Response
from sqlalchemy.orm import Session, defer

from api.deps import Service, json_answer
from api.strict_json import refuse_unknown
from core.errors import NotFound
from core.jobs import waiting_for
from core.keys import Caller
from core.models import Job
from core.version import VERSION

#: For a query of jobs: what no status shows and may be long.
STATUS_ONLY = (defer(Job.evaluation),)

#: What a status route says of itself besides its answer.
POLLED: dict[int | str, dict[str, Any]] = {
    200: {
        "headers": {
            "ETag": {
                "description": "Send it back as `If-None-Match`: while nothing has changed the answer is a bare 304.",
                "schema": {"type": "string"},
            }
        }
    },
    304: {"description": "Nothing has changed since the answer with this ETag."},
}


def why_waiting(session: Session, job: Job, service: Service) -> str | None:
    return waiting_for(job, service.lanes.reader(lambda: nullcontext(session)))


def answer_poll(
    request: Request,
    job_id: str,
    *,
    is_shown: Callable[[Job], bool],
    absent: Callable[[], NotFound],
    render: Callable[[Session, Job, Service], dict[str, Any]],
) -> Response:
    """The caller's job as `render` shows it, or a 304 where the client has it already."""
    if request.scope["query_string"]:
        refuse_unknown(request, [])
    service: Service = request.app.state.service
    caller: Caller = request.state.caller

    def owned(job: Job | None) -> Job:
        if job is None or job.team_id != caller.team_id or not is_shown(job):
            raise absent()
        return job

    seen = request.headers.get("if-none-match")
    if seen is not None:
        job = owned(service.job_version.get(job_id))
        etag = _etag(job, waiting_for(job, service.lanes.reader(service.database.reading)))
        if _has(seen, etag):
            return Response(status_code=304, headers={"etag": etag})
    job = owned(service.job_status.get(job_id))
    with service.database.reading() as session:  # opens nothing unless `render` asks it
        shown = render(session, job, service)
    return json_answer(shown, {"etag": _etag(job, shown["waiting_for"])})


def _etag(job: Job, waiting: str | None) -> str:
    """Weak: the seconds that a job is still expected to take go on between two changes of its row."""
    return f'W/"{VERSION}-{job.id[6:]}-{job.version}-{zlib.crc32((waiting or "").encode()):x}"'


def _has(seen: str, etag: str) -> bool:
    """Whether `If-None-Match` names it; weak and strong tags compare alike."""
    return seen.strip() == "*" or etag.removeprefix("W/") in (tag.strip().removeprefix("W/") for tag in seen.split(","))
