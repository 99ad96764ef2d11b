"""Cheap answers to clients that ask again and again how a job stands.

What a status costs is a thread, one select and little else: the select is made once, it is read without the ORM, and
the row is compared with the client's tag before anything is rendered.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from sqlalchemy.orm import defer
from starlette.types import ASGIApp, Receive, Scope, Send

from api.deps import OpenSession, Service, json_answer
from api.errors import error_response
from api.strict_json import refuse_unknown
from api.threads import Threads
from core.errors import NotFound, ShadowError
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


#: Each holds a connection to the database while it reads.
_threads = Threads(4)


@dataclass(frozen=True)
class Polled:
    """A route for one job by its id."""

    #: As the OpenAPI page writes it; the metrics' name for it.
    path: str
    answer: Callable[[str, Request], Response]


class Polls:
    """In front of the routes: what clients poll goes straight to its handler. The handlers are routes of FastAPI too,
    and so stand on the page of the routes, but its way to a handler takes longer than the handler does."""

    def __init__(self, app: ASGIApp, polled: Sequence[Polled]) -> None:
        self._app = app
        self._polled = {one.path.rpartition("/")[0]: one for one in polled}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        folder, _, job_id = scope.get("path", "").rpartition("/")
        polled = self._polled.get(folder)
        if polled is None or not job_id or scope.get("method") not in {"GET", "HEAD"}:
            await self._app(scope, receive, send)
            return
        scope["route"] = polled
        try:
            answer = await _threads.run(polled.answer, job_id, Request(scope))
        except ShadowError as error:
            answer = error_response(error)
        await answer(scope, receive, send)


def answer_poll(
    request: Request,
    job_id: str,
    *,
    is_shown: Callable[[Job], bool],
    absent: Callable[[], NotFound],
    render: Callable[[OpenSession, Job, Service], dict[str, Any]],
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
    shown = render(service.database.reading, job, service)
    return json_answer(shown, {"etag": _etag(job, shown["waiting_for"])})


def _etag(job: Job, waiting: str | None) -> str:
    """Weak: the seconds that a job is still expected to take go on between two changes of its row."""
    return f'W/"{VERSION}-{job.id[6:]}-{job.version}-{zlib.crc32((waiting or "").encode()):x}"'


def _has(seen: str, etag: str) -> bool:
    """Whether `If-None-Match` names it; weak and strong tags compare alike."""
    return seen.strip() == "*" or etag.removeprefix("W/") in (tag.strip().removeprefix("W/") for tag in seen.split(","))
