"""Checks of pairs: what is wrong or remarkable about a pair, before any GPU time."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.orm import Session

from api.deps import CallerDep, ServiceDep, StrictModel, owned, timestamp
from api.routes.jobs import JobError
from api.strict_json import StrictRoute
from core.broker import nudge
from core.config import Settings
from core.db import db_now
from core.errors import PermissionDenied, Unavailable
from core.hub import pin
from core.ids import new_id
from core.job_spec import ModelSource
from core.models import PairCheck
from core.pair_checks import require_room
from core.pairs import checked_source, find_pair, model_source
from core.verdict import Finding, FirstStage, examine, staged, verdict_of

router = APIRouter(prefix="/pairs/check", tags=["Pairs"], route_class=StrictRoute)

#: Requests that read headers at the same time; a slow Hub must not take all of this process's threads. The worker reads
#: for those beyond.
READING_AT_ONCE = 4
#: What only the worker can judge: it alone has the token for gated and private models.
_NEEDS_TOKEN = frozenset({"gated_model", "model_not_found"})

_reading = threading.BoundedSemaphore(READING_AT_ONCE)


class PairCheckRequest(StrictModel):
    """A known pair by its name, or, with an admin's key, two models: Hub repositories (`owner/name`), or absolute
    folders of the server under its model roots."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"pair": "qwen3-0.6b"},
                {"base": "acme/acme-7b-base", "instruct": "acme/acme-7b-instruct", "depth": "headers"},
            ]
        }
    )

    pair: str | None = Field(
        None, min_length=1, max_length=256, description="A pair's name, or one of its models' ids."
    )
    base: str | None = Field(None, min_length=1, max_length=1024, description="The model that is tuned.")
    instruct: str | None = Field(
        None, min_length=1, max_length=1024, description="The model onto which the change is grafted."
    )
    base_revision: str | None = Field(
        None, min_length=1, max_length=100, description="A branch, tag or commit of the Hub. Null: its default branch."
    )
    instruct_revision: str | None = Field(
        None, min_length=1, max_length=100, description="A branch, tag or commit of the Hub. Null: its default branch."
    )
    depth: Literal["full", "headers"] = Field(
        "full",
        description="`headers`: configs and the headers of the weight files, answered at once. `full`: tokenizers, "
        "chat template and, where the weights are on the worker's machine, their distance as well.",
    )

    @model_validator(mode="after")
    def _either_a_pair_or_two_models(self) -> PairCheckRequest:
        models = self.model_fields_set & {"base", "instruct", "base_revision", "instruct_revision"}
        if self.pair is not None and models:
            raise ValueError(f"a known pair takes no {min(models)}; name the pair, or base and instruct")
        if self.pair is None and (self.base is None or self.instruct is None):
            raise ValueError("name a known pair, or both base and instruct")
        return self


class FindingObject(BaseModel):
    """One thing that a check found."""

    stage: Literal["headers", "files"] = Field(
        description="`headers`: found in configs and headers; `files`: in tokenizers and weights."
    )
    level: Literal["note", "warn", "refuse"] = Field(description="A note asks for nothing.")
    code: str = Field(description="Stable; programs may test for it.")
    message: str = Field(description="A sentence that names the values found.")
    remedy: str = Field(description="What to do about it; empty where there is nothing to do.")


