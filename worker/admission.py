"""validating_files -> queued: the files are ready, revisions are pinned, headers agree, every `auto` has its number.

A graft is planned here as well, from the target's headers and those of the published change.

Nothing here needs a GPU or torch, so that a job that cannot succeed is refused before it costs one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import structlog
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from core import jobs
from core.adapter_plan import plan_adapter
from core.broker import nudge
from core.checkpoints import Checkpoint, read_adapter, read_checkpoint, read_delta, read_hub_checkpoint
from core.errors import Cause, InvalidInput, PairRefused, ShadowError
from core.estimate import GRAFT_BYTES, comparing_memory_bytes, training_memory_bytes
from core.graft_plan import GraftPlan, Selection, is_linear, plan_graft, plan_saved, smallest_linear_dimension
from core.hub import pin
from core.job_spec import (
    DataSource,
    DeltaSource,
    Evaluation,
    Graft,
    JobSpec,
    ModelSource,
    PairSource,
    Publish,
    Tuning,
)
from core.jobs import NewEvent
from core.models import File, Job, Team
from core.storage import Storage
from worker.pipeline import Context

#: The paper's recipe (arXiv 2505.12716, and its code).
PAPER_EPOCHS = 1
PAPER_BATCH_SIZE = 32
PAPER_RANK = 128
PAPER_LEARNING_RATE = {"lora": 2e-4, "full": 1e-5}

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Admission:
    """A job with nothing left to decide, and what it will take on either device."""

    spec: JobSpec
    cpu_bytes: int
    gpu_bytes: int
    notes: Sequence[NewEvent]


def admit_waiting(context: Context) -> int:
    """Admit or refuse every job whose files are ready; the number of jobs that left `validating_files`."""
    with context.database.reading() as session:
        waiting = session.scalars(select(Job.id).where(jobs.admissible()).order_by(Job.id)).all()
    return sum(_admit(context, job_id) for job_id in waiting if not context.draining.is_set())


def _admit(context: Context, job_id: str) -> bool:
    structlog.contextvars.bind_contextvars(job_id=job_id)
    try:
        with context.database.reading() as session:
            job = session.get_one(Job, job_id)
            team = session.get_one(Team, job.team_id)
            weigh = _to_weigh(session, job, team)
        return weigh is not None and _let_in(context, job_id, weigh(context))
    except ShadowError as error:
        return _turn_down(context, job_id, error.cause)
    except OperationalError:  # the database is away: the sweep asks again
        raise
    except Exception:  # a job that nobody foresaw must not hold up those behind it
        log.exception("admission_crashed")
        return _turn_down(context, job_id, _our_fault())
    finally:
        structlog.contextvars.unbind_contextvars("job_id")


def _turn_down(context: Context, job_id: str, cause: Cause) -> bool:
    with context.database.writing() as session:
        if cause.retryable:  # the Hub is away, say
            jobs.postpone(session, job_id, cause, max_retries=context.settings.max_infra_retries)
            refused = False
        else:
            refused = jobs.refuse(session, job_id, cause)
        session.commit()
    log.info("job_refused" if refused else "admission_delayed", code=cause.code, cause=cause.message)
    return refused


def _our_fault() -> Cause:
    return Cause(
        code="internal_error",
        message="The job could not be prepared because of an unexpected error.",
        hint="The operator finds it in the log of the light worker.",
        fault="infrastructure",
    )


def _to_weigh(session: Session, job: Job, team: Team) -> Callable[[Context], Admission] | None:
    """What is left to do without the database: models may be far away. None while a file is still being checked."""
    if job.kind == "graft":
        learned = JobSpec.model_validate(session.get_one(Job, job.request["delta"]["job_id"]).spec)
        data = {file_id: session.get(File, file_id) for file_id in job.files.values()}
        return partial(weigh_graft, job=job, team=team, learned=learned, data=data)
    files = _ready_files(session, job)
    return partial(weigh_fine_tune, job=job, team=team, files=files) if files is not None else None


def _let_in(context: Context, job_id: str, admission: Admission) -> bool:
    with context.database.writing() as session:
        admitted = jobs.admit(
            session,
            job_id,
            admission.spec,
            memory_bytes=admission.cpu_bytes,
            gpu_memory_bytes=admission.gpu_bytes,
            notes=admission.notes,
        )
        session.commit()
    nudge("work")
    log.info("job_admitted", memory_bytes=admission.cpu_bytes)
    return admitted


# --- a fine-tuning job ----------------------------------------------------------------------------------------------


def weigh_fine_tune(context: Context, *, job: Job, team: Team, files: dict[str, File]) -> Admission:
    pair = _pinned(PairSource.model_validate(job.request["pair"]))
    cache = context.settings.model_cache_dir
    base, instruct = _headers(pair.base, cache), _headers(pair.instruct, cache)
    start = base if job.request["shadow"]["strategy"] == "shadow" else instruct
    report: dict[str, Any] = files[job.training_file_id].report  # type: ignore[assignment]  # a processed file has one
    rows = report["rows"]
    spec = make_spec(job, files, pair=pair, team_name=team.name, start=start, rows=rows)
    # Direct tuning is the same graft with Instruct in the place of Base.
    plan = plan_graft(instruct, start, selection=selection_of(spec))
    _require_something_to_learn(spec, plan)
    cpu_bytes, gpu_bytes = (
        training_memory_bytes(
            start, spec.tuning, rows=rows, longest_row=report["longest_row"]["characters"], device=device
        )
        for device in ("cpu", "cuda")
    )
    return Admission(spec, cpu_bytes, gpu_bytes, [*_remarks(plan.remarks), _chosen(spec)])


def selection_of(spec: JobSpec) -> Selection:
    return Selection(spec.scope, spec.graft.include, spec.graft.exclude)


def _require_something_to_learn(spec: JobSpec, plan: GraftPlan) -> None:
    """LoRA moves the weights of linears alone, so a graft of none of them would train in vain."""
    if spec.tuning.type == "lora" and not any(name.endswith("weight") and is_linear(name) for name in plan.grafted):
        raise InvalidInput(
            f"LoRA changes the weights of linears alone, and the patterns leave none of them to graft: include "
            f"{list(spec.graft.include)}, exclude {list(spec.graft.exclude)}. Widen them, or use full tuning.",
            param="shadow.graft.include",
        )


def _remarks(remarks: Sequence[str]) -> list[NewEvent]:
    if not remarks:
        return []
    return [NewEvent(f"The models differ, harmlessly: {'; '.join(remarks)}", data={"remarks": list(remarks)})]


def make_spec(
    job: Job, files: dict[str, File], *, pair: PairSource, team_name: str, start: Checkpoint, rows: int
) -> JobSpec:
    """Every choice made. `start` is the checkpoint that will be tuned."""
    shadow = job.request["shadow"]
    evaluation = shadow["evaluation"]
    return JobSpec(
        job_id=job.id,
        kind="fine_tune",
        strategy=shadow["strategy"],
        pair=pair,
        training=_source(files[job.training_file_id]),
        validation=_source(files[job.validation_file_id]) if job.validation_file_id else None,
        holdout_ratio=evaluation["holdout_ratio"],
        seed=job.seed,
        tuning=_tuning(job.request, start, rows),
        graft=Graft.model_validate(shadow["graft"]),
        evaluation=Evaluation(
            scales=tuple(evaluation["scales"]),
            exact_match=evaluation["exact_match"],
            max_rows=evaluation["max_rows"],
            max_new_tokens=evaluation["max_new_tokens"],
            probes={name: _source(files[file_id]) for name, file_id in evaluation["probes"].items()},
        ),
        publish=Publish.model_validate(shadow.get("publish", {})),  # a job from before this option waits without it
        fine_tuned_model=_model_name(job, pair, team_name),
    )


def _model_name(job: Job, pair: PairSource, team_name: str) -> str:
    return f"ft:{pair.name}:{team_name}:{job.suffix or ''}:{job.id[-8:]}"


def _tuning(request: dict[str, Any], start: Checkpoint, rows: int) -> Tuning:
    asked, hyperparameters = request["shadow"]["tuning"], request["hyperparameters"]
    rank = _rank(asked, start)
    return Tuning(
        type=asked["type"],
        n_epochs=_or(hyperparameters["n_epochs"], PAPER_EPOCHS),
        batch_size=_or(hyperparameters["batch_size"], min(PAPER_BATCH_SIZE, rows)),
        learning_rate=_learning_rate(asked, hyperparameters),
        lr_scheduler=asked["lr_scheduler"],
        warmup_ratio=asked["warmup_ratio"],
        weight_decay=asked["weight_decay"],
        max_grad_norm=asked["max_grad_norm"],
        max_length=asked["max_length"],
        precision=asked["precision"],
        rank=rank,
        alpha=_or(asked["alpha"], 2 * rank) if rank else 0,
        dropout=asked["dropout"] if rank else 0.0,
    )


def _rank(asked: dict[str, Any], start: Checkpoint) -> int:
    """0 for full tuning. `auto` is the paper's, or the smallest dimension of a linear where that is smaller."""
    if asked["type"] == "full":
        return 0
    smallest = smallest_linear_dimension(start)
    rank: int = _or(asked["rank"], min(PAPER_RANK, smallest))
    if rank > smallest:
        raise InvalidInput(
            f"shadow.tuning.rank is {rank}, but the smallest linear of the model has dimension {smallest}: a larger "
            "rank adds nothing. Use that or less, or full tuning.",
            param="shadow.tuning.rank",
        )
    return rank


