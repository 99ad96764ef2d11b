"""Fine-tuning jobs: create, list, retrieve, cancel, pause, resume, and run again."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from sqlalchemy import ColumnElement, exists, func, select
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
    cursor,
    json_answer,
    no_such,
    owned,
    page,
    timestamp,
)
from api.idempotency import BareIntentDep, IntentDep, first_answer, replayed
from api.polling import POLLED, STATUS_ONLY, answer_poll
from api.routes.unoffered import refuse_integrations, refuse_method
from api.strict_json import StrictRoute
from core import jobs
from core.broker import nudge
from core.errors import InvalidInput, NotFound
from core.history import expected_finish
from core.job_spec import JobKind
from core.jobs import waiting_for
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

#: The contract's eight; what a running job does just now is its `phase`.
JobStatus = Literal["validating_files", "queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled"]

#: How a job that is not there is told of.
_WHAT, _NOT_FOUND = "fine-tuning job", "job_not_found"

#: A job has at most 16 pairs of metadata to ask for, besides the page.
MAX_QUERY_PARAMETERS = 20


class Hyperparameters(StrictModel):
    """`auto` takes the paper's recipe and is replaced by the number once it is known."""

    n_epochs: Annotated[int, Field(ge=1, le=50)] | Auto = Field(
        "auto", description="How often the rows are gone through. `auto`: 1.", examples=["auto", 3]
    )
    batch_size: Annotated[int, Field(ge=1, le=256)] | Auto = Field(
        "auto", description="Rows per optimizer step. `auto`: 32, or all rows where there are fewer.", examples=[16]
    )
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | Auto = Field(
        "auto", description="Multiplies `shadow.tuning.learning_rate`. `auto`: 1.", examples=[0.5]
    )


class Supervised(StrictModel):
    hyperparameters: Hyperparameters = Field(Hyperparameters(), description="Each is `auto` where it is left out.")


class Method(StrictModel):
    type: Literal["supervised", "dpo", "reinforcement"] = Field(
        "supervised", description="Only `supervised` is offered; the others get an error that says so."
    )
    supervised: Supervised | None = Field(None, description="The settings of supervised training.")
    dpo: dict[str, Any] | None = Field(None, description="Not offered.")
    reinforcement: dict[str, Any] | None = Field(None, description="Not offered.")


