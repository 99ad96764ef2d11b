"""Fine-tuning jobs: create, list, retrieve, cancel."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from api.deps import After, CallerDep, Page, Service, ServiceDep, StrictModel, cursor, owned, page, timestamp
from api.strict_json import StrictRoute
from core import jobs
from core.broker import nudge
from core.errors import InvalidInput
from core.job_spec import JobKind, PairSource
from core.keys import Caller
from core.models import File, Job
from core.pairs import find_pair

router = APIRouter(prefix="/fine_tuning/jobs", tags=["Fine-tuning jobs"], route_class=StrictRoute)

Auto = Literal["auto"]

Suffix = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
Scale = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Patterns = Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=32)]

#: A job has at most 16 pairs of metadata to ask for, besides the page.
MAX_QUERY_PARAMETERS = 20


class Hyperparameters(StrictModel):
    """`auto` takes the paper's recipe and is replaced by the number once it is known."""

    n_epochs: Annotated[int, Field(ge=1, le=50)] | Auto = Field("auto", description="`auto`: 1.")
    batch_size: Annotated[int, Field(ge=1, le=256)] | Auto = Field(
        "auto", description="Rows per optimizer step. `auto`: 32, or all rows where there are fewer."
    )
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | Auto = Field(
        "auto", description="Multiplies `shadow.tuning.learning_rate`. `auto`: 1."
    )


class Supervised(StrictModel):
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(StrictModel):
    type: Literal["supervised", "dpo", "reinforcement"] = "supervised"
    supervised: Supervised | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class TuningOptions(StrictModel):
    """How the weights are changed. The defaults are the paper's."""

    type: Literal["lora", "full"] = "lora"
    learning_rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | Auto = Field(
        "auto", description="`auto`: 2e-4 for LoRA, 1e-5 for full tuning."
    )
    rank: Annotated[int, Field(ge=1, le=4096)] | Auto = Field(
        "auto", description="LoRA's rank. `auto`: 128, or the smallest dimension of a tuned linear where that is less."
    )
    alpha: Annotated[int, Field(ge=1, le=8192)] | Auto = Field("auto", description="`auto`: twice the rank.")
    dropout: float = Field(0.0, ge=0, lt=1, allow_inf_nan=False)
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.1, ge=0, lt=1, allow_inf_nan=False)
    weight_decay: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    max_grad_norm: float = Field(1.0, gt=0, le=1000, allow_inf_nan=False)
    max_length: int = Field(4096, ge=8, le=131_072, description="Tokens; a longer row is cut at its end.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the forward and backward pass; trainable weights are always float32."
    )

    @model_validator(mode="after")
    def _only_lora_has_a_rank(self) -> TuningOptions:
        given = self.model_fields_set & {"rank", "alpha", "dropout"}
        if self.type == "full" and given:
            raise ValueError(f"full tuning takes no {min(given)}; leave it out or use type 'lora'")
        return self


class GraftOptions(StrictModel):
    """`W_out = W_instruct + scale * (W_base_tuned - W_base)`."""

    scale: Scale = Field(1.0, description="0 gives the instruct model itself; more than 1 exaggerates the change.")
    scope: Literal["linear", "all"] = Field(
        "linear",
        description="`linear`: the attention and MLP projections. `all`: every tensor that both models share. "
        "They differ after full tuning only: the LoRA adapters that this service trains change nothing but linears.",
    )
    include: Patterns = Field(
        default_factory=list,
        description="Shell patterns on the instruct model's tensor names: of the scope, only what one of them matches "
        "is grafted. Empty: all of the scope. What is left out stays the instruct model's to the bit.",
        examples=[["model.layers.1[0-9].*"]],
    )
    exclude: Patterns = Field(
        default_factory=list,
        description="Shell patterns, as in `include`, of tensors that are not grafted; they win over `include`.",
        examples=[["*.down_proj.weight"]],
    )
    output_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Of the grafted model's weights. `auto`: the instruct model's own. `float32` keeps small changes "
        "that bfloat16 rounds away, at twice the size; `graft_result.fidelity` tells how much was kept.",
    )