def _learning_rate(asked: dict[str, Any], hyperparameters: dict[str, Any]) -> float:
    chosen: float = _or(asked["learning_rate"], PAPER_LEARNING_RATE[asked["type"]])
    return chosen * float(_or(hyperparameters["learning_rate_multiplier"], 1.0))


def _or(value: Any, default: Any) -> Any:
    return default if value == "auto" else value


def _chosen(spec: JobSpec) -> NewEvent:
    tuning = spec.tuning
    how = f"LoRA of rank {tuning.rank}" if tuning.type == "lora" else "full tuning"
    steps = f"{tuning.n_epochs} epochs, batch size {tuning.batch_size}, learning rate {tuning.learning_rate:g}"
    return NewEvent(
        f"Chosen: {how}, {steps}",
        data=tuning.model_dump(mode="json"),
    )


def _source(file: File) -> DataSource:
    return DataSource(file_id=file.id, filename=file.filename, storage_key=file.storage_key, sha256=file.sha256)


# --- a graft --------------------------------------------------------------------------------------------------------


def weigh_graft(context: Context, *, job: Job, team: Team, learned: JobSpec, data: dict[str, File | None]) -> Admission:
    """`learned` is the spec of the job whose change is grafted, `data` what a comparison reads: by id, and None for a
    file that has been deleted since."""
    delta = DeltaSource.model_validate(job.request["delta"])
    target = PairSource.model_validate(job.request["pair"])
    pair = PairSource(name=target.name, base=learned.start, instruct=pin(target.instruct))
    spec = make_graft_spec(job, learned, delta, pair=pair, team_name=team.name, left_out=_left_out(job, data))
    cache = context.settings.model_cache_dir
    instruct = _headers(pair.instruct, cache)
    base = _headers_if_there(pair.base, cache) if delta.kind == "adapter" else None  # a saved delta has base's config
    notes = _remarks(plan_delta(delta, instruct, base, selection_of(spec), context.storage))
    if delta.kind == "adapter" and base is None:
        notes.append(
            NewEvent(
                f"The model that {delta.job_id} tuned cannot be read any more: the adapter was compared with "
                f"{target.name} by its shapes alone",
                "warn",
            )
        )
    if spec.evaluation.left_out is not None:
        notes.append(NewEvent(f"The models will not be compared: {spec.evaluation.left_out}"))
        return Admission(spec, GRAFT_BYTES, GRAFT_BYTES, notes)
    rows = spec.evaluation.max_rows
    longest = min(spec.tuning.max_length, max(_longest_row(file) for file in data.values() if file))
    cpu_bytes, gpu_bytes = (
        comparing_memory_bytes(instruct, rows=rows, longest_row=longest, device=device) for device in ("cpu", "cuda")
    )
    return Admission(spec, cpu_bytes, gpu_bytes, notes)