class TuningOptions(StrictModel):
    """How the weights are changed. The defaults are the paper's."""

    type: Literal["lora", "full"] = Field(
        "lora", description="`lora` trains factors of a low rank, `full` every weight at several times the memory."
    )
    learning_rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | Auto = Field(
        "auto", description="The highest rate. `auto`: 2e-4 for LoRA, 1e-5 for full tuning.", examples=["auto", 1e-4]
    )
    rank: Annotated[int, Field(ge=1, le=4096)] | Auto = Field(
        "auto",
        description="LoRA's rank. `auto`: 128, or the smallest dimension of a tuned linear where that is less.",
        examples=[64],
    )
    alpha: Annotated[int, Field(ge=1, le=8192)] | Auto = Field(
        "auto", description="LoRA's scaling is `alpha / rank`. `auto`: twice the rank.", examples=[128]
    )
    dropout: float = Field(0.0, ge=0, lt=1, allow_inf_nan=False, description="Of LoRA's inputs.", examples=[0.05])
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the rate falls after the warm-up: to zero, or not at all."
    )
    warmup_ratio: float = Field(
        0.1, ge=0, lt=1, allow_inf_nan=False, description="Share of all steps over which the rate rises from zero."
    )
    weight_decay: float = Field(0.0, ge=0, le=1, allow_inf_nan=False, description="AdamW's.")
    max_grad_norm: float = Field(
        1.0, gt=0, le=1000, allow_inf_nan=False, description="A longer gradient is shortened to this length."
    )
    max_length: int = Field(4096, ge=8, le=131_072, description="Tokens; a longer row is cut at its end.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of the forward and backward pass; trainable weights are always float32. `auto`: bfloat16 on a "
        "GPU, float32 on a CPU.",
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
        default_factory=list,
        max_length=8,
        description="Further scales to graft and measure; only one is published.",
        examples=[[0.5, 0.8]],
    )
    holdout_ratio: float = Field(
        0.05, ge=0, le=0.5, allow_inf_nan=False, description="Share of the rows to hold out without a validation_file."
    )
    max_rows: int = Field(200, ge=1, le=10_000, description="Rows measured of each set.")
    max_new_tokens: int = Field(64, ge=1, le=4096, description="Longest answer that is generated to be compared.")
    exact_match: Literal["auto", "on", "off"] = Field(
        "auto", description="Generate an answer to each held-out row and compare. `auto`: where all answers are short."
    )
    probes: dict[str, str] = Field(
        default_factory=dict,
        max_length=8,
        description="Name -> file id: further rows on which the models are compared, to show what the tuning damaged.",
        examples=[{"general": "file-01k9"}],
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
    tuning: TuningOptions = Field(TuningOptions(), description="How the weights are changed.")
    graft: GraftOptions = Field(GraftOptions(), description="What of the change goes onto instruct, and how strongly.")
    evaluation: EvaluationOptions = Field(EvaluationOptions(), description="What is compared after the training.")
    publish: PublishOptions = Field(PublishOptions(), description="What is published besides the grafted model.")

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

    model: str = Field(
        min_length=1,
        max_length=256,
        description="A pair's name (`GET /v1/pairs`), an instruct model's id, or the id of a base that belongs to one "
        "pair only.",
        examples=["qwen3-0.6b", "Qwen/Qwen3-0.6B"],
    )
    training_file: str = Field(
        min_length=1, max_length=100, description="A file with the purpose `fine-tune`.", examples=["file-01k9"]
    )
    validation_file: str | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="Rows to measure on instead of a share of the training rows that is held out.",
    )
    suffix: Suffix | None = Field(None, description="Becomes part of the model's name.", examples=["support"])
    seed: int | None = Field(None, ge=0, le=2**31 - 1, description="Null: one is chosen, and shown by the job.")
    metadata: Metadata | None = Field(
        None,
        description="Up to 16 pairs of your own, kept and shown with the job: names of 64 letters, values of 512.",
        examples=[{"experiment": "a"}],
    )
    method: Method | None = Field(None, description="Null: supervised, with every hyperparameter `auto`.")
    # Not pydantic's own `deprecated`, which warns whenever this server reads the field.
    hyperparameters: Hyperparameters | None = Field(
        None, description="Use `method`.", json_schema_extra={"deprecated": True}
    )
    integrations: list[dict[str, Any]] | None = Field(
        None, max_length=5, description="Not offered; null or empty is taken."
    )
    shadow: ShadowOptions = Field(
        ShadowOptions(), description="What is ours. Left out: Shadow-FT with LoRA, as in the paper."
    )


class JobError(BaseModel):
    """Why a job failed."""

    code: str = Field(description="Stable; programs may test for it.")
    message: str = Field(description="One sentence of cause.")
    param: str | None = Field(description="The request's field at fault, where one is.")
    hint: str = Field("", description="What to do about it; empty where there is nothing to do.")
    retryable: bool = Field(False, description="Whether the same job may succeed when it is submitted again.")
    fault: Literal["user", "memory", "infrastructure"] = Field("user", description="Whose fault it is.")


_HYPERPARAMETERS: dict[str, JsonValue] = {"n_epochs": 1, "batch_size": 32, "learning_rate_multiplier": 1.0}

_EXAMPLE: dict[str, JsonValue] = {
    "id": "ftjob-01kqp3v9w8d6m4t2s0x7z5y1ab",
    "object": "fine_tuning.job",
    "kind": "fine_tune",
    "created_at": 1_790_000_000,
    "finished_at": None,
    "model": "qwen3-0.6b",
    "fine_tuned_model": None,
    "organization_id": "team-01kqp3v9w8d6m4t2s0x7z5y1aa",
    "status": "running",
    "phase": "training",
    "training_file": "file-01kqp3v9w8d6m4t2s0x7z5y1ac",
    "validation_file": None,
    "result_files": [],
    "hyperparameters": _HYPERPARAMETERS,
    "method": {"type": "supervised", "supervised": {"hyperparameters": _HYPERPARAMETERS}},
    "seed": 1_234_567,
    "trained_tokens": None,
    "error": None,
    "estimated_finish": 1_790_001_800,
    "integrations": [],
    "metadata": {"experiment": "a"},
    "user_provided_suffix": "support",
    "pair": "qwen3-0.6b",
    "shadow": {"strategy": "shadow", "tuning": {"type": "lora", "rank": 128}, "graft": {"scale": 1.0}},
    "pair_check": {"verdict": "ok", "findings": [], "similarity": {"sigma_mean": 0.02}},
    "graft_result": None,
    "progress": {"step": 120, "total_steps": 500, "loss": 1.31, "eta_seconds": 1500.0},
    "waiting_for": None,
    "attempt": 1,
    "retry_of": None,
}


