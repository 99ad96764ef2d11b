"""validating_files -> queued: the files are ready, revisions are pinned, headers agree, every `auto` has its number.

Nothing here needs a GPU or torch, so that a job that cannot succeed is refused before it costs one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from core import jobs
from core.broker import nudge
from core.checkpoints import Checkpoint, read_checkpoint, read_hub_checkpoint
from core.errors import Cause, InvalidInput, ShadowError
from core.estimate import training_memory_bytes
from core.graft_plan import plan_graft, smallest_linear_dimension
from core.hub import pin
from core.job_spec import DataSource, Evaluation, Graft, JobSpec, ModelSource, PairSource, Tuning
from core.jobs import NewEvent
from core.models import File, Job, Team
from worker.pipeline import Context

#: The paper's recipe (arXiv 2505.12716, and its code).
PAPER_EPOCHS = 1
PAPER_BATCH_SIZE = 32
PAPER_RANK = 128
PAPER_LEARNING_RATE = {"lora": 2e-4, "full": 1e-5}

log = structlog.get_logger(__name__)


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
            files = _ready_files(session, job)
            team = session.get_one(Team, job.team_id)
        return files is not None and _resolve(context, job, files, team)
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


def _resolve(context: Context, job: Job, files: dict[str, File], team: Team) -> bool:
    pair = _pinned(PairSource.model_validate(job.request["pair"]))
    cache = context.settings.model_cache_dir
    base, instruct = _headers(pair.base, cache), _headers(pair.instruct, cache)
    scope = job.request["shadow"]["graft"]["scope"]
    plan_graft(instruct, base, scope=scope)
    start = base if job.request["shadow"]["strategy"] == "shadow" else instruct
    report: dict[str, Any] = files[job.training_file_id].report  # type: ignore[assignment]  # a processed file has one
    rows = report["rows"]
    spec = make_spec(job, files, pair=pair, team_name=team.name, start=start, rows=rows)
    memory_bytes, gpu_memory_bytes = (
        training_memory_bytes(
            start, spec.tuning, rows=rows, longest_row=report["longest_row"]["characters"], device=device
        )
        for device in ("cpu", "cuda")
    )
    with context.database.writing() as session:
        admitted = jobs.admit(
            session,
            job.id,
            spec,
            memory_bytes=memory_bytes,
            gpu_memory_bytes=gpu_memory_bytes,
            notes=[_chosen(spec)],
        )
        session.commit()
    nudge("work")
    log.info("job_admitted", memory_bytes=memory_bytes)
    return admitted


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
        graft=Graft(scale=shadow["graft"]["scale"], scope=shadow["graft"]["scope"]),
        evaluation=Evaluation(
            scales=tuple(evaluation["scales"]),
            exact_match=evaluation["exact_match"],
            max_rows=evaluation["max_rows"],
            max_new_tokens=evaluation["max_new_tokens"],
            probes={name: _source(files[file_id]) for name, file_id in evaluation["probes"].items()},
        ),
        fine_tuned_model=f"ft:{pair.name}:{team_name}:{job.suffix or ''}:{job.id[-8:]}",
    )


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