def make_graft_spec(
    job: Job, learned: JobSpec, delta: DeltaSource, *, pair: PairSource, team_name: str, left_out: str | None
) -> JobSpec:
    """Rows, seed and tuning stay those of the job that learned."""
    asked = job.request["evaluation"]
    given = {name: asked[name] for name in ("max_rows", "max_new_tokens", "exact_match") if asked[name] is not None}
    compared = {**given, "scales": tuple(asked["scales"]), "left_out": left_out}
    return learned.model_copy(
        update={
            "job_id": job.id,
            "kind": "graft",
            "strategy": "shadow",  # whatever it was tuned by: from here on it is a change like any other
            "pair": pair,
            "graft": Graft.model_validate(job.request["graft"]),
            "evaluation": learned.evaluation.model_copy(update=compared),
            "publish": Publish(),
            "delta": delta,
            "fine_tuned_model": _model_name(job, pair, team_name),
        }
    )


def _left_out(job: Job, data: dict[str, File | None]) -> str | None:
    if not job.request["evaluation"]["compare"]:
        return "it was not asked for"
    gone = [file_id for file_id, file in data.items() if file is None]
    return f"the source job's data has been deleted since ({', '.join(gone)})" if gone else None


def _longest_row(file: File) -> int:
    report: dict[str, Any] = file.report  # type: ignore[assignment]  # it was trained or measured on, so it was checked
    characters: int = report["longest_row"]["characters"]
    return characters


