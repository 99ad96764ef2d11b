"""Models: the team's fine-tuned ones, and those of the pairs that can be tuned."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api.deps import CallerDep, ServiceDep, timestamp
from api.strict_json import StrictRoute
from core.errors import NotFound, PermissionDenied, ShadowError
from core.fine_tuned_models import delete_model, find_checkpoint, find_model, list_models
from core.job_spec import ModelSource, PairSource
from core.models import Artifact, Checkpoint, Job
from core.pairs import find_pair, get_pair, known_pairs

router = APIRouter(prefix="/models", tags=["Models"], route_class=StrictRoute)

Kind = Literal["fine_tuned", "checkpoint", "pair"]

_BYTES_OF_MODEL = select(Artifact.job_id, func.sum(Artifact.bytes)).where(Artifact.kind == "model")


class ModelObject(BaseModel):
    """A model. Fields beside OpenAI's: `kind`, `pair`, `base`, `instruct`, `job_id`, `checkpoint_id`, `bytes`."""

    id: str = Field(description="A fine-tuned model's name, or a name that `model` takes in a job.")
    object: Literal["model"] = Field("model", description="Always `model`.")
    created: int = Field(description="Unix seconds; 0 for a pair of the catalogue.")
    owned_by: str = Field(description="The team, or who publishes the pair's instruct model (`local`: this server).")
    kind: Kind = Field(
        description="`fine_tuned`: a model that a job made; `GET /v1/fine_tuning/jobs/{job_id}/artifacts?kind=model` "
        "lists its files. `checkpoint`: a state of a training, of which `POST /v1/grafts` with this id as `source` "
        "makes a model. `pair`: a base and an instruct model that a job can start from."
    )
    pair: str = Field(description="The pair's name.")
    base: str = Field(description="The pair's base model: a Hub repository, or the name of a local folder.")
    instruct: str = Field(description="The pair's instruct model.")
    job_id: str | None = Field(description="The job that made it. Null: a pair.")
    checkpoint_id: str | None = Field(description="`ftckpt_…` of a checkpoint. Null: anything else.")
    bytes: int | None = Field(description="Size of a fine-tuned model's files. Null: anything else.")


class ModelList(BaseModel):
    """All at once, without pages."""

    object: Literal["list"] = Field("list", description="Always `list`.")
    data: list[ModelObject] = Field(description="The team's fine-tuned models, then the pairs.")


class DeletedModel(BaseModel):
    id: str = Field(description="The model that was.")
    object: Literal["model"] = Field("model", description="Always `model`.")
    deleted: bool = Field(description="Always true.")


# --- handlers -------------------------------------------------------------------------------------------------------


