"""Fine-tuned models and their checkpoints: how they are named, found and deleted.

A model is the artifacts of the kind `model` of the job that made it, and its name is that job's `fine_tuned_model`.
A checkpoint's name is its job's model's with `:ckpt-step-N` behind; no weights lie under it, but a graft makes them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sqlalchemy import ColumnElement, Select, delete, exists, select
from sqlalchemy.orm import Session

from core.errors import Conflict
from core.jobs import TERMINAL
from core.models import Artifact, Checkpoint, Job

#: What holds learned weights, and the card that describes them. A job's reports and metrics are its history.
_KINDS_OF_A_MODEL = ("model", "card", "adapter", "delta")

_CHECKPOINT_NAME = re.compile(r"(?P<model>.+):ckpt-step-(?P<step>\d{1,9})", re.DOTALL)


def checkpoint_name(model: str, step: int) -> str:
    return f"{model}:ckpt-step-{step}"


def find_model(session: Session, team_id: str, name: str) -> Job | None:
    """The job that made the team's model `name`; None once the model is deleted."""
    # Two jobs of a team could only meet in eight random letters; the newest would be meant.
    found = select(Job).where(Job.fine_tuned_model == name, Job.team_id == team_id, _has_model())
    return session.scalar(found.order_by(Job.finished_at.desc()).limit(1))


def list_models(session: Session, team_id: str) -> Sequence[Job]:
    """The jobs whose models the team has, the newest first."""
    found = select(Job).where(Job.team_id == team_id, Job.status == "succeeded", _has_model())
    return session.scalars(found.order_by(Job.finished_at.desc(), Job.id.desc())).all()


def _has_model() -> ColumnElement[bool]:
    return exists().where(Artifact.job_id == Job.id, Artifact.kind == "model")


def find_checkpoint(session: Session, team_id: str, name: str) -> tuple[Job, Checkpoint] | None:
    """A checkpoint by its id (`ftckpt_…`) or by its model's name (`…:ckpt-step-N`), with its job."""
    wanted = select(Job, Checkpoint).join(Checkpoint, Checkpoint.job_id == Job.id).where(Job.team_id == team_id)
    if named := _CHECKPOINT_NAME.fullmatch(name):
        wanted = wanted.where(Job.fine_tuned_model == named["model"], Checkpoint.step == int(named["step"]))
    else:
        wanted = wanted.where(Checkpoint.id == name)
    row = session.execute(wanted.order_by(Job.finished_at.desc()).limit(1)).first()
    return (row.Job, row.Checkpoint) if row else None


def delete_model(session: Session, job: Job) -> list[str]:
    """Delete the model of a succeeded job, with its checkpoints and all else that holds what was learned.

    The rows go in the caller's transaction, so that the model is there whole or not at all; the answer is the storage
    keys whose bytes nobody can reach once that is committed. The job stays, and its `fine_tuned_model`, report and
    metrics with it. Raises Conflict while a graft reads what the job learned.
    """
    # Held until the commit: a graft holds the same row while it makes sure that its source is there.
    session.execute(select(Job.id).where(Job.id == job.id).with_for_update())
    if reader := session.scalar(_reads_from(job).limit(1)):
        raise Conflict(
            f"The model {job.fine_tuned_model} cannot be deleted while the graft {reader} reads what its job learned. "
            "Wait until that graft has ended, or cancel it.",
            code="model_in_use",
            param="model",
        )
    gone = select(Artifact).where(Artifact.job_id == job.id, Artifact.kind.in_(_KINDS_OF_A_MODEL))
    artifacts = session.scalars(gone).all()
    for artifact in artifacts:
        session.delete(artifact)
    session.execute(delete(Checkpoint).where(Checkpoint.job_id == job.id))
    return [artifact.storage_key for artifact in artifacts]


def _reads_from(job: Job) -> Select[str]:
    return select(Job.id).where(
        Job.team_id == job.team_id,
        Job.kind == "graft",
        Job.status.not_in(TERMINAL),
        Job.request[("delta", "job_id")].as_string() == job.id,
    )