class PairCheckObject(BaseModel):
    """A check of a pair. Poll it until its `status` is `completed` or `failed`.

    The verdict is `refuse` where a finding makes a training impossible or worthless: a job with such a pair fails in
    its admission with `pair_refused`. `warn` is worth reading before a training; `ok` is neither.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "pchk_01k9zq4",
                "object": "pair.check",
                "pair": "qwen3-4b-2507",
                "base": "Qwen/Qwen3-4B-Base",
                "instruct": "Qwen/Qwen3-4B-Instruct-2507",
                "base_revision": "906bfd4b4dc7f14ee4320094d8b41684abff8539",
                "instruct_revision": "cdbee75f17c01a7cc42f958dc650907174af0554",
                "depth": "full",
                "status": "queued",
                "verdict": "warn",
                "findings": [
                    {
                        "stage": "headers",
                        "level": "warn",
                        "code": "other_rope",
                        "message": "Positions are encoded otherwise: rope_theta is 1000000 in base and 5000000 in "
                        "instruct.",
                        "remedy": "Look at the evaluation before relying on the graft, above all for long texts.",
                    }
                ],
                "similarity": None,
                "error": None,
                "created_at": 1763710000,
                "finished_at": None,
            }
        }
    )

    id: str = Field(description="`pchk_…`")
    object: Literal["pair.check"] = Field("pair.check", description="Always `pair.check`.")
    pair: str | None = Field(description="The pair's name. Null: two models were named instead.")
    base: str = Field(description="A Hub repository, or a folder of the server.")
    instruct: str = Field(description="A Hub repository, or a folder of the server.")
    base_revision: str | None = Field(description="The commit that is checked. Null: a folder, or not yet known.")
    instruct_revision: str | None = Field(description="The commit that is checked. Null: a folder, or not yet known.")
    depth: Literal["full", "headers"] = Field(description="As asked for.")
    status: Literal["queued", "running", "completed", "failed"] = Field(
        description="`failed` means that the check could not be done, not that the pair is bad."
    )
    verdict: Literal["ok", "warn", "refuse"] = Field(description="Of the findings so far.")
    findings: list[FindingObject] = Field(description="Until the check is completed, those of the first stage.")
    similarity: dict[str, Any] | None = Field(
        description="The distance of the two models (sigma, 0 to 1): `sigma_mean` as in the paper, `sigma_ratio` of "
        "all weights, by `layers` and by `modules`. Null: not measured; a finding says why."
    )
    error: JobError | None = Field(description="Why the check failed. Null: it has not failed.")
    created_at: int = Field(description="Unix seconds.")
    finished_at: int | None = Field(description="Unix seconds. Null: it has not ended.")


@router.post("", response_model=PairCheckObject)
def create_check(body: PairCheckRequest, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """Check a pair. What configs and headers tell is in the answer; a light worker does the rest.

    A check is `completed` at once where only headers were asked for, or where they refuse the pair. A model that this
    server cannot read just now (gated, private, or the Hub does not answer) is left to the worker, which holds the
    Hub's token and tries several times.

    Twenty checks of a team may wait at once; one more is answered with 429. Ended ones are kept for thirty days, the
    newest thousand of each team.
    """
    if body.pair is None and not caller.is_admin:
        raise _for_admins()
    with service.database.reading() as session:
        name, base, instruct = _models(session, body)
        require_room(session, caller.team_id)
    roots = service.settings.model_roots
    base = checked_source(base, roots, param="base")
    instruct = checked_source(instruct, roots, param="instruct")
    read = _first_stage(base, instruct, service.settings)
    first = _unread(base, instruct, read) if isinstance(read, str) else read
    is_done = read is first and (body.depth == "headers" or verdict_of(first.findings) == "refuse")
    row = _new_check(first, pair=name, depth=body.depth, team_id=caller.team_id, is_done=is_done)
    with service.database.writing() as session:
        session.add(row)
        session.commit()
        if not is_done:
            nudge("check_pair")
        return _render(row)


@router.get("/{check_id}", response_model=PairCheckObject)
def retrieve_check(check_id: str, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """One check of the team."""
    with service.database.reading() as session:
        return _render(owned(session, PairCheck, check_id, caller, what="pair check", code="pair_check_not_found"))


def _for_admins() -> PermissionDenied:
    """The answer tells what stands in the configs of any repository that the deployment's token opens."""
    return PermissionDenied(
        "Two models that are no known pair can be checked with an admin's key only.",
        param="base",
        hint="Name a pair of GET /v1/pairs, or ask an admin to register these two.",
    )


def _models(session: Session, body: PairCheckRequest) -> tuple[str | None, ModelSource, ModelSource]:
    if body.pair is not None:
        pair = find_pair(session, body.pair)
        return pair.name, pair.base, pair.instruct
    return (
        None,
        model_source(str(body.base), body.base_revision),
        model_source(str(body.instruct), body.instruct_revision),
    )


def _first_stage(base: ModelSource, instruct: ModelSource, settings: Settings) -> FirstStage | str:
    """The first stage, or why it is left to the worker."""
    if not _reading.acquire(blocking=False):
        return "this server is reading other models just now"
    try:
        first = _examine(base, instruct, settings.model_cache_dir)
    except Unavailable as error:
        return error.message
    finally:
        _reading.release()
    return next((finding.message for finding in first.findings if finding.code in _NEEDS_TOKEN), first)


def _examine(base: ModelSource, instruct: ModelSource, cache: Path) -> FirstStage:
    return examine(base, instruct, settle=lambda source: pin(source, cache), cache=cache)


def _unread(base: ModelSource, instruct: ModelSource, why: str) -> FirstStage:
    note = Finding(
        "note",
        "left_to_the_worker",
        f"The models' headers were not read at once ({why.rstrip('.')}); the worker reads them.",
        "Poll this check.",
    )
    return FirstStage(base, instruct, {}, (note,))


def _new_check(first: FirstStage, *, pair: str | None, depth: str, team_id: str, is_done: bool) -> PairCheck:
    return PairCheck(
        id=new_id("pchk_"),
        team_id=team_id,
        pair=pair,
        base=first.base.model_dump(),
        instruct=first.instruct.model_dump(),
        depth=depth,
        status="completed" if is_done else "queued",
        findings=staged("headers", [finding.as_dict() for finding in first.findings]),
        finished_at=db_now() if is_done else None,
    )


def _render(check: PairCheck) -> dict[str, Any]:
    base, instruct = ModelSource.model_validate(check.base), ModelSource.model_validate(check.instruct)
    return {
        "id": check.id,
        "object": "pair.check",
        "pair": check.pair,
        "base": base.location,
        "instruct": instruct.location,
        "base_revision": base.revision,
        "instruct_revision": instruct.revision,
        "depth": check.depth,
        "status": check.status,
        "verdict": _verdict(check),
        "findings": check.findings,
        "similarity": check.similarity,
        "error": check.error,
        "created_at": timestamp(check.created_at),
        "finished_at": timestamp(check.finished_at),
    }


def _verdict(check: PairCheck) -> str:
    return verdict_of(Finding(**{name: one[name] for name in one if name != "stage"}) for one in check.findings)
