"""What a job published: one artifact is one file; a model is downloaded by its list."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field
from sqlalchemy import select

from api.deps import After, CallerDep, Page, ServiceDep, cursor, json_answer, owned, page, timestamp
from api.download import DOWNLOADS, WantedDep, download
from api.routes.jobs import own_job
from api.strict_json import StrictRoute
from core.models import Artifact

router = APIRouter(tags=["Artifacts"], route_class=StrictRoute)

Kind = Literal["model", "adapter", "delta", "report", "metrics", "card"]


class ArtifactObject(BaseModel):
    """One file that a job published."""

    id: str = Field(description="`art_…`")
    object: Literal["artifact"] = Field("artifact", description="Always `artifact`.")
    job_id: str = Field(description="The job that published it; a graft is one, too.")
    kind: Kind = Field(
        description="`model`: a file of the new model. `adapter`, `delta`: of the change that was learned. `report`, "
        "`metrics`, `card`: what was measured, and the model's card."
    )
    path: str = Field(description="Relative to the download's folder: `model/config.json`.")
    bytes: int = Field(description="Its size.")
    sha256: str = Field(description="Of its bytes, in hexadecimal; a download tells it as `x-checksum-sha256`, too.")
    created_at: int = Field(description="Unix seconds.")


def _render(artifact: Artifact) -> dict[str, Any]:
    return {
        "id": artifact.id,
        "object": "artifact",
        "job_id": artifact.job_id,
        "kind": artifact.kind,
        "path": artifact.path,
        "bytes": artifact.bytes,
        "sha256": artifact.sha256,
        "created_at": timestamp(artifact.created_at),
    }


@router.get("/fine_tuning/jobs/{job_id}/artifacts", response_model=Page[ArtifactObject])
def list_artifacts(
    job_id: str,
    caller: CallerDep,
    service: ServiceDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    kind: Kind | None = None,
) -> Response:
    """The files that the job published, newest first. Empty until the job has succeeded. The kinds `adapter` (LoRA) and
    `delta` (full tuning with `publish.delta`) are what `POST /v1/grafts` can graft again."""
    with service.database.reading() as session:
        own_job(session, job_id, caller)
        filters = [Artifact.job_id == job_id, *([] if kind is None else [Artifact.kind == kind])]
        query = select(Artifact).where(*filters).order_by(Artifact.id.desc()).limit(limit + 1)
        if (last := cursor(session, Artifact, after, caller, *filters)) is not None:
            query = query.where(Artifact.id < last.id)
        return json_answer(page([_render(artifact) for artifact in session.scalars(query)], limit))


@router.get("/artifacts/{artifact_id}", response_model=ArtifactObject)
def retrieve_artifact(artifact_id: str, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """One artifact's size and hash."""
    with service.database.reading() as session:
        return _render(owned(session, Artifact, artifact_id, caller, what="artifact", code="artifact_not_found"))


@router.get("/artifacts/{artifact_id}/content", response_class=Response, responses=DOWNLOADS)
def artifact_content(artifact_id: str, caller: CallerDep, service: ServiceDep, wanted: WantedDep) -> Response:
    """The artifact's bytes."""
    with service.database.reading() as session:
        artifact = owned(session, Artifact, artifact_id, caller, what="artifact", code="artifact_not_found")
    path, name = service.storage.path(artifact.storage_key), artifact.path.rpartition("/")[2]
    return download(wanted, path, filename=name, sha256=artifact.sha256)


router.add_api_route("/artifacts/{artifact_id}/content", artifact_content, methods=["HEAD"], include_in_schema=False)
