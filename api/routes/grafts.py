"""Grafts: what an earlier job learned, added to another instruct model without training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.deps import After, CallerDep, Page, Service, ServiceDep, StrictModel, page
from api.routes.jobs import GraftOptions, JobError, Metadata, Scale, Suffix, jobs_page, render_life
from api.strict_json import StrictRoute
from core import jobs
from core.broker import nudge
from core.errors import Conflict, InvalidInput, NotFound, ShadowError
from core.job_spec import DeltaFile, DeltaKind, DeltaSource, PairSource
from core.keys import Caller
from core.models import Artifact, Job
from core.pairs import find_pair

router = APIRouter(prefix="/grafts", tags=["Grafts"], route_class=StrictRoute)


class GraftEvaluation(StrictModel):
    """What is compared after the graft: the untouched target and each graft, on the rows which the source job held out
    and on its probes. Left out, with an event that says so, where one of those files has been deleted."""

    compare: bool = Field(True, description="False: only graft, which needs 1 GiB of memory and no data.")
    scales: list[Scale] = Field(
        default_factory=list, max_length=8, description="Further scales to graft and measure; only one is published."
    )
    max_rows: int | None = Field(
        None, ge=1, le=10_000, description="Rows measured of each set. Null: as in the source job."
    )
    max_new_tokens: int | None = Field(
        None, ge=1, le=4096, description="Longest answer that is generated to be compared. Null: as in the source job."
    )
    exact_match: Literal["auto", "on", "off"] | None = Field(
        None,
        description="Generate an answer to each held-out row and compare. `auto`: where all answers are short. Null: "
        "as in the source job.",
    )

    @model_validator(mode="after")
    def _scales_are_for_comparing(self) -> GraftEvaluation:
        if self.scales and not self.compare:
            raise ValueError("further scales are grafted to be compared; leave out 'scales' or 'compare'")
        return self


class GraftRequest(GraftOptions):
    model_config = ConfigDict(
        json_schema_extra={
            "example": {"target": "qwen3-0.6b", "source": "ftjob-01k9", "scale": 0.8, "suffix": "support-mild"}
        }
    )

    target: str = Field(
        min_length=1,
        max_length=256,
        description="The model to graft onto, named as `model` is in a job: the instruct model of that pair.",
    )
    source: str = Field(
        min_length=1,
        max_length=100,
        description="A succeeded job (`ftjob-…`), or one of its artifacts (`art_…`) of the kind `adapter` or `delta`. "
        "A job of LoRA always has its adapter; one of full tuning has a delta where it asked for `publish.delta`.",
    )
    suffix: Suffix | None = Field(None, description="Becomes part of the grafted model's name, `fine_tuned_model`.")
    metadata: Metadata | None = Field(
        None,
        description="Up to 16 pairs of your own, kept and shown with the graft: names of 64 letters, values of 512.",
    )
    evaluation: GraftEvaluation = Field(
        GraftEvaluation(), description="What is compared after the graft, and on how much."
    )


class GraftObject(BaseModel):
    """A graft. Its events, artifacts, evaluation and cancel are those of a job: `/v1/fine_tuning/jobs/{id}/…`.

    `graft_result` is null until the graft has succeeded; its `fidelity` is the share of the change that survived
    storage in the output's dtype, `discarded_share` the share that scope and patterns left out.
    """

    id: str = Field(description="`ftjob-…`: a graft is a job, and its id is one.")
    object: Literal["graft"] = Field("graft", description="Always `graft`.")
    created_at: int = Field(description="Unix seconds.")
    finished_at: int | None = Field(description="Unix seconds. Null: it has not ended.")
    target: str = Field(description="The model that was grafted onto, as the request named it.")
    source: str = Field(description="The job or artifact that the request named.")
    source_job: str = Field(description="The job that learned what is grafted.")
    pair: str = Field(description="The pair whose instruct model is the target.")
    fine_tuned_model: str | None = Field(description="The grafted model's name. Null: the graft has not succeeded.")
    organization_id: str = Field(description="The team.")
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"] = Field(
        description="As of a fine-tuning job."
    )
    phase: str | None = Field(
        description="What a worker does just now: `preparing`, `grafting`, `evaluating`, `publishing` or `cancelling`. "
        "Null: none works on it."
    )
    options: dict[str, Any] = Field(
        description="What it is grafted with: `scale`, `scope`, `include`, `exclude`, `output_dtype`."
    )
    evaluation: dict[str, Any] = Field(description="What is compared, as the request put it.")
    graft_result: dict[str, Any] | None = Field(
        description="How much of the change the model holds: `fidelity`, `discarded_share` and more. Null: the graft "
        "has not succeeded."
    )
    error: JobError | None = Field(description="Why it failed, and what to do about it. Null: it has not failed.")
    metadata: dict[str, str] | None = Field(description="As the request put it.")
    user_provided_suffix: str | None = Field(description="The request's `suffix`.")
    progress: dict[str, Any] | None = Field(
        description="How far the phase has come: `step` of `total_steps`, `eta_seconds`. Null: nothing to tell."
    )
    waiting_for: str | None = Field(description="Why it does not move yet, in a sentence. Null: nothing is amiss.")
    attempt: int = Field(description="How often a worker has begun it; more than 1 after an interruption.")


# --- handlers -------------------------------------------------------------------------------------------------------


@router.post("", response_model=GraftObject)
def create_graft(body: GraftRequest, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """Graft what an earlier job learned onto the target, without training. Runs as a job: poll its status."""
    with service.database.writing() as session:
        pair = _find_target(session, body.target)
        source, kind = _find_source(session, body.source, caller)
        job = jobs.create(session, _new_job(body, caller, pair, source, _delta(session, source, kind)))
        session.commit()
        nudge("admit")
        return _render(session, job, service)


@router.get("", response_model=Page)
def list_grafts(
    caller: CallerDep,
    service: ServiceDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """List the team's grafts."""
    with service.database.reading() as session:
        found = jobs_page(session, caller, "graft", after, limit)
        return page([_render(session, job, service) for job in found], limit)


