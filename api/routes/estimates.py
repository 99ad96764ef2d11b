"""What a job would take, before it is submitted: tokens, steps, memory, disk, time, and whether a worker can hold it.

Nothing is created and no GPU is asked; models are known by their headers alone.
"""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitedTooLong
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.deps import CallerDep, Service, ServiceDep
from api.routes.jobs import Hyperparameters, JobRequest, new_job
from api.strict_json import StrictRoute
from core.checkpoints import Checkpoint
from core.errors import Conflict
from core.estimate import DiskBytes, disk_bytes, token_range, training_memory_bytes
from core.graft_plan import Selection, plan_graft
from core.history import Kind, Range, device_kind, time_ranges
from core.hub import hub_away, pin, snapshot_at_hand
from core.ids import new_id
from core.job_spec import JobSpec, ModelSource, PairSource, Tuning
from core.jobs import LivingLane, Phase, living_lanes
from core.models import File, Job, PhaseTime, Team
from core.pairs import checked_source
from core.resolve import epochs_and_batch, held_out_count, make_spec, require_something_to_learn, selection_of
from core.verdict import Finding, FirstStage, examine, verdict_of

router = APIRouter(prefix="/fine_tuning/jobs/estimate", tags=["Fine-tuning jobs"], route_class=StrictRoute)

#: How long the headers of a Hub's models may take. Who waits longer hears that the Hub is slow.
HEADER_SECONDS = 8.0
#: Earlier jobs on the pair whose tokens are compared with their characters.
TOKEN_JOBS = 5
#: By how much a file's tokens may be more or fewer than other files of the team, which were counted, let expect.
OTHER_FILES = 0.15

DEVICES = ("cpu", "cuda")

#: So many requests at once may wait for a Hub: one that hangs must not take every thread.
_hub_readers = threading.BoundedSemaphore(8)


class Span(BaseModel):
    """Seconds of one phase."""

    low: float = Field(description="The least.")
    high: float = Field(description="The most.")


class TokenEstimate(BaseModel):
    """Of the training rows of one epoch; a row longer than `max_length` is cut there."""

    low: int = Field(description="The fewest, the chat format's among them.")
    high: int = Field(description="The most; the same where they were counted.")
    source: Literal["counted", "other_files", "characters"] = Field(
        description="`counted`: an earlier job of this pair trained on this very file. `other_files`: by the tokens "
        "that other files of the team had for each character with this pair. `characters`: by the number of characters "
        "alone."
    )


class DiskEstimate(BaseModel):
    download: int = Field(description="Bytes of models that the service's cache does not hold yet.")
    workspace: int = Field(description="Bytes that the worker needs while the job runs.")
    artifacts: int = Field(description="Bytes that are kept until the model is deleted.")
    free: int = Field(description="Bytes free in the data folder of the server that answers.")


class TimeEstimate(BaseModel):
    """Seconds from the job's start to its end, by how long earlier jobs took on this deployment."""

    low: float = Field(description="The least.")
    high: float = Field(description="The most.")
    device: str = Field(description="Where the earlier jobs ran: `cpu` or `cuda`.")
    phases: dict[str, Span] = Field(description="The same for each phase.")


class LaneEstimate(BaseModel):
    """A worker that is alive and takes jobs."""

    device: str = Field(description="What it trains on.")
    memory_bytes: int = Field(description="What one job may use there.")
    fits: bool | None = Field(description="Null: the models' headers could not be read.")


class EstimateFinding(BaseModel):
    """One thing that was found."""

    level: Literal["note", "warn", "refuse"] = Field(description="A note asks for nothing.")
    code: str = Field(description="Stable; programs may test for it.")
    message: str = Field(description="A sentence that names the values found.")
    remedy: str = Field(description="What to do about it; empty where there is nothing to do.")


