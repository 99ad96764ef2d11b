"""validating_files -> queued: the files are ready, revisions pinned, the pair is checked, every `auto` has its number.

A graft is planned here as well, from the target's headers and those of the published change.

Nothing here needs a GPU, so that a job that cannot succeed is refused before it costs one.
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
from core.graft_plan import Selection, plan_graft, plan_saved
from core.job_spec import (
    DeltaSource,
    Graft,
    JobSpec,
    ModelSource,
    PairSource,
    Publish,
)
from core.jobs import NewEvent
from core.models import File, Job, Team
from core.resolve import make_spec, model_name, require_something_to_learn, selection_of
from core.storage import Storage
from core.verdict import FirstStage, examine, verdict_of
from worker.lease import Draining
from worker.pair_check import Report, check_for_job, of_first_stage, settling
from worker.pipeline import Context

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Admission:
    """A job with nothing left to decide, and what it will take on either device."""

    spec: JobSpec
    cpu_bytes: int
    gpu_bytes: int
    notes: Sequence[NewEvent]
    #: What the job keeps of its pair's check; None for a graft, whose target is planned for by itself.
    pair_check: dict[str, Any] | None = None


class _UnfitPair(PairRefused):
    """The check of a job's pair refused it."""

    def __init__(self, report: Report) -> None:
        refusing = [finding for finding in report.findings if finding.level == "refuse"]
        super().__init__([finding.message.rstrip(".") for finding in refusing])
        self.hint = " ".join(dict.fromkeys(finding.remedy for finding in refusing if finding.remedy))
        self.pair_check = report.for_job()


def admit_waiting(context: Context) -> int:
    """Admit or refuse every job whose files are ready; the number of jobs that left `validating_files`."""
    with context.database.reading() as session:
        waiting = session.scalars(select(Job.id).where(jobs.admissible()).order_by(Job.id)).all()
    return sum(_admit(context, job_id) for job_id in waiting if not context.draining.is_set())


def _admit(context: Context, job_id: str) -> bool:
    structlog.contextvars.bind_contextvars(job_id=job_id)
    try:
        return _decide(context, job_id)
    except OperationalError:  # the database is away: the sweep asks again
        raise
    except Exception:  # a job that nobody foresaw must not hold up those behind it
        log.exception("admission_crashed")
        return _turn_down(context, job_id, _our_fault())
    finally:
        structlog.contextvars.unbind_contextvars("job_id")


def _decide(context: Context, job_id: str) -> bool:
    try:
        with context.database.reading() as session:
            job = session.get_one(Job, job_id)
            team = session.get_one(Team, job.team_id)
            weigh = _to_weigh(session, job, team)
        return weigh is not None and _let_in(context, job_id, weigh(context))
    except Draining:  # another worker admits it, or this one after its restart
        return False
    except _UnfitPair as error:
        return _turn_down(context, job_id, error.cause, pair_check=error.pair_check)
    except ShadowError as error:
        return _turn_down(context, job_id, error.cause)


def _turn_down(context: Context, job_id: str, cause: Cause, *, pair_check: dict[str, Any] | None = None) -> bool:
    with context.database.writing() as session:
        if cause.retryable:  # the Hub is away, say
            jobs.postpone(session, job_id, cause, max_retries=context.settings.max_infra_retries)
            refused = False
        else:
            refused = jobs.refuse(session, job_id, cause, pair_check=pair_check)
        session.commit()
    log.info("job_refused" if refused else "admission_delayed", code=cause.code, cause=cause.message)
    return refused


def _our_fault() -> Cause:
    return Cause(
        code="internal_error",
        message="The job could not be prepared because of an unexpected error.",
        hint="The operator finds it in the log of the light worker.",
        retryable=True,  # it may be the Hub's client, which raises what it likes
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
            pair_check=admission.pair_check,
            notes=admission.notes,
        )
        session.commit()
    nudge("work")
    log.info("job_admitted", memory_bytes=admission.cpu_bytes)
    return admitted


# --- a fine-tuning job ----------------------------------------------------------------------------------------------


def weigh_fine_tune(context: Context, *, job: Job, team: Team, files: dict[str, File]) -> Admission:
    with settling(context) as settle:
        first = _first_stage(context, job, settle)
        if verdict_of(first.findings) == "refuse":
            raise _UnfitPair(of_first_stage(first))
        return _weigh_pair(context, first, job=job, team=team, files=files)