@router.get("", response_model=ModelList)
def list_all_models(caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """The team's fine-tuned models, newest first, then every pair that a job can name in `model`."""
    with service.database.reading() as session:
        made = list_models(session, caller.team_id)
        # By the team and not by the jobs' ids, of which there may be more than a statement takes.
        sizes = session.execute(_BYTES_OF_MODEL.where(Artifact.team_id == caller.team_id).group_by(Artifact.job_id))
        bytes_of = {job_id: int(size) for job_id, size in sizes}
        pairs = [_of_pair(known.source.name, known.source, known.created_at) for known in known_pairs(session)]
    # A model without a size was deleted between the two looks.
    models = [_of_job(job, bytes_of[job.id]) for job in made if job.id in bytes_of]
    return {"object": "list", "data": [*models, *pairs]}


@router.get("/{model:path}", response_model=ModelObject)
def retrieve_model(model: str, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """One model, by any name that the service gives or takes: a fine-tuned model, a checkpoint
    (`fine_tuned_model_checkpoint`), a pair, or the Hub id of a pair's model. `/` may be sent as it is or as `%2F`."""
    with service.database.reading() as session:
        job = find_model(session, caller.team_id, model)
        if job and (size := _size(session, job)) is not None:  # else it was deleted between the two looks
            return _of_job(job, size)
        if found := find_checkpoint(session, caller.team_id, model):
            return _of_checkpoint(model, *found)
        pair = get_pair(session, _pair(session, model).name)
        return _of_pair(model, pair.source, pair.created_at)


@router.delete("/{model:path}", response_model=DeletedModel)
def delete_fine_tuned_model(model: str, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """Delete a fine-tuned model: its files, the adapter or delta that was learned, and its checkpoints.

    It is gone whole or not at all, at once and for good; nothing can be grafted from its job any more. The job stays as
    it was, with its name for the model, its events, report and metrics; so do models that were grafted from it. A model
    whose change a graft is reading is in conflict until that graft has ended. Pairs are no team's to delete.
    """
    with service.database.writing() as session:
        job = find_model(session, caller.team_id, model)
        keys = delete_model(session, job) if job else []
        if not keys:  # or another request has deleted it meanwhile
            raise _not_deletable(session, caller.team_id, model)
        session.commit()
    for key in keys:
        service.storage.delete(key)
    return {"id": model, "object": "model", "deleted": True}


def _size(session: Session, job: Job) -> int | None:
    row = session.execute(_BYTES_OF_MODEL.where(Artifact.job_id == job.id).group_by(Artifact.job_id)).first()
    return int(row[1]) if row else None


def _not_deletable(session: Session, team_id: str, model: str) -> ShadowError:
    if found := find_checkpoint(session, team_id, model):
        return PermissionDenied(
            f"A checkpoint goes with its model: delete {found[0].fine_tuned_model} to delete its checkpoints.",
            code="model_not_deletable",
        )
    pair = _pair(session, model)
    return PermissionDenied(
        f"{model} belongs to the pair {pair.name}, which is not a team's to delete; only fine-tuned models are. An "
        f"admin can take back a registered pair: DELETE /v1/pairs/{pair.name}.",
        code="model_not_deletable",
    )


def _pair(session: Session, model: str) -> PairSource:
    """The pair that is meant where no fine-tuned model is."""
    try:
        return find_pair(session, model)
    except NotFound:
        raise NotFound(
            f"There is no model {model[:200]!r}. GET /v1/models lists the team's fine-tuned models and the pairs.",
            code="model_not_found",
            param="model",
        ) from None


# --- from the rows to the answer ------------------------------------------------------------------------------------


def _of_job(job: Job, size: int) -> dict[str, Any]:
    return {
        **_made_by(job),
        "id": job.fine_tuned_model,
        "created": timestamp(job.finished_at),
        "kind": "fine_tuned",
        "checkpoint_id": None,
        "bytes": size,
    }


def _of_checkpoint(name: str, job: Job, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        **_made_by(job),
        "id": name,
        "created": timestamp(checkpoint.created_at),
        "kind": "checkpoint",
        "checkpoint_id": checkpoint.id,
        "bytes": None,
    }


def _made_by(job: Job) -> dict[str, Any]:
    pair = PairSource.model_validate(job.request["pair"])
    return {"object": "model", "owned_by": job.team_id, **_models_of(pair), "job_id": job.id}


def _of_pair(name: str, pair: PairSource, created_at: datetime | None) -> dict[str, Any]:
    owner = pair.instruct.location.partition("/")[0] if pair.instruct.kind == "hub" else "local"
    return {
        "id": name,
        "object": "model",
        "created": timestamp(created_at) or 0,
        "owned_by": owner,
        "kind": "pair",
        **_models_of(pair),
        "job_id": None,
        "checkpoint_id": None,
        "bytes": None,
    }


def _models_of(pair: PairSource) -> dict[str, str]:
    return {"pair": pair.name, "base": _name(pair.base), "instruct": _name(pair.instruct)}


def _name(source: ModelSource) -> str:
    return source.location if source.kind == "hub" else source.location.rpartition("/")[2]