class EstimateObject(BaseModel):
    """What a job would take. Nothing was created."""

    object: Literal["fine_tuning.job.estimate"] = Field(
        "fine_tuning.job.estimate", description="Always `fine_tuning.job.estimate`."
    )
    model: str = Field(description="As the request named it.")
    pair: str = Field(description="The pair that was meant.")
    rows: int = Field(description="Rows trained on in each epoch.")
    rows_held_out: int = Field(description="Rows that the models are compared on.")
    tokens: TokenEstimate = Field(description="Of one epoch.")
    steps: int = Field(description="Optimizer steps.")
    hyperparameters: dict[str, Any] = Field(description="With a number for every `auto`.")
    tuning: dict[str, Any] | None = Field(
        description="`shadow.tuning` with a number for every `auto`. Null: the models' headers could not be read."
    )
    memory_bytes: dict[str, int] | None = Field(
        description="What a lane must hold: on a `cpu`, on a GPU (`cuda`). Errs on the high side. Null: as above."
    )
    disk_bytes: DiskEstimate | None = Field(description="Null: as above.")
    seconds: TimeEstimate | None = Field(description="Null: `seconds_unknown` says why.")
    seconds_unknown: str | None = Field(description="Why no time is told. Null: one is.")
    fits: bool | None = Field(
        description="Whether a running worker can hold the job. Null: `lanes` is empty, or as above."
    )
    lanes: list[LaneEstimate] = Field(description="The workers that are alive.")
    verdict: Literal["ok", "warn", "refuse"] = Field(description="`refuse`: the job would fail in its admission.")
    findings: list[EstimateFinding] = Field(description="What speaks against the job, or should be known.")


@dataclass(frozen=True)
class Asked:
    """The request, and what the database knows about it."""

    job: Job
    team: Team
    files: Mapping[str, File]
    tokens: TokenEstimate
    lanes: Sequence[LivingLane]

    @property
    def report(self) -> dict[str, Any]:
        return _report(self.files[self.job.training_file_id])

    @property
    def rows_held_out(self) -> int:
        if self.job.validation_file_id is not None:
            return int(_report(self.files[self.job.validation_file_id])["rows"])
        return held_out_count(self.report["rows"], self.job.request["shadow"]["evaluation"]["holdout_ratio"])

    @property
    def rows(self) -> int:
        rows: int = self.report["rows"]
        return rows if self.job.validation_file_id is not None else rows - self.rows_held_out

    @property
    def pair(self) -> PairSource:
        return PairSource.model_validate(self.job.request["pair"])


@dataclass(frozen=True)
class Weighed:
    """The job as it would be admitted, and its models."""

    spec: JobSpec
    start: Checkpoint
    instruct: Checkpoint
    memory: Mapping[str, int]
    disk: DiskBytes