class JobObject(BaseModel):
    """A job. Fields beside OpenAI's: `kind`, `phase`, `progress`, `pair`, `shadow`, `pair_check`, `graft_result`,
    `waiting_for`, `attempt`, `retry_of`.

    A job of the kind `graft` can be asked for here as well; `GET /v1/grafts/{id}` shows it in its own words.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [_EXAMPLE]})

    id: str = Field(description="`ftjob-…`")
    object: Literal["fine_tuning.job"] = Field("fine_tuning.job", description="Always `fine_tuning.job`.")
    kind: Literal["fine_tune", "graft"] = Field(description="Whether it trains, or only grafts.")
    created_at: int = Field(description="Unix seconds.")
    finished_at: int | None = Field(description="Unix seconds. Null: it has not ended.")
    model: str = Field(description="As the request named it.")
    fine_tuned_model: str | None = Field(description="The new model's name. Null: the job has not succeeded.")
    organization_id: str = Field(description="The team.")
    status: JobStatus = Field(
        description="`succeeded`, `failed` and `cancelled` are final. `pausing`: it runs until its worker has left it."
    )
    phase: str | None = Field(
        description="What a worker does just now: `preparing`, `training`, `grafting`, `evaluating`, `publishing` or "
        "`cancelling`. Null: none works on it."
    )
    training_file: str = Field(description="As the request named it.")
    validation_file: str | None = Field(description="As the request named it.")
    result_files: list[str] = Field(description="Ids of files with the metrics as CSV, once the job has succeeded.")
    hyperparameters: dict[str, Any] = Field(description="As asked for; numbers replace `auto` once they are known.")
    method: dict[str, Any] = Field(description="The method with the same hyperparameters.")
    seed: int = Field(description="The request's, or the one that was chosen.")
    trained_tokens: int | None = Field(description="Tokens trained on. Null: the job has not succeeded.")
    error: JobError | None = Field(description="Why it failed, and what to do about it. Null: it has not failed.")
    estimated_finish: int | None = Field(description="Unix seconds. Null: there is nothing yet to tell it from.")
    integrations: list[dict[str, Any]] = Field(description="Always empty.")
    metadata: dict[str, str] | None = Field(description="As the request put it.")
    user_provided_suffix: str | None = Field(description="The request's `suffix`.")
    pair: str = Field(description="The pair whose base is tuned and onto whose instruct model the change is grafted.")
    shadow: dict[str, Any] = Field(description="The request's, defaults filled in; numbers replace `auto`.")
    pair_check: dict[str, Any] | None = Field(
        description="What its admission found about the pair: `verdict` (`ok`, `warn` or `refuse`), `findings` and "
        "`similarity`, as in `POST /v1/pairs/check`. Null: not yet admitted, or a graft."
    )
    graft_result: dict[str, Any] | None = Field(
        description="How much of the change the model holds: `fidelity` (the share that survived storage in the "
        "weights' dtype), `discarded_share` (what scope and patterns left out) and more. Null: not yet succeeded."
    )
    progress: dict[str, Any] | None = Field(
        description="How far the phase has come: `step` of `total_steps`, `eta_seconds`. Null: nothing to tell."
    )
    waiting_for: str | None = Field(description="Why it does not move yet, in a sentence. Null: nothing is amiss.")
    attempt: int = Field(description="How often a worker has begun it; more than 1 after an interruption.")
    retry_of: str | None = Field(description="The job that this one runs again. Null: none.")


# --- handlers -------------------------------------------------------------------------------------------------------


@router.post("", response_model=JobObject)
def create_job(body: JobRequest, caller: CallerDep, service: ServiceDep, intent: IntentDep) -> Response:
    """Submit a job: tune the pair's base model on the file and graft the change onto its instruct model."""
    with service.database.writing() as session:
        if (earlier := replayed(session, intent)) is not None:
            return earlier
        job = jobs.create(session, new_job(session, body, caller))
        answer = first_answer(session, intent, _render(at_hand(session), job, service))
        session.commit()
        nudge("admit")
        return answer