def _headers_if_there(source: ModelSource, cache: Path) -> Checkpoint | None:
    """None for a model that is gone: an adapter can be grafted without it."""
    try:
        return _headers(source, cache)
    except InvalidInput:
        return None


def plan_delta(
    delta: DeltaSource, instruct: Checkpoint, base: Checkpoint | None, selection: Selection, storage: Storage
) -> tuple[str, ...]:
    """Refuse a published change that does not fit `instruct`, by headers alone; what is remarkable where it does.
    `base` is what an adapter was trained on."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / delta.job_id
        for file in delta.files:
            if not storage.path(file.storage_key).exists():
                raise _artifact_gone(delta, file.path)
            storage.fetch(file.storage_key, folder / file.path)
        try:
            if delta.kind == "adapter":
                return plan_adapter(instruct, read_adapter(folder), base, selection=selection).remarks
            return plan_saved(instruct, read_delta(folder), selection=selection).remarks
        except PairRefused as error:
            raise PairRefused(error.reasons, param="target") from None


def _artifact_gone(delta: DeltaSource, path: str) -> InvalidInput:
    return InvalidInput(
        f"The artifact {delta.kind}/{path} of the job {delta.job_id} is not in the server's storage any more.",
        code="artifact_missing",
        param="source",
        hint="Restore the storage folder from its backup, or train again.",
    )


# --- files ----------------------------------------------------------------------------------------------------------


def _ready_files(session: Session, job: Job) -> dict[str, File] | None:
    """The job's files by id, once all are checked. None while one still is; raises InvalidInput for a bad one."""
    files: dict[str, File] = {}
    for param, file_id in job.files.items():
        file = session.get(File, file_id)
        if file is None:
            raise InvalidInput(
                f"The file {file_id} was deleted before the job began.", code="file_not_found", param=param
            )
        if file.status == "error":
            raise InvalidInput(
                f"The file {file_id} ({file.filename}) cannot be used: {file.status_details}",
                code="invalid_training_file",
                param=param,
                hint=f"GET /v1/files/{file_id}/report lists the rows.",
            )
        if file.status == "uploaded":
            return None
        files[file_id] = file
    return files


# --- models ---------------------------------------------------------------------------------------------------------


def _pinned(pair: PairSource) -> PairSource:
    return pair.model_copy(update={"base": pin(pair.base), "instruct": pin(pair.instruct)})


def _headers(source: ModelSource, cache: Path) -> Checkpoint:
    if source.kind == "local":
        return read_checkpoint(Path(source.location))
    return read_hub_checkpoint(source.location, str(source.revision), cache_dir=cache)