class EvaluationOptions(StrictModel):
    """What is compared after the training: untouched instruct, the tuned model, and each graft."""

    scales: list[Scale] = Field(
        default_factory=list, max_length=8, description="Further scales to graft and measure; only one is published."
    )
    holdout_ratio: float = Field(
        0.05, ge=0, le=0.5, allow_inf_nan=False, description="Share of the rows to hold out without a validation_file."
    )
    max_rows: int = Field(200, ge=1, le=10_000, description="Rows measured of each set.")
    max_new_tokens: int = Field(64, ge=1, le=4096)
    exact_match: Literal["auto", "on", "off"] = Field(
        "auto", description="Generate an answer to each held-out row and compare. `auto`: where all answers are short."
    )
    probes: dict[str, str] = Field(
        default_factory=dict,
        max_length=8,
        description="Name -> file id: further rows on which the models are compared, to show what the tuning damaged.",
    )


class PublishOptions(StrictModel):
    """What is published besides the grafted model, the evaluation and the metrics."""

    delta: bool = Field(
        False,
        description="Full tuning: publish the learned change itself (float32, artifacts of the kind `delta`), so that "
        "`POST /v1/grafts` can graft it again, onto other models too, without training. With LoRA this changes "
        "nothing: the adapter is the change, and it is always published.",
    )


class ShadowOptions(StrictModel):
    """What is ours, beside OpenAI's fields."""

    strategy: Literal["shadow", "direct"] = Field(
        "shadow", description="`shadow` tunes base and grafts onto instruct; `direct` tunes instruct, for comparison."
    )
    tuning: TuningOptions = TuningOptions()
    graft: GraftOptions = GraftOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    publish: PublishOptions = PublishOptions()

    @model_validator(mode="after")
    def _direct_has_no_graft(self) -> ShadowOptions:
        if self.strategy == "direct" and ("graft" in self.model_fields_set or self.evaluation.scales):
            raise ValueError("direct tuning grafts nothing; leave out 'graft' and 'evaluation.scales'")
        return self


class JobRequest(StrictModel):
    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "model": "qwen3-0.6b",
                "training_file": "file-01k9",
                "suffix": "support",
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
                "shadow": {"strategy": "shadow", "tuning": {"type": "lora"}, "graft": {"scale": 1.0}},
            }
        }
    )

    model: str = Field(min_length=1, max_length=256, description="A pair's name, an instruct id, or a base id.")
    training_file: str = Field(min_length=1, max_length=100)
    validation_file: str | None = Field(None, min_length=1, max_length=100)
    suffix: Suffix | None = None
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    metadata: Metadata | None = None
    method: Method | None = None
    # Not pydantic's own `deprecated`, which warns whenever this server reads the field.
    hyperparameters: Hyperparameters | None = Field(
        None, description="Use `method`.", json_schema_extra={"deprecated": True}
    )
    integrations: list[dict[str, Any]] | None = Field(None, max_length=5)
    shadow: ShadowOptions = ShadowOptions()


class JobError(BaseModel):
    code: str
    message: str
    param: str | None
    hint: str = ""
    retryable: bool = False
    fault: str = "user"


class JobObject(BaseModel):
    """A job. Fields beside OpenAI's: `kind`, `phase`, `progress`, `pair`, `shadow`, `graft_result`, `waiting_for`,
    `attempt`.

    Once it has succeeded, `graft_result` tells how much of the learned change its model holds: `fidelity` (the share
    that survived storage in the weights' dtype), `discarded_share` (what scope and patterns left out) and more.
    A job of the kind `graft` can be asked for here as well; `GET /v1/grafts/{id}` shows it in its own words.
    """

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    kind: Literal["fine_tune", "graft"]
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    phase: str | None
    training_file: str
    validation_file: str | None
    result_files: list[str]
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    seed: int
    trained_tokens: int | None
    error: JobError | None
    estimated_finish: int | None
    integrations: list[dict[str, Any]]
    metadata: dict[str, str] | None
    user_provided_suffix: str | None
    pair: str
    shadow: dict[str, Any]
    graft_result: dict[str, Any] | None
    progress: dict[str, Any] | None
    waiting_for: str | None
    attempt: int


# --- handlers -------------------------------------------------------------------------------------------------------