@router.post("", response_model=EstimateObject)
def estimate_job(body: JobRequest, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """What the job that this body asks for would take. The same body is checked as by `POST /v1/fine_tuning/jobs`, and
    nothing is created. The files must have been checked (`status` is `processed`).

    Tokens are counted where an earlier job trained on the file with this pair, and else a range. Time is a range as
    well, by how long earlier jobs took here; without such jobs it is null, and `seconds_unknown` says so.
    """
    with service.database.reading() as session:
        job = new_job(session, body, caller)
        job.id = new_id("ftjob-")
        files = {file_id: _checked_file(session, param, file_id) for param, file_id in job.files.items()}
        asked = Asked(
            job=job,
            team=session.get_one(Team, caller.team_id),
            files=files,
            tokens=_tokens(session, job, files),
            lanes=living_lanes(session, "jobs", stale_worker_seconds=service.settings.lease_seconds),
        )
    first = _examine(asked, service)
    weighed = _weigh(asked, first, service) if verdict_of(first.findings) != "refuse" else None
    with service.database.reading() as session:
        return _answer(session, asked, first, weighed, service)


# --- what the database knows ------------------------------------------------------------------------------------------


def _checked_file(session: Session, param: str, file_id: str) -> File:
    file = session.get_one(File, file_id)
    if file.report is None:
        raise Conflict(
            f"The file {file_id} is still being checked; ask again once its status is 'processed'.",
            code="file_not_checked",
            param=param,
        )
    return file


def _report(file: File) -> dict[str, Any]:
    report: dict[str, Any] = file.report  # type: ignore[assignment]  # `_checked_file` has seen it
    return report


def _tokens(session: Session, job: Job, files: Mapping[str, File]) -> TokenEstimate:
    """Of one epoch, held-out rows taken off by their share."""
    report = _report(files[job.training_file_id])
    share = _trained_share(job.request, report["rows"], validated=job.validation_file_id is not None)
    earlier = session.execute(
        select(PhaseTime.work, Job, File.report)
        .join(Job, Job.id == PhaseTime.job_id)
        .join(File, File.id == Job.training_file_id)
        .where(
            PhaseTime.phase == "training",
            PhaseTime.pair == job.request["pair"]["name"],
            Job.team_id == job.team_id,
            Job.spec[("tuning", "max_length")].as_integer() == job.request["shadow"]["tuning"]["max_length"],
        )
        .order_by(PhaseTime.id.desc())
        .limit(TOKEN_JOBS)
    ).all()
    per_character = {
        row.Job.training_file_id: row.work
        / row.Job.spec["tuning"]["n_epochs"]
        / _trained_characters(row.Job, row.report)
        for row in earlier
    }
    characters = report["characters"] * share
    if counted := per_character.get(job.training_file_id):
        return TokenEstimate(low=round(counted * characters), high=round(counted * characters), source="counted")
    if per_character:
        low, high = min(per_character.values()) * (1 - OTHER_FILES), max(per_character.values()) * (1 + OTHER_FILES)
        return TokenEstimate(low=round(low * characters), high=round(high * characters), source="other_files")
    fewest, most = token_range(round(characters), round(report["rows"] * share))
    longest = job.request["shadow"]["tuning"]["max_length"] * math.ceil(report["rows"] * share)
    return TokenEstimate(low=min(fewest, longest), high=min(most, longest), source="characters")


def _trained_characters(job: Job, report: dict[str, Any]) -> float:
    share = _trained_share(job.request, report["rows"], validated=job.validation_file_id is not None)
    return max(float(report["characters"]) * share, 1.0)


def _trained_share(request: dict[str, Any], rows: int, *, validated: bool) -> float:
    if validated:
        return 1.0
    return 1 - held_out_count(rows, request["shadow"]["evaluation"]["holdout_ratio"]) / max(rows, 1)


# --- what the models' headers say -------------------------------------------------------------------------------------


def _examine(asked: Asked, service: Service) -> FirstStage:
    """Raises Unavailable where the Hub does not answer in time."""
    shadow, pair, settings = asked.job.request["shadow"], asked.pair, service.settings
    direct, graft = shadow["strategy"] == "direct", shadow["graft"]

    def settle(source: ModelSource) -> ModelSource:
        return pin(checked_source(source, settings.model_roots), settings.model_cache_dir)

    read = partial(
        examine,
        pair.base,
        pair.instruct,
        settle=settle,
        cache=settings.model_cache_dir,
        selection=Selection("all" if direct else graft["scope"], tuple(graft["include"]), tuple(graft["exclude"])),
        without_base=direct,
    )
    if pair.base.kind == pair.instruct.kind == "local":
        return read()
    try:
        return _in_time(read)
    except WaitedTooLong:
        raise hub_away(pair.instruct.location, f"has not answered within {HEADER_SECONDS:g} s") from None


def _in_time(read: Callable[[], FirstStage]) -> FirstStage:
    """What `read` returns, if it does so soon; one that is left behind ends with the Hub client's own patience."""
    if not _hub_readers.acquire(timeout=HEADER_SECONDS):
        raise WaitedTooLong
    done: Future[FirstStage] = Future()

    def work() -> None:
        try:
            done.set_result(read())
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            done.set_exception(error)
        finally:
            _hub_readers.release()

    threading.Thread(target=work, name="headers", daemon=True).start()
    return done.result(HEADER_SECONDS)


def _weigh(asked: Asked, first: FirstStage, service: Service) -> Weighed:
    instruct = first.heads["instruct"].checkpoint
    start = first.heads.get("base", first.heads["instruct"]).checkpoint
    pair = PairSource(name=asked.pair.name, base=first.base, instruct=first.instruct)
    spec = make_spec(
        asked.job, dict(asked.files), pair=pair, team_name=asked.team.name, start=start, rows=asked.report["rows"]
    )
    require_something_to_learn(spec, plan_graft(instruct, start, selection=selection_of(spec)))
    longest = asked.report["longest_row"]["characters"]
    memory = {
        device: training_memory_bytes(start, spec.tuning, rows=asked.report["rows"], longest_row=longest, device=device)
        for device in DEVICES
    }
    # The base of direct tuning is fetched as well; its headers are not read, and it is as large as instruct.
    download = (0 if _is_at_hand(first.base, service) else start.total_bytes) + (
        0 if _is_at_hand(first.instruct, service) else instruct.total_bytes
    )
    return Weighed(spec, start, instruct, memory, disk_bytes(spec, start, instruct, download=download))


def _is_at_hand(source: ModelSource, service: Service) -> bool:
    if source.kind == "local":
        return True
    return snapshot_at_hand(service.settings.model_cache_dir, source.location, str(source.revision)) is not None


# --- the answer -------------------------------------------------------------------------------------------------------


def _answer(
    session: Session, asked: Asked, first: FirstStage, weighed: Weighed | None, service: Service
) -> dict[str, Any]:
    request = asked.job.request
    n_epochs, batch_size = epochs_and_batch(request["hyperparameters"], asked.report["rows"])
    multiplier = request["hyperparameters"]["learning_rate_multiplier"]
    free = shutil.disk_usage(service.settings.data_dir).free
    lanes = [_lane(lane, weighed) for lane in asked.lanes]
    seconds, unknown = _seconds(session, asked, weighed)
    findings = [*map(_seen_from_here, first.findings), *_own_findings(asked, weighed, lanes, free)]
    return {
        "object": "fine_tuning.job.estimate",
        "model": asked.job.model,
        "pair": asked.pair.name,
        "rows": asked.rows,
        "rows_held_out": asked.rows_held_out,
        "tokens": asked.tokens,
        "steps": math.ceil(asked.rows / batch_size) * n_epochs,
        "hyperparameters": Hyperparameters(
            n_epochs=n_epochs,
            batch_size=batch_size,
            learning_rate_multiplier=1.0 if multiplier == "auto" else multiplier,
        ).model_dump(),
        "tuning": _shown_tuning(weighed.spec.tuning) if weighed else None,
        "memory_bytes": weighed.memory if weighed else None,
        "disk_bytes": {**vars(weighed.disk), "free": free} if weighed else None,
        "seconds": seconds,
        "seconds_unknown": unknown,
        "fits": any(lane["fits"] for lane in lanes) if lanes and weighed else None,
        "lanes": lanes,
        "verdict": verdict_of(findings),
        "findings": [finding.as_dict() for finding in findings],
    }


def _shown_tuning(tuning: Tuning) -> dict[str, Any]:
    beside = {"n_epochs", "batch_size", *(("rank", "alpha", "dropout") if tuning.type == "full" else ())}
    return tuning.model_dump(exclude=beside)


def _lane(lane: LivingLane, weighed: Weighed | None) -> dict[str, Any]:
    return {**vars(lane), "fits": _fits(lane, weighed) if weighed else None}


def _fits(lane: LivingLane, weighed: Weighed) -> bool:
    return weighed.memory[device_kind(lane.device)] <= lane.memory_bytes


def _seconds(session: Session, asked: Asked, weighed: Weighed | None) -> tuple[dict[str, Any] | None, str | None]:
    """The estimate, or why there is none."""
    if weighed is None:
        return None, "The models' headers could not be read, so nothing is known about their size."
    # A GPU, where one can hold it: the names of devices say so.
    where = sorted(device_kind(lane.device) for lane in asked.lanes if _fits(lane, weighed))
    if not where:
        return None, "No running worker can hold the job, so there is none whose pace could be taken."
    kind = Kind(asked.pair.name, weighed.spec.tuning.type, where[-1], weighed.instruct.parameter_count)
    ranges = time_ranges(session, kind, _work(asked, weighed))
    known = {phase: span for phase, span in ranges.items() if span is not None}
    if missing := [phase for phase in ranges if phase not in known]:
        return None, (
            f"No earlier {weighed.spec.tuning.type} job of this deployment tells how long "
            f"{' and '.join(missing)} takes on {kind.device} with a model of about this size."
        )
    total = sum(known.values(), Range(0, 0))
    phases = {phase: _shown_range(span) for phase, span in known.items()}
    return {**_shown_range(total), "device": kind.device, "phases": phases}, None


def _shown_range(span: Range) -> dict[str, float]:
    return {"low": round(span.low, 1), "high": round(span.high, 1)}


def _work(asked: Asked, weighed: Weighed) -> dict[Phase, Range]:
    """In the units of `core.history`."""
    spec = weighed.spec
    measured = [
        asked.rows_held_out,
        *(_report(asked.files[probe.file_id])["rows"] for probe in spec.evaluation.probes.values()),
    ]
    variants = 2 if spec.strategy == "direct" else 2 + len(spec.scales)
    rows = variants * sum(min(spec.evaluation.max_rows, rows) for rows in measured)
    epochs = spec.tuning.n_epochs
    return {
        "preparing": _exactly(weighed.disk.download),
        "training": Range(asked.tokens.low * epochs, asked.tokens.high * epochs),
        "grafting": _exactly(weighed.disk.artifacts * len(spec.scales)),
        "evaluating": _exactly(rows),
        "publishing": _exactly(weighed.disk.artifacts),
    }


def _exactly(amount: float) -> Range:
    return Range(amount, amount)


def _seen_from_here(finding: Finding) -> Finding:
    """A model that is closed to this process may be open to the workers, who have a token of their own."""
    if finding.code != "gated_model":
        return finding
    return replace(finding, level="note", remedy="A worker that has HF_TOKEN may read it; submit the job to see.")


def _own_findings(asked: Asked, weighed: Weighed | None, lanes: Sequence[dict[str, Any]], free: int) -> list[Finding]:
    """What the request, the file and the deployment say, beside the models."""
    found = []
    if warned := _report(asked.files[asked.job.training_file_id])["warnings"]:
        listed = ", ".join(f"{code} ({count})" for code, count in warned.items())
        found.append(
            Finding("warn", "file_warnings", f"The training file has rows that look odd: {listed}.",
                    f"GET /v1/files/{asked.job.training_file_id}/report shows them.")
        )  # fmt: skip
    if not lanes:
        found.append(
            Finding("warn", "no_worker", "No worker for jobs is running; the job would wait.",
                    "Start one: shadowft worker --queue jobs")
        )  # fmt: skip
    if weighed is None:
        return found
    if lanes and not any(lane["fits"] for lane in lanes):
        largest = max(lane["memory_bytes"] for lane in lanes) / 2**30
        least = min(weighed.memory.values()) / 2**30
        found.append(
            Finding("warn", "does_not_fit", f"The job needs about {least:.1f} GiB and the largest lane holds "
                    f"{largest:.1f} GiB; it would wait for a larger worker.",
                    "Use LoRA, a smaller batch_size or max_length, or a smaller model.")
        )  # fmt: skip
    needed = sum(vars(weighed.disk).values())
    if needed > free:
        found.append(
            Finding("warn", "disk_too_small", f"The job writes about {needed / 2**30:.1f} GiB and the server's data "
                    f"folder has {free / 2**30:.1f} GiB free.", "Free space, or delete models that nobody needs.")
        )  # fmt: skip
    return found
