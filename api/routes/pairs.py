"""Model pairs: which base belongs to which instruct model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from api.deps import AdminDep, After, CallerDep, Page, ServiceDep, StrictModel, page, timestamp
from api.strict_json import StrictRoute
from core.errors import InvalidInput
from core.pairs import KnownPair, known_pairs, model_source, register

router = APIRouter(prefix="/pairs", tags=["Pairs"], route_class=StrictRoute)


class PairRequest(StrictModel):
    """Hub repositories (`owner/name`), or absolute folders of the server under its model roots."""

    name: str = Field(min_length=1, max_length=64, examples=["acme-7b"])
    base: str = Field(min_length=1, max_length=1024, examples=["acme/acme-7b-base"])
    instruct: str = Field(min_length=1, max_length=1024, examples=["acme/acme-7b-instruct"])
    base_revision: str | None = Field(None, min_length=1, max_length=100)
    instruct_revision: str | None = Field(None, min_length=1, max_length=100)


class PairObject(BaseModel):
    id: str
    object: Literal["pair"] = "pair"
    name: str
    base: str
    instruct: str
    base_revision: str | None
    instruct_revision: str | None
    #: `catalogue`, or `registered` by an admin.
    origin: Literal["catalogue", "registered"]
    created_at: int | None


def _render(pair: KnownPair) -> dict[str, Any]:
    return {
        "id": pair.id,
        "object": "pair",
        "name": pair.source.name,
        "base": pair.source.base.location,
        "instruct": pair.source.instruct.location,
        "base_revision": pair.source.base.revision,
        "instruct_revision": pair.source.instruct.revision,
        "origin": "registered" if pair.created_at else "catalogue",
        "created_at": timestamp(pair.created_at),
    }


@router.get("", response_model=Page)
def list_pairs(
    _: CallerDep,
    service: ServiceDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 100,
    search: Annotated[str, Query(max_length=100, description="Part of a name or id.")] = "",
) -> dict[str, Any]:
    """The registered pairs, newest first, then the catalogue's."""
    with service.database.reading() as session:
        pairs = [_render(pair) for pair in known_pairs(session)]
    found = [pair for pair in pairs if search.lower() in f"{pair['name']} {pair['base']} {pair['instruct']}".lower()]
    start = _position(found, after) + 1 if after else 0
    return page(found[start : start + limit + 1], limit)


def _position(pairs: list[dict[str, Any]], pair_id: str) -> int:
    for position, pair in enumerate(pairs):
        if pair["id"] == pair_id:
            return position
    raise InvalidInput(f"The cursor 'after' names nothing in this list: {pair_id[:100]!r}.", param="after")


@router.post("", response_model=PairObject)
def create_pair(body: PairRequest, _: AdminDep, service: ServiceDep) -> dict[str, Any]:
    """Register a pair (admin). Local folders must fit each other by their headers, or the answer lists every reason."""
    with service.database.writing() as session:
        pair = register(
            session,
            name=body.name,
            base=model_source(body.base, body.base_revision),
            instruct=model_source(body.instruct, body.instruct_revision),
            roots=service.settings.model_roots,
        )
        session.commit()
    return _render(pair)