@router.get("/{graft_id}", response_model=GraftObject)
def retrieve_graft(graft_id: str, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """One graft's status."""
    with service.database.reading() as session:
        job = session.get(Job, graft_id)
        if job is None or job.team_id != caller.team_id or job.kind != "graft":
            raise NotFound(f"No such graft: {graft_id[:100]!r}.", code="graft_not_found")
        return _render(session, job, service)


# --- target and source ----------------------------------------------------------------------------------------------


def _find_target(session: Session, target: str) -> PairSource:
    try:
        return find_pair(session, target)
    except ShadowError as error:
        error.param = "target"
        raise


def _find_source(session: Session, source: str, caller: Caller) -> tuple[Job, DeltaKind]:
    """The job that learned the change, and the artifacts that hold it."""
    artifact = session.get(Artifact, source)
    job = session.get(Job, artifact.job_id if artifact else source)
    if job is None or job.team_id != caller.team_id:
        raise NotFound(
            f"There is no job or artifact {source!r} to graft from.",
            code="source_not_found",
            param="source",
            hint="GET /v1/fine_tuning/jobs lists the jobs.",
        )
    if job.kind == "graft":
        raise InvalidInput(
            f"{source} is a graft of what {job.request['delta']['job_id']} learned; it learned nothing itself. Name "
            "that job as the source.",
            code="source_is_a_graft",
            param="source",
        )
    if job.status != "succeeded" or job.spec is None:
        raise Conflict(
            f"The job {job.id} is '{job.status}'; only what a succeeded job learned can be grafted.",
            code="source_not_succeeded",
            param="source",
        )
    if artifact is None:
        return job, "adapter" if job.spec["tuning"]["type"] == "lora" else "delta"
    if artifact.kind == "adapter":
        return job, "adapter"
    if artifact.kind == "delta":
        return job, "delta"
    raise InvalidInput(
        f"The artifact {artifact.id} ({artifact.path}) is of the kind '{artifact.kind}'; a source is a job, or one of "
        "its artifacts of the kind 'adapter' or 'delta'.",
        param="source",
    )


def _delta(session: Session, job: Job, kind: DeltaKind) -> DeltaSource:
    found = select(Artifact).where(Artifact.job_id == job.id, Artifact.kind == kind).order_by(Artifact.path)
    files = [
        DeltaFile(
            path=artifact.path.removeprefix(f"{kind}/"),
            storage_key=artifact.storage_key,
            sha256=artifact.sha256,
            bytes=artifact.bytes,
        )
        for artifact in session.scalars(found)
    ]
    if not files:
        raise InvalidInput(
            f"The job {job.id} tuned the whole model and did not publish what it learned. Run it again with "
            '"shadow": {"publish": {"delta": true}}, or with LoRA, whose adapter is always published.',
            code="delta_not_published",
            param="source",
        )
    return DeltaSource(kind=kind, job_id=job.id, files=tuple(files))


# --- from the request to the row, and from the row to the answer ----------------------------------------------------


def _new_job(body: GraftRequest, caller: Caller, pair: PairSource, source: Job, delta: DeltaSource) -> Job:
    request = {
        "pair": pair.model_dump(mode="json"),
        "source": body.source,
        "delta": delta.model_dump(mode="json"),
        "graft": body.model_dump(mode="json", include=set(GraftOptions.model_fields)),
        "evaluation": body.evaluation.model_dump(mode="json"),
        "files": source.files if body.evaluation.compare else {},
    }
    return Job(
        team_id=caller.team_id,
        kind="graft",
        model=body.target,
        training_file_id=source.training_file_id,
        validation_file_id=source.validation_file_id,
        suffix=body.suffix,
        seed=source.seed,
        labels=body.metadata,
        request=request,
    )


def _render(session: Session, job: Job, service: Service) -> dict[str, Any]:
    return {
        **render_life(session, job, service),
        "object": "graft",
        "target": job.model,
        "source": job.request["source"],
        "source_job": job.request["delta"]["job_id"],
        "options": job.request["graft"],
        "evaluation": job.request["evaluation"],
    }