@router.get("", response_model=Page[JobObject])
def list_jobs(
    request: Request,
    caller: CallerDep,
    service: ServiceDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    metadata: Annotated[
        str | None,
        Query(
            description="`metadata[key]=value` finds jobs with this pair, several find those with all of them; an "
            "empty value is one, too. `metadata=null` finds jobs without any metadata."
        ),
    ] = None,
) -> Response:
    """List the team's fine-tuning jobs, newest first."""
    with service.database.reading() as session:
        filters = _metadata_filter(session, request, metadata)
        found = jobs_page(session, caller, "fine_tune", after, limit, filters)
        return json_answer(page([_render(at_hand(session), job, service) for job in found], limit))


@router.get("/{job_id}", response_model=JobObject, responses=POLLED)
def retrieve_job(job_id: str, request: Request) -> Response:
    """One job's status."""
    return answer_poll(request, job_id, is_shown=lambda _: True, absent=lambda: _no_such_job(job_id), render=_render)


@router.post("/{job_id}/cancel", response_model=JobObject)
def cancel_job(job_id: str, caller: CallerDep, service: ServiceDep) -> Response:
    """Cancel a live job. A running one ends once its worker has stopped the training; poll its status."""
    return _ask(job_id, caller, service, jobs.request_cancel)


@router.post("/{job_id}/pause", response_model=JobObject)
def pause_job(job_id: str, caller: CallerDep, service: ServiceDep) -> Response:
    """Pause a live job; it keeps no worker busy until it is resumed. One that waits is paused at once.

    A running one is `pausing` first. Its training saves its whole state, and any worker goes on from there. Grafting,
    evaluating and publishing are short: they are broken off. The worker that had the job goes on with them without
    training again, if it is the one that takes the job up; another worker repeats the training from its last saved
    state. Pausing what is paused changes nothing; a job that has ended or is being cancelled is an error, 409.
    """
    return _ask(job_id, caller, service, jobs.request_pause)


@router.post("/{job_id}/resume", response_model=JobObject)
def resume_job(job_id: str, caller: CallerDep, service: ServiceDep) -> Response:
    """Let a paused job go on: it is `queued` again, or `validating_files` where it had not come further.

    One that is `pausing` goes on as well, at the latest after its worker has left it. Resuming a job that goes on
    anyway changes nothing; a job that has ended or is being cancelled is an error, 409.
    """
    answer = _ask(job_id, caller, service, jobs.request_resume)
    nudge("work")
    nudge("admit")
    return answer


@router.post("/{job_id}/retry", response_model=JobObject)
def retry_job(job_id: str, caller: CallerDep, service: ServiceDep, intent: BareIntentDep) -> Response:
    """Run a job again that failed or was cancelled: a new job with the same request and seed.

    Its training goes on from what the old one had saved, where the data, the models and the tuning are still the same;
    `retry_of` names the old job. What a failed job saved is kept for a week. A job in another state is an error, 409.
    """
    with service.database.writing() as session:
        own_job(session, job_id, caller)
        if (earlier := replayed(session, intent)) is not None:
            return earlier
        answer = first_answer(session, intent, _render(at_hand(session), jobs.retry(session, job_id), service))
        session.commit()
        nudge("admit")
        return answer


def _ask(job_id: str, caller: Caller, service: Service, verb: Callable[[Session, str], None]) -> Response:
    with service.database.writing() as session:
        job = own_job(session, job_id, caller)
        verb(session, job_id)
        session.commit()
        session.refresh(job)
        return json_answer(_render(at_hand(session), job, service))