@router.post("", response_model=JobObject)
def create_job(body: JobRequest, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """Submit a job: tune the pair's base model on the file and graft the change onto its instruct model."""
    hyperparameters = _hyperparameters(body)
    _refuse_integrations(body)
    with service.database.writing() as session:
        pair = find_pair(session, body.model)
        _check_files(session, body, caller)
        job = jobs.create(session, _new_job(body, caller, pair, hyperparameters))
        session.commit()
        nudge("admit")
        return _render(session, job, service)


@router.get("", response_model=Page)
def list_jobs(
    request: Request,
    caller: CallerDep,
    service: ServiceDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """List the team's fine-tuning jobs. `metadata[key]=value` filters, `metadata=null` finds jobs without any."""
    filters = _metadata_filter(request)
    with service.database.reading() as session:
        found = jobs_page(session, caller, "fine_tune", after, limit, filters)
        return page([_render(session, job, service) for job in found], limit)


@router.get("/{job_id}", response_model=JobObject)
def retrieve_job(job_id: str, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """One job's status."""
    with service.database.reading() as session:
        return _render(session, own_job(session, job_id, caller), service)


@router.post("/{job_id}/cancel", response_model=JobObject)
def cancel_job(job_id: str, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """Cancel a live job. A running one ends once its worker has stopped the training; poll its status."""
    with service.database.writing() as session:
        job = own_job(session, job_id, caller)
        jobs.request_cancel(session, job_id)
        session.commit()
        session.refresh(job)
        return _render(session, job, service)


def jobs_page(
    session: Session,
    caller: Caller,
    kind: JobKind,
    after: str | None,
    limit: int,
    filters: Sequence[ColumnElement[bool]] = (),
) -> Sequence[Job]:
    """The team's jobs of one kind after the cursor, newest first, and one more than `limit`."""
    query = select(Job).where(Job.team_id == caller.team_id, Job.kind == kind, *filters).order_by(Job.id.desc())
    last = cursor(session, Job, after, caller, Job.kind == kind)
    if last is not None:
        query = query.where(Job.id < last.id)
    return session.scalars(query.limit(limit + 1)).all()


def own_job(session: Session, job_id: str, caller: Caller) -> Job:
    return owned(session, Job, job_id, caller, what="fine-tuning job", code="job_not_found")


# --- from the request to the row ------------------------------------------------------------------------------------


def _new_job(body: JobRequest, caller: Caller, pair: PairSource, hyperparameters: Hyperparameters) -> Job:
    request = {
        "pair": pair.model_dump(mode="json"),
        "hyperparameters": hyperparameters.model_dump(mode="json"),
        "shadow": body.shadow.model_dump(mode="json"),
    }
    return Job(
        team_id=caller.team_id,
        kind="fine_tune",
        model=body.model,
        training_file_id=body.training_file,
        validation_file_id=body.validation_file,
        suffix=body.suffix,
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        labels=body.metadata,
        request=request,
    )


def _hyperparameters(body: JobRequest) -> Hyperparameters:
    method = body.method or Method()
    if method.type != "supervised":
        raise InvalidInput(
            f"method.type '{method.type}' is not offered; this server trains supervised rows.", param="method.type"
        )
    for name in ("dpo", "reinforcement"):
        if getattr(method, name) is not None:
            raise InvalidInput(f"method.{name} does not belong to the type 'supervised'.", param=f"method.{name}")
    if method.supervised is not None and body.hyperparameters is not None:
        raise InvalidInput(
            "Hyperparameters were given twice; leave out the deprecated 'hyperparameters'.", param="hyperparameters"
        )
    if method.supervised is not None:
        return method.supervised.hyperparameters
    return body.hyperparameters or Hyperparameters()


def _refuse_integrations(body: JobRequest) -> None:
    if body.integrations:
        raise InvalidInput(
            "Integrations are not offered: this server sends nothing elsewhere. The job's events and its metrics "
            "artifact hold every measurement.",
            param="integrations",
        )


def _check_files(session: Session, body: JobRequest, caller: Caller) -> None:
    _check_file(session, body.training_file, caller, "training_file", ("fine-tune",))
    if body.validation_file is not None:
        if body.validation_file == body.training_file:
            raise InvalidInput(
                "The validation file is the training file; hold out other rows.", param="validation_file"
            )
        _check_file(session, body.validation_file, caller, "validation_file", ("fine-tune", "evals"))
    for name, file_id in body.shadow.evaluation.probes.items():
        param = f"shadow.evaluation.probes.{name}"
        if not name.replace("_", "").replace("-", "").isalnum() or len(name) > 40 or name == "validation":
            raise InvalidInput(
                f"The probe name {name[:50]!r} is not usable: take letters, digits, '-' and '_', and not 'validation'.",
                param="shadow.evaluation.probes",
            )
        _check_file(session, file_id, caller, param, ("fine-tune", "evals"))


def _check_file(session: Session, file_id: str, caller: Caller, param: str, purposes: tuple[str, ...]) -> None:
    file = session.get(File, file_id)
    if file is None or file.team_id != caller.team_id:
        raise InvalidInput(f"There is no file {file_id[:100]!r}; upload it first.", code="file_not_found", param=param)
    if file.purpose not in purposes:
        raise InvalidInput(
            f"The file {file_id} has the purpose '{file.purpose}'; {param} needs {' or '.join(purposes)}.", param=param
        )
    if file.status == "error":
        raise InvalidInput(
            f"The file {file_id} cannot be used: {file.status_details}", code="invalid_training_file", param=param
        )


# --- from the row to the answer -------------------------------------------------------------------------------------


def _render(session: Session, job: Job, service: Service) -> dict[str, Any]:
    hyperparameters = _shown_hyperparameters(job)
    return {
        **render_life(session, job, service),
        "object": "fine_tuning.job",
        "kind": job.kind,
        "model": job.model,
        "training_file": job.training_file_id,
        "validation_file": job.validation_file_id,
        "result_files": job.result_file_ids,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "seed": job.seed,
        "trained_tokens": job.trained_tokens,
        # The running phase's pace is in `progress`; what the phases after it will take is not known yet.
        "estimated_finish": None,
        "integrations": [],
        "shadow": _shown_shadow(job),
    }


def render_life(session: Session, job: Job, service: Service) -> dict[str, Any]:
    """What jobs of both kinds show."""
    return {
        "id": job.id,
        "created_at": timestamp(job.created_at),
        "finished_at": timestamp(job.finished_at),
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.team_id,
        "status": job.status,
        "phase": job.phase,
        "graft_result": job.graft_result,
        "error": job.error,
        "metadata": job.labels,
        "user_provided_suffix": job.suffix,
        "pair": job.request["pair"]["name"],
        "progress": _shown_progress(job),
        "waiting_for": jobs.waiting_for(session, job, stale_worker_seconds=service.settings.lease_seconds),
        "attempt": job.attempt,
    }


def _shown_hyperparameters(job: Job) -> dict[str, Any]:
    """As asked for; once the job is admitted every `auto` is the number that it became. A graft trains nothing."""
    if job.kind == "graft":
        return {}
    asked = job.request["hyperparameters"]
    if job.spec is None:
        return dict(asked)
    tuning = job.spec["tuning"]
    multiplier = asked["learning_rate_multiplier"]
    return {
        "n_epochs": tuning["n_epochs"],
        "batch_size": tuning["batch_size"],
        "learning_rate_multiplier": 1.0 if multiplier == "auto" else multiplier,
    }


def _shown_shadow(job: Job) -> dict[str, Any]:
    if job.kind == "graft":
        return {name: job.request[name] for name in ("source", "graft", "evaluation")}
    asked: dict[str, Any] = job.request["shadow"]
    if job.spec is None:
        return asked
    lora_only = {"rank", "alpha", "dropout"} if asked["tuning"]["type"] == "full" else set()
    tuning = {name: job.spec["tuning"][name] for name in asked["tuning"] if name not in lora_only}
    return {**asked, "tuning": tuning}


def _shown_progress(job: Job) -> dict[str, Any] | None:
    if job.progress is None or job.phase_started_at is None:
        return None
    step, total = job.progress["step"], job.progress["total_steps"]
    elapsed = (datetime.now(UTC) - job.phase_started_at).total_seconds()
    eta = round(elapsed / step * (total - step), 1) if step else None
    return {**job.progress, "eta_seconds": eta}


def _metadata_filter(request: Request) -> list[ColumnElement[bool]]:
    if len(request.query_params.multi_items()) > MAX_QUERY_PARAMETERS:
        raise InvalidInput(f"The query has more than {MAX_QUERY_PARAMETERS} parameters.", param="metadata")
    filters: list[ColumnElement[bool]] = []
    for name, value in request.query_params.multi_items():
        if name == "metadata" and value == "null":
            filters.append(Job.labels.is_(None))
        elif name.startswith("metadata[") and name.endswith("]"):
            filters.append(Job.labels[name[9:-1]].as_string() == value)
    return filters
