"""Model pairs: which base belongs to which instruct model, and what is known about them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from api.deps import AdminDep, After, CallerDep, Page, ServiceDep, StrictModel, json_answer, page, timestamp
from api.strict_json import StrictRoute
from core.catalogue import CataloguePair, CautionKind, Claim, Source
from core.errors import InvalidInput
from core.pairs import KnownPair, checked_pair, get_pair, known_pairs, model_source, register, remove

router = APIRouter(prefix="/pairs", tags=["Pairs"], route_class=StrictRoute)


class PairRequest(StrictModel):
    """Hub repositories (`owner/name`), or absolute folders of the server under its model roots."""

    name: str = Field(min_length=1, max_length=64, description="What jobs call it.", examples=["acme-7b"])
    base: str = Field(
        min_length=1, max_length=1024, description="The model that is tuned.", examples=["acme/acme-7b-base"]
    )
    instruct: str = Field(
        min_length=1,
        max_length=1024,
        description="The model onto which the change is grafted.",
        examples=["acme/acme-7b-instruct"],
    )
    base_revision: str | None = Field(
        None, min_length=1, max_length=100, description="A branch, tag or commit of the Hub. Null: its default branch."
    )
    instruct_revision: str | None = Field(
        None, min_length=1, max_length=100, description="A branch, tag or commit of the Hub. Null: its default branch."
    )


class ClaimObject(BaseModel):
    """Something that the catalogue says of a pair."""

    text: str = Field(description="In words.")
    source: Source = Field(
        description="`verified`: looked up, at the place that `seen` names. `memory`: not looked up."
    )
    seen: str | None = Field(description="Where it was looked up. Null: it was not.")


class CautionObject(ClaimObject):
    kind: CautionKind = Field(description="What it is about; stable, programs may test for it.")


class PairObject(BaseModel):
    """Two models of one lineage: `base` is tuned, and the change is grafted onto `instruct`."""

    id: str = Field(description="`pair-…`")
    object: Literal["pair"] = Field("pair", description="Always `pair`.")
    name: str = Field(description="What jobs call it.")
    base: str = Field(description="A Hub repository, or a folder of the server.")
    instruct: str = Field(description="A Hub repository, or a folder of the server.")
    base_revision: str | None = Field(
        description="A branch, tag or commit of the Hub. Null: a folder, or the repository's default branch."
    )
    instruct_revision: str | None = Field(
        description="A branch, tag or commit of the Hub. Null: a folder, or the repository's default branch."
    )
    origin: Literal["catalogue", "registered"] = Field(description="`registered`: by an admin of this deployment.")
    created_at: int | None = Field(description="Unix seconds. Null: it came with the catalogue.")
    family: str | None = Field(description="Of the catalogue's models. Null: a registered pair.")
    ids: ClaimObject | None = Field(
        description="That the two models exist and belong together. Null: a registered pair."
    )
    licence: ClaimObject | None = Field(description="The models' licence. Null: a registered pair.")
    gated: ClaimObject | None = Field(description="What to do to be let in. Null: not known to be gated.")
    cautions: list[CautionObject] = Field(description="What to know before tuning it. Empty: nothing is known.")


class DeletedPair(BaseModel):
    id: str = Field(description="The pair that was.")
    object: Literal["pair"] = Field("pair", description="Always `pair`.")
    deleted: Literal[True] = Field(True, description="Always true.")


@router.get("", response_model=Page[PairObject])
def list_pairs(
    _: CallerDep,
    service: ServiceDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 100,
    search: Annotated[str, Query(max_length=100, description="Part of a name, id, family or licence.")] = "",
) -> Response:
    """The registered pairs, newest first, then the catalogue's."""
    with service.database.reading() as session:
        found = [pair for pair in known_pairs(session) if search.casefold() in _searched(pair)]
    start = _position(found, after) + 1 if after else 0
    return json_answer(page([_render(pair) for pair in found[start : start + limit + 1]], limit))


def _searched(pair: KnownPair) -> str:
    about = [pair.about.family, pair.about.licence.text] if pair.about else []
    source = pair.source
    return "\n".join((pair.id, source.name, source.base.location, source.instruct.location, *about)).casefold()


def _position(pairs: list[KnownPair], pair_id: str) -> int:
    for position, pair in enumerate(pairs):
        if pair.id == pair_id:
            return position
    raise InvalidInput(f"The cursor 'after' names nothing in this list: {pair_id[:100]!r}.", param="after")


@router.get("/{pair_id:path}", response_model=PairObject)
def retrieve_pair(pair_id: str, _: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """One pair, by its id or its name."""
    with service.database.reading() as session:
        return _render(get_pair(session, pair_id))


@router.post("", response_model=PairObject)
def create_pair(body: PairRequest, _: AdminDep, service: ServiceDep) -> dict[str, Any]:
    """Register a pair (admin). Local folders must fit each other by their headers, or the answer lists every reason."""
    checked = checked_pair(
        name=body.name,
        base=model_source(body.base, body.base_revision),
        instruct=model_source(body.instruct, body.instruct_revision),
        roots=service.settings.model_roots,
    )
    with service.database.writing() as session:
        pair = register(session, checked)
        session.commit()
    return _render(pair)


@router.delete("/{pair_id:path}", response_model=DeletedPair)
def delete_pair(pair_id: str, _: AdminDep, service: ServiceDep) -> dict[str, Any]:
    """Forget a registered pair, by its id or its name (admin). Jobs that were created with it go on."""
    with service.database.writing() as session:
        pair = remove(session, pair_id)
        session.commit()
    return {"id": pair.id}


def _render(pair: KnownPair) -> dict[str, Any]:
    return {
        "id": pair.id,
        "object": "pair",
        "name": pair.source.name,
        "base": pair.source.base.location,
        "instruct": pair.source.instruct.location,
        "base_revision": pair.source.base.revision,
        "instruct_revision": pair.source.instruct.revision,
        "origin": "catalogue" if pair.about else "registered",
        "created_at": timestamp(pair.created_at),
        **_known(pair.about),
    }


def _known(about: CataloguePair | None) -> dict[str, Any]:
    if about is None:
        return {"family": None, "ids": None, "licence": None, "gated": None, "cautions": []}
    return {
        "family": about.family,
        "ids": _claim(about.ids),
        "licence": _claim(about.licence),
        "gated": _claim(about.gated) if about.gated else None,
        "cautions": [{"kind": caution.kind, **_claim(caution)} for caution in about.cautions],
    }


def _claim(claim: Claim) -> dict[str, Any]:
    return {"text": claim.text, "source": claim.source, "seen": claim.seen}