def jobs_page(
    session: Session,
    caller: Caller,
    kind: JobKind,
    after: str | None,
    limit: int,
    filters: Sequence[ColumnElement[bool]] = (),
) -> Sequence[Job]:
    """The team's jobs of one kind after the cursor, newest first, and one more than `limit`."""
    query = select(Job).where(Job.team_id == caller.team_id, Job.kind == kind, *filters)
    query = query.order_by(Job.id.desc()).options(*STATUS_ONLY)
    last = cursor(session, Job, after, caller, Job.kind == kind, *filters)
    if last is not None:
        query = query.where(Job.id < last.id)
    return session.scalars(query.limit(limit + 1)).all()


def own_job(session: Session, job_id: str, caller: Caller) -> Job:
    return owned(session, Job, job_id, caller, what=_WHAT, code=_NOT_FOUND)


def _no_such_job(job_id: str) -> NotFound:
    return no_such(job_id, what=_WHAT, code=_NOT_FOUND)


# --- from the request to the row ------------------------------------------------------------------------------------


def new_job(session: Session, body: JobRequest, caller: Caller) -> Job:
    """The row of the job that `body` asks for, not kept yet. Raises what is wrong with the request."""
    hyperparameters = _hyperparameters(body)
    refuse_integrations(body.integrations)
    pair = find_pair(session, body.model)
    _check_files(session, body, caller)
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
    refuse_method(method.type)
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
    # Held until the job that reads it is there, so that nobody deletes it between the two.
    file = session.get(File, file_id, with_for_update={"read": True, "key_share": True})
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


def _render(open_session: OpenSession, job: Job, service: Service) -> dict[str, Any]:
    hyperparameters = _shown_hyperparameters(job)
    return {
        **render_life(open_session, job, service),
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
        "estimated_finish": timestamp(expected_finish(job, service.paces.reader(open_session))),
        "integrations": [],
        "shadow": _shown_shadow(job),
        "pair_check": job.pair_check,
        "retry_of": job.parent_id,
    }


def render_life(open_session: OpenSession, job: Job, service: Service) -> dict[str, Any]:
    """What jobs of both kinds show."""
    return {
        "id": job.id,
        "created_at": timestamp(job.created_at),
        "finished_at": timestamp(job.finished_at),
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.team_id,
        "status": "pausing" if (job.status, job.wish) == ("running", "pause") else job.status,
        "phase": job.phase,
        "graft_result": job.graft_result,
        "error": job.error,
        "metadata": job.labels,
        "user_provided_suffix": job.suffix,
        "pair": job.request["pair"]["name"],
        "progress": _shown_progress(job),
        "waiting_for": waiting_for(job, service.lanes.reader(open_session)),
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
    if job.progress is None:
        return None
    return {**job.progress, "eta_seconds": _eta_seconds(job)}


def _eta_seconds(job: Job) -> float | None:
    """What the running phase still takes at its pace so far."""
    if job.progress is None or job.phase_started_at is None or not job.progress["step"]:
        return None
    done: float = job.progress["step"] / job.progress["total_steps"]
    elapsed = (datetime.now(UTC) - job.phase_started_at).total_seconds()
    return round(elapsed * (1 - done) / done, 1)


def _metadata_filter(session: Session, request: Request, metadata: str | None) -> list[ColumnElement[bool]]:
    given = request.query_params.multi_items()
    if len(given) > MAX_QUERY_PARAMETERS:
        raise InvalidInput(f"The query has more than {MAX_QUERY_PARAMETERS} parameters.", param="metadata")
    filters = [_has_label(session, name[9:-1], value) for name, value in given if name.startswith("metadata[")]
    if metadata is None:
        return filters
    if metadata != "null":
        raise InvalidInput(
            f"Invalid value for 'metadata': {metadata[:100]!r}; ask for metadata[key]=value, or for metadata=null.",
            param="metadata",
        )
    return [*filters, Job.labels.is_(None)]


def _has_label(session: Session, key: str, value: str) -> ColumnElement[bool]:
    """Compared pair by pair: a path into the JSON would need quoting, which SQLite has none for."""
    on_sqlite = session.get_bind().dialect.name == "sqlite"
    each = (func.json_each if on_sqlite else func.jsonb_each_text)(Job.labels).table_valued("key", "value")
    return exists(select(each.c.key).where(each.c.key == key, each.c.value == value))
