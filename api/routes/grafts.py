"""Grafts: what an earlier job learned, added to another instruct model without training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.deps import (
    After,
    CallerDep,
    OpenSession,
    Page,
    Service,
    ServiceDep,
    StrictModel,
    at_hand,
    json_answer,
    no_such,
    page,
)
from api.idempotency import IntentDep, first_answer, replayed
from api.polling import POLLED, answer_poll
from api.routes.jobs import GraftOptions, JobError, JobStatus, Metadata, Scale, Suffix, jobs_page, render_life
from api.strict_json import StrictRoute
from core import jobs
from core.broker import nudge
from core.errors import Conflict, InvalidInput, NotFound, ShadowError
from core.fine_tuned_models import find_checkpoint, find_model
from core.history import tuning_of
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
        max_length=300,
        description="A succeeded job (`ftjob-…`), its model (`ft:…`), one of its checkpoints (`ftckpt_…` or "
        "`ft:…:ckpt-step-N`), or one of its artifacts (`art_…`) of the kind `adapter` or `delta`. A job of LoRA always "
        "has its adapter; one of full tuning has a delta where it asked for `publish.delta`.",
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
    status: JobStatus = Field(description="As of a fine-tuning job.")
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
def create_graft(body: GraftRequest, caller: CallerDep, service: ServiceDep, intent: IntentDep) -> Response:
    """Graft what an earlier job learned onto the target, without training. Runs as a job: poll its status."""
    with service.database.writing() as session:
        if (earlier := replayed(session, intent)) is not None:
            return earlier
        pair = _find_target(session, body.target)
        source, folder = _find_source(session, body.source, caller)
        job = jobs.create(session, _new_job(body, caller, pair, source, _delta(session, source, folder)))
        answer = first_answer(session, intent, _render(at_hand(session), job, service))
        session.commit()
        nudge("admit")
        return answer


@router.get("", response_model=Page[GraftObject])
def list_grafts(
    caller: CallerDep,
    service: ServiceDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """List the team's grafts, newest first."""
    with service.database.reading() as session:
        found = jobs_page(session, caller, "graft", after, limit)
        return json_answer(page([_render(at_hand(session), job, service) for job in found], limit))


@router.get("/{graft_id}", response_model=GraftObject, responses=POLLED)
def retrieve_graft(graft_id: str, request: Request) -> Response:
    """One graft's status."""
    return answer_poll(
        request,
        graft_id,
        is_shown=lambda job: job.kind == "graft",
        absent=lambda: no_such(graft_id, what="graft", code="graft_not_found"),
        render=_render,
    )


# --- target and source ----------------------------------------------------------------------------------------------


def _find_target(session: Session, target: str) -> PairSource:
    try:
        return find_pair(session, target)
    except ShadowError as error:
        error.param = "target"
        raise


def _find_source(session: Session, source: str, caller: Caller) -> tuple[Job, str]:
    """The job that learned the change, and the part of their path below which the artifacts that hold it lie."""
    if found := find_checkpoint(session, caller.team_id, source):
        job, checkpoint = found
        return _fit(job, source), checkpoint.folder or _own_folder(job)
    artifact = session.get(Artifact, source)
    job_id = artifact.job_id if artifact else source
    named = session.get(Job, job_id) or find_model(session, caller.team_id, source)
    if named is None or named.team_id != caller.team_id:
        raise NotFound(
            f"There is no job, model, checkpoint or artifact {source!r} to graft from.",
            code="source_not_found",
            param="source",
            hint="GET /v1/fine_tuning/jobs lists the jobs.",
        )
    job = _fit(named, source)
    if artifact is None:
        return job, _own_folder(job)
    if artifact.kind in {"adapter", "delta"}:
        return job, artifact.path.rpartition("/")[0]
    raise InvalidInput(
        f"The artifact {artifact.id} ({artifact.path}) is of the kind '{artifact.kind}'; a source is a job, a model, a "
        "checkpoint, or an artifact of the kind 'adapter' or 'delta'.",
        param="source",
    )


def _fit(job: Job, source: str) -> Job:
    """The job, if it has learned something."""
    if job.kind == "graft":
        raise InvalidInput(
            f"{source} is a graft of what {job.request['delta']['job_id']} learned; it learned nothing itself. Name "
            "that job as the source.",
            code="source_is_a_graft",
            param="source",
        )
    if job.status != "succeeded":
        raise Conflict(
            f"The job {job.id} is '{job.status}'; only what a succeeded job learned can be grafted.",
            code="source_not_succeeded",
            param="source",
        )
    return job


def _own_folder(job: Job) -> DeltaKind:
    return "adapter" if tuning_of(job) == "lora" else "delta"


def _delta(session: Session, job: Job, folder: str) -> DeltaSource:
    # Held until the commit: who deletes the job's model waits for this row, and then finds the graft that reads it.
    session.execute(select(Job.id).where(Job.id == job.id).with_for_update())
    below = Artifact.path.startswith(f"{folder}/", autoescape=True)
    found = select(Artifact).where(Artifact.job_id == job.id, below).order_by(Artifact.path)
    files = [
        DeltaFile(
            path=artifact.path.removeprefix(f"{folder}/"),
            storage_key=artifact.storage_key,
            sha256=artifact.sha256,
            bytes=artifact.bytes,
        )
        for artifact in session.scalars(found)
    ]
    if not files:
        raise _nothing_published(job)
    return DeltaSource(kind=_own_folder(job), job_id=job.id, files=tuple(files))


def _nothing_published(job: Job) -> InvalidInput:
    if tuning_of(job) == "lora":
        return InvalidInput(
            f"What the job {job.id} learned has been deleted with its model; run the job again.",
            code="source_deleted",
            param="source",
        )
    return InvalidInput(
        f"The job {job.id} tuned the whole model and what it learned is not kept: it was not published, or deleted "
        'with the model. Run it again with "shadow": {"publish": {"delta": true}}, or with LoRA, whose adapter is '
        "always published.",
        code="delta_not_published",
        param="source",
    )


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


def _render(open_session: OpenSession, job: Job, service: Service) -> dict[str, Any]:
    return {
        **render_life(open_session, job, service),
        "object": "graft",
        "target": job.model,
        "source": job.request["source"],
        "source_job": job.request["delta"]["job_id"],
        "options": job.request["graft"],
        "evaluation": job.request["evaluation"],
    }
