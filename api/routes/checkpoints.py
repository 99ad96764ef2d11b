"""A job's checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.deps import After, CallerDep, Page, ServiceDep, page, timestamp
from api.routes.jobs import own_job
from api.strict_json import StrictRoute
from core.errors import InvalidInput
from core.fine_tuned_models import checkpoint_name
from core.models import Checkpoint, Job

router = APIRouter(prefix="/fine_tuning/jobs/{job_id}/checkpoints", tags=["Fine-tuning jobs"], route_class=StrictRoute)


class CheckpointMetrics(BaseModel):
    """What was measured at that step; null where it was not."""

    step: int = Field(description="Optimizer steps taken.")
    train_loss: float | None = Field(None, description="Of the step's own batch.")
    train_mean_token_accuracy: float | None = Field(
        None, description="Share of the batch's tokens that the model held for the likeliest."
    )
    valid_loss: float | None = Field(None, description="Of the held-out rows, in instruct's chat format.")
    valid_mean_token_accuracy: float | None = Field(None, description="The same share, of the held-out rows.")
    full_valid_loss: float | None = Field(None, description="The same as `valid_loss`: all are measured each time.")
    full_valid_mean_token_accuracy: float | None = Field(None, description="The same as `valid_mean_token_accuracy`.")


class CheckpointObject(BaseModel):
    """The state at the end of an epoch."""

    id: str = Field(description="`ftckpt_…`; the same at every call.")
    object: Literal["fine_tuning.job.checkpoint"] = Field(
        "fine_tuning.job.checkpoint", description="Always `fine_tuning.job.checkpoint`."
    )
    created_at: int = Field(description="Unix seconds.")
    fine_tuning_job_id: str = Field(description="The job whose training passed through it.")
    fine_tuned_model_checkpoint: str = Field(
        description="Names a model that is made on demand: give it, or the `id`, to `POST /v1/grafts` as `source`."
    )
    step_number: int = Field(description="Optimizer steps taken.")
    metrics: CheckpointMetrics = Field(description="What was measured there.")


@router.get("", response_model=Page[CheckpointObject])
def list_checkpoints(
    job_id: str,
    caller: CallerDep,
    service: ServiceDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> dict[str, Any]:
    """The states that the training passed through and that can still be had, newest first.

    With LoRA these are the ends of the last three epochs and, where it is another one, the epoch's end with the lowest
    validation loss; the last one is the adapter that the job published. Full tuning has its final state alone, which
    can be grafted again where `shadow.publish.delta` asked for its change. There are none before the job has succeeded,
    for a graft, and once the model has been deleted.
    """
    with service.database.reading() as session:
        job = own_job(session, job_id, caller)
        query = select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step.desc()).limit(limit + 1)
        if after is not None:
            query = query.where(Checkpoint.step < _step(session, job_id, after))
        return page([_render(job, checkpoint) for checkpoint in session.scalars(query)], limit)


def _step(session: Session, job_id: str, checkpoint_id: str) -> int:
    checkpoint = session.get(Checkpoint, checkpoint_id)
    if checkpoint is None or checkpoint.job_id != job_id:
        raise InvalidInput(
            f"The cursor 'after' names no checkpoint of this job: {checkpoint_id[:100]!r}.", param="after"
        )
    return checkpoint.step


def _render(job: Job, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": timestamp(checkpoint.created_at),
        "fine_tuning_job_id": job.id,
        "fine_tuned_model_checkpoint": checkpoint_name(str(job.fine_tuned_model), checkpoint.step),
        "step_number": checkpoint.step,
        "metrics": checkpoint.metrics,
    }
