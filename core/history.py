"""How long jobs took on this deployment, and what that says about the next one.

Each finished phase of a job's first attempt leaves a `PhaseTime`. Its `work` is counted in the unit of the phase:

    preparing    bytes of the Hub models that the job reads (0 for local folders)
    training     tokens, over all epochs
    grafting     bytes of the models written, over all scales
    evaluating   rows measured, over all models compared
    publishing   bytes published

Training and evaluating also grow with the model, so there a unit is one of those for each parameter. What does not grow
(starting a step, loading a model) is `seconds` less `busy_seconds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.jobs import Phase
from core.models import Job, PhaseTime, Worker

#: Phases of earlier jobs that are looked at, the newest first.
PHASES_LOOKED_AT = 1000
#: Jobs that an estimate is made from at most.
JOBS_USED = 10
#: A model of more or fewer parameters by this factor says nothing about how fast another one trains.
SIZE_FACTOR = 4
#: By how much a range reaches beyond the fastest and the slowest of the earlier jobs.
WIDENING = 1.25
#: Phases in which every unit of work goes through all of the model's weights.
_THROUGH_THE_MODEL = frozenset({"training", "evaluating"})


@dataclass(frozen=True)
class Range:
    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)


@dataclass(frozen=True)
class Kind:
    """What jobs must have in common to tell of each other's time."""

    pair: str
    #: `lora`, `full` or `graft`.
    tuning: str
    #: `cpu` or `cuda`.
    device: str
    #: Of the instruct model.
    parameters: int


def device_kind(device: str) -> str:
    """`cpu` or `cuda`, of a lane's device."""
    return device.partition(":")[0]


def time_ranges(session: Session, kind: Kind, work: Mapping[Phase, Range]) -> dict[Phase, Range | None]:
    """Seconds of each phase that has `work` to do; None where no earlier job tells. Jobs of the same pair are asked
    first, then those whose model is of about the same size."""
    found = session.scalars(
        select(PhaseTime)
        .where(
            PhaseTime.device == kind.device,
            PhaseTime.parameters.between(kind.parameters // SIZE_FACTOR, kind.parameters * SIZE_FACTOR),
        )
        .order_by(PhaseTime.id.desc())
        .limit(PHASES_LOOKED_AT)
    ).all()
    return {phase: _time_range(_like(found, kind, phase), kind, amount) for phase, amount in work.items()}


def _like(found: Sequence[PhaseTime], kind: Kind, phase: Phase) -> list[PhaseTime]:
    same_phase = [one for one in found if one.phase == phase and (phase != "training" or one.tuning == kind.tuning)]
    same_pair = [one for one in same_phase if one.pair == kind.pair]
    return (same_pair or same_phase)[:JOBS_USED]


def _time_range(earlier: Iterable[PhaseTime], kind: Kind, work: Range) -> Range | None:
    lows, highs = [], []
    for one in earlier:
        lows.append(_scaled(one, kind, work.low))
        highs.append(_scaled(one, kind, work.high))
    return Range(min(lows) / WIDENING, max(highs) * WIDENING) if lows else None


def _scaled(one: PhaseTime, kind: Kind, work: float) -> float:
    """What the earlier phase would have taken with this much work."""
    size = kind.parameters / one.parameters if one.phase in _THROUGH_THE_MODEL else 1.0
    return one.seconds - one.busy_seconds + one.busy_seconds * size * work / max(one.work, 1)


# --- a job that runs --------------------------------------------------------------------------------------------------


def expected_finish(job: Job, times_of: Callable[[Job], Mapping[str, float]]) -> datetime | None:
    """When a running job will probably have succeeded: the rest of its phase at its own pace, then the phases after it
    as long as the pair's earlier jobs took for them (`usual_seconds`). None while one of the two is not known."""
    if job.status != "running" or job.spec is None or job.phase_started_at is None:
        return None
    order = _phases(job.spec)
    if job.phase not in order:  # preparing: its training has not shown its pace yet; or it is being cancelled
        return None
    after = order[order.index(job.phase) + 1 :]
    times = times_of(job)
    elapsed = (datetime.now(UTC) - job.phase_started_at).total_seconds()
    rest = _rest_of_phase(job, elapsed, times)
    if rest is None or any(phase not in times for phase in after):
        return None
    return datetime.now(UTC) + timedelta(seconds=rest + sum(times[phase] for phase in after))


def _phases(spec: dict[str, Any]) -> list[str]:
    phases = ["training"] if spec["kind"] == "fine_tune" else []
    compared = ["evaluating"] if spec["evaluation"]["left_out"] is None else []
    return [*phases, "grafting", *compared, "publishing"]


def _rest_of_phase(job: Job, elapsed: float, times: Mapping[str, float]) -> float | None:
    if job.progress is not None and job.progress["step"]:
        done: float = job.progress["step"] / job.progress["total_steps"]
        return elapsed * (1 / done - 1)
    usual = times.get(str(job.phase)) if job.phase != "training" else None
    return None if usual is None else max(usual - elapsed, 0.0)


def usual_seconds(session: Session, job: Job) -> dict[str, float]:
    """Phase -> its usual seconds in earlier jobs of the same pair and tuning on the same kind of device."""
    device = session.scalar(select(Worker.device).where(Worker.id == job.worker_id))
    rows = session.execute(
        select(PhaseTime.phase, PhaseTime.seconds)
        .where(
            PhaseTime.pair == job.request["pair"]["name"],
            PhaseTime.tuning == tuning_of(job),
            PhaseTime.device == device_kind(device or "cpu"),
        )
        .order_by(PhaseTime.id.desc())
        .limit(5 * JOBS_USED)
    )
    seconds: dict[str, list[float]] = {}
    for phase, taken in rows:
        seconds.setdefault(phase, []).append(taken)
    return {phase: median(taken) for phase, taken in seconds.items()}


def tuning_of(job: Job) -> str:
    """`lora`, `full`, or `graft` for a job that trains nothing. Of an admitted job."""
    return "graft" if job.kind == "graft" else str((job.spec or {})["tuning"]["type"])