def _weigh_pair(context: Context, first: FirstStage, *, job: Job, team: Team, files: dict[str, File]) -> Admission:
    pair = PairSource(name=job.request["pair"]["name"], base=first.base, instruct=first.instruct)
    instruct = first.heads["instruct"].checkpoint
    # Direct tuning is the same graft with Instruct in the place of Base.
    start = first.heads.get("base", first.heads["instruct"]).checkpoint
    report: dict[str, Any] = files[job.training_file_id].report  # type: ignore[assignment]  # a processed file has one
    rows = report["rows"]
    spec = make_spec(job, files, pair=pair, team_name=team.name, start=start, rows=rows)
    plan = plan_graft(instruct, start, selection=selection_of(spec))
    require_something_to_learn(spec, plan)
    cpu_bytes, gpu_bytes = (
        training_memory_bytes(
            start, spec.tuning, rows=rows, longest_row=report["longest_row"]["characters"], device=device
        )
        for device in ("cpu", "cuda")
    )
    checked = check_for_job(context, first, job_id=job.id, team_id=team.id, pair=pair)
    if checked.verdict == "refuse":
        raise _UnfitPair(checked)
    notes = [*_remarks(plan.remarks), *_verdict(checked), _chosen(spec)]
    return Admission(spec, cpu_bytes, gpu_bytes, notes, checked.for_job())


def _first_stage(context: Context, job: Job, settle: Callable[[ModelSource], ModelSource]) -> FirstStage:
    pair = PairSource.model_validate(job.request["pair"])
    shadow = job.request["shadow"]
    direct, graft = shadow["strategy"] == "direct", shadow["graft"]
    return examine(
        pair.base,
        pair.instruct,
        settle=settle,
        cache=context.settings.model_cache_dir,
        selection=Selection("all" if direct else graft["scope"], tuple(graft["include"]), tuple(graft["exclude"])),
        without_base=direct,
    )


def _verdict(report: Report) -> list[NewEvent]:
    warnings = [finding for finding in report.findings if finding.level == "warn"]
    if not warnings:
        return [NewEvent("The pair was checked, and nothing speaks against it", data={"verdict": report.verdict})]
    return [
        NewEvent(f"Pair check: {finding.message} {finding.remedy}".strip(), "warn", data=finding.as_dict())
        for finding in warnings
    ]


def _remarks(remarks: Sequence[str]) -> list[NewEvent]:
    if not remarks:
        return []
    return [NewEvent(f"The models differ, harmlessly: {'; '.join(remarks)}", data={"remarks": list(remarks)})]


def _chosen(spec: JobSpec) -> NewEvent:
    tuning = spec.tuning
    how = f"LoRA of rank {tuning.rank}" if tuning.type == "lora" else "full tuning"
    steps = f"{tuning.n_epochs} epochs, batch size {tuning.batch_size}, learning rate {tuning.learning_rate:g}"
    return NewEvent(
        f"Chosen: {how}, {steps}",
        data=tuning.model_dump(mode="json"),
    )


# --- a graft --------------------------------------------------------------------------------------------------------


def weigh_graft(context: Context, *, job: Job, team: Team, learned: JobSpec, data: dict[str, File | None]) -> Admission:
    """`learned` is the spec of the job whose change is grafted, `data` what a comparison reads: by id, and None for a
    file that has been deleted since."""
    delta = DeltaSource.model_validate(job.request["delta"])
    target = PairSource.model_validate(job.request["pair"])
    with settling(context, param="target") as settle:
        settled = settle(target.instruct)
        instruct = _headers(settled, context.settings.model_cache_dir)
    pair = PairSource(name=target.name, base=learned.start, instruct=settled)
    spec = make_graft_spec(job, learned, delta, pair=pair, team_name=team.name, left_out=_left_out(job, data))
    base = _headers_if_there(context, pair.base) if delta.kind == "adapter" else None  # a saved delta has base's config
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
            "fine_tuned_model": model_name(job, pair, team_name),
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


def _headers_if_there(context: Context, source: ModelSource) -> Checkpoint | None:
    """None for a model that is gone: an adapter can be grafted without it."""
    try:
        with settling(context) as settle:
            return _headers(settle(source), context.settings.model_cache_dir)
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


def _headers(source: ModelSource, cache: Path) -> Checkpoint:
    if source.kind == "local":
        return read_checkpoint(Path(source.location))
    return read_hub_checkpoint(source.location, str(source.revision), cache_dir=cache)
