"""What handlers ask for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from fastapi import Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from api.lanes import LaneBoard
from api.paces import PaceBoard
from api.prepared import PreparedJob
from api.readiness import Readiness
from core.config import Settings
from core.db import Database
from core.errors import InvalidInput, NotFound, PermissionDenied
from core.keys import Caller
from core.models import Job
from core.storage import Storage

Row = TypeVar("Row")
Item = TypeVar("Item")

#: A session where one is needed, opened then: most answers of a status need none.
OpenSession = Callable[[], AbstractContextManager[Session]]

_VERSION = ("id", "team_id", "kind", "version", "status", "not_before", "memory_bytes", "gpu_memory_bytes")


@dataclass(frozen=True)
class Service:
    """What the app was built with."""

    settings: Settings
    database: Database
    storage: Storage

    @cached_property
    def job_status(self) -> PreparedJob:
        """All of a job but its evaluation, which may be long."""
        names = [name for name in Job.__mapper__.column_attrs.keys() if name != "evaluation"]  # noqa: SIM118 - no dict
        return PreparedJob(self.database.engine, names)

    @cached_property
    def job_version(self) -> PreparedJob:
        """As much of a job as tells whether it has changed."""
        return PreparedJob(self.database.engine, _VERSION)

    @cached_property
    def lanes(self) -> LaneBoard:
        return LaneBoard(stale_worker_seconds=self.settings.lease_seconds)

    @cached_property
    def readiness(self) -> Readiness:
        return Readiness(self.database, self.settings)

    @cached_property
    def paces(self) -> PaceBoard:
        return PaceBoard()


# These are `async` although they wait for nothing: a plain function would cost each request a hop to a thread.
async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


async def _admin(request: Request) -> Caller:
    caller = await _caller(request)
    if not caller.is_admin:
        raise PermissionDenied("This needs an admin's key; make one with: shadowft keys create --admin")
    return caller


ServiceDep = Annotated[Service, Depends(_service)]
CallerDep = Annotated[Caller, Depends(_caller)]
AdminDep = Annotated[Caller, Depends(_admin)]

After = Annotated[str | None, Query(min_length=1, description="The id of the last item of the page before.")]


class StrictModel(BaseModel):
    """A request's body: no unknown field, no value of another type taken for the right one."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Page(BaseModel, Generic[Item]):
    """A page of a list. Ask for the next one with `after` = `last_id` while `has_more`."""

    object: Literal["list"] = Field("list", description="Always `list`.")
    data: list[Item] = Field(description="The items.")
    has_more: bool = Field(description="Whether there are more after the last one.")
    first_id: str | None = Field(description="The first item's. Null: the page is empty.")
    last_id: str | None = Field(description="The last item's. Null: the page is empty.")


def json_answer(value: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    """An answer that is known to be right: encoded as it is, without a check against the route's model."""
    return Response(msgspec.json.encode(value), media_type="application/json", headers=headers)


def page(items: list[Any], limit: int) -> dict[str, Any]:
    """A page from `limit + 1` rendered items, the last of which only tells whether there are more."""
    shown = items[:limit]
    return {
        "object": "list",
        "data": shown,
        "has_more": len(items) > limit,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
    }


def owned(
    session: Session, table: type[Row], item_id: str, caller: Caller, *, what: str, code: str, held: bool = False
) -> Row:
    """The caller's row; where it is to be `held`, nobody else changes it until the transaction ends. Another team's is
    as absent as one that never was."""
    row = session.get(table, item_id, with_for_update=held or None)
    if row is None or row.team_id != caller.team_id:  # type: ignore[attr-defined]  # every owned table has one
        raise no_such(item_id, what=what, code=code)
    return row


def no_such(item_id: str, *, what: str, code: str) -> NotFound:
    return NotFound(f"No such {what}: {item_id[:100]!r}.", code=code)


def cursor(
    session: Session, table: type[Row], item_id: str | None, caller: Caller, *filters: ColumnElement[bool]
) -> Row | None:
    """The row that `after` names, of a list with these filters; an unknown one is an error, not an empty page."""
    if item_id is None:
        return None
    named = (table.id == item_id, table.team_id == caller.team_id)  # type: ignore[attr-defined]  # as above
    row = session.scalar(select(table).where(*named, *filters))
    if row is None:
        raise InvalidInput(f"The cursor 'after' names nothing in this list: {item_id[:100]!r}.", param="after")
    return row


def at_hand(session: Session) -> OpenSession:
    """For whoever has one open already."""
    return lambda: nullcontext(session)


def timestamp(moment: Any) -> int | None:
    """Unix seconds, as the contract wants them."""
    return None if moment is None else int(moment.timestamp())
