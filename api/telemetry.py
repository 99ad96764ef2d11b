"""What `GET /metrics` tells: requests, counted in this process, and the state of jobs and workers, read at each scrape.

No label names a team, a file, a model or a path that a client chose: whoever may read the metrics need not be allowed
to know those.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import structlog
from prometheus_client import (
    CollectorRegistry,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import ColumnElement, case, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from starlette.routing import Route
from starlette.types import Scope

from core.config import Settings
from core.db import Database, db_now
from core.history import device_kind
from core.jobs import file_waits
from core.models import File, Job, PhaseTime, Worker
from core.version import VERSION

#: Seconds until an answer begins.
REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
#: Seconds of a job's phase: from what a demo takes to a week.
PHASE_BUCKETS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 3 * 24 * 3600, 7 * 24 * 3600)

#: No transaction that writes a phase's row lasts so long.
SETTLED_SECONDS = 60.0

#: By phase and device: how many phases took at most as long as each bound, how many there were, their seconds.
_Tallies = dict[tuple[str, str], list[float]]

_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_API_PREFIX = "/v1"
_KINDS = ("fine_tune", "graft")
_STATES = ("validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled")
_QUEUES = ("jobs", "light")

# A series more for each label set, which nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library leaves it so

log = structlog.get_logger("api")


class Telemetry:
    """One app's metrics, in a registry of its own."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "shadowft_http_request_duration_seconds",
            "Seconds from a request's headers to the beginning of its answer.",
            ("method", "route", "status"),
            buckets=REQUEST_BUCKETS,
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)
        self._registry.register(_State(database, settings))
        #: The histogram finds its children by formatting and hashing their labels, which every request would pay for.
        self._children: dict[tuple[str, str, int], Histogram] = {}

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request. A `status` of 0 means that the client was gone before its answer."""
        method = scope["method"] if scope["method"] in _METHODS else "other"
        key = (method, _template(scope), status)
        if key not in self._children:
            self._children[key] = self._requests.labels(*key[:2], str(status) if status else "none")
        self._children[key].observe(seconds)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


def _template(scope: Scope) -> str:
    """The route as the OpenAPI page writes it, never the path itself; `none` where no route was reached."""
    route: str | None = getattr(scope.get("route"), "path", None)
    if route is None:  # one of Starlette's own leaves its endpoint behind, and not itself
        endpoint, routes = scope.get("endpoint"), scope["app"].routes if "app" in scope else []
        plain = (known.path for known in routes if isinstance(known, Route) and known.endpoint is endpoint)
        return next(plain, "none")
    # An included router's route knows its path below the prefix alone, or all of it, by FastAPI's version.
    is_below = scope["path"].startswith(f"{_API_PREFIX}/") and not route.startswith(_API_PREFIX)
    return f"{_API_PREFIX}{route}" if is_below else route


class _State(Collector):
    """What the database knows. While it is away, that is all there is to tell."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._alive_seconds = settings.lease_seconds
        self._phases = _Phases()

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that registering asks no database."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        yield _gauge("shadowft_build_info", "1, labelled with the version that runs.", {"version": VERSION}, 1)
        try:
            with self._database.reading() as session:
                found: list[Metric] = [_jobs(session), _waiting(session), *_workers(session, self._alive_seconds)]
                found.append(self._phases.family(session))
        except DBAPIError as error:
            log.warning("metrics_without_database", error=type(error).__name__)
            found = []
        yield _gauge("shadowft_database_up", "Whether the database answered this scrape.", {}, int(bool(found)))
        yield from found


def _gauge(name: str, about: str, labels: dict[str, str], value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, about, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _jobs(session: Session) -> GaugeMetricFamily:
    family = GaugeMetricFamily("shadowft_jobs", "Jobs by kind and state.", labels=["kind", "state"])
    rows = session.execute(select(Job.kind, Job.status, func.count()).group_by(Job.kind, Job.status))
    counts = {(kind, status): count for kind, status, count in rows}
    for kind in _KINDS:
        for state in _STATES:
            family.add_metric([kind, state], counts.get((kind, state), 0))
    return family


def _waiting(session: Session) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "shadowft_oldest_waiting_seconds",
        "Age of the oldest job or file that waits: a job for a worker or for its admission, a file for its check.",
        labels=["waiting_for"],
    )
    oldest = {
        "worker": select(func.min(Job.created_at)).where(Job.status == "queued"),
        "admission": select(func.min(Job.created_at)).where(Job.status == "validating_files"),
        "file_check": select(func.min(File.created_at)).where(file_waits()),
    }
    now = _now(session)
    for name, query in oldest.items():
        since = session.scalar(query)
        family.add_metric([name], _age(now, since) if since else 0.0)
    return family


def _workers(session: Session, alive_seconds: float) -> Iterator[GaugeMetricFamily]:
    """Alive is who has beaten within a lease."""
    alive = GaugeMetricFamily("shadowft_workers", "Workers that are alive and take work.", labels=["queue", "device"])
    beat = GaugeMetricFamily(
        "shadowft_worker_last_beat_age_seconds", "Since the last beat of any worker of the queue.", labels=["queue"]
    )
    now, rows = _now(session), session.scalars(select(Worker)).all()
    for queue in _QUEUES:
        of_queue = [row for row in rows if row.queue == queue]
        taking = [
            device_kind(row.device) for row in of_queue if not row.draining and _age(now, row.beat_at) < alive_seconds
        ]
        for device in ("cpu", "cuda"):
            alive.add_metric([queue, device], taking.count(device))
        if of_queue:
            beat.add_metric([queue], min(_age(now, row.beat_at) for row in of_queue))
    return iter((alive, beat))


class _Phases:
    """Every phase that a job's first attempt finished, since the deployment began.

    Rows are only ever added, so that each is read once; the newest ones again, since one that got its number earlier
    may be committed later.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._settled: _Tallies = {}
        self._settled_up_to = 0

    def family(self, session: Session) -> HistogramMetricFamily:
        family = HistogramMetricFamily(
            "shadowft_job_phase_duration_seconds", "Seconds of finished phases of jobs.", labels=["phase", "device"]
        )
        with self._lock:
            tallies = self._read(session)
        for (phase, device), (*counts, count, total) in tallies.items():
            buckets = [(str(float(bound)), at_most) for bound, at_most in zip(PHASE_BUCKETS, counts, strict=True)]
            family.add_metric([phase, device], [*buckets, ("+Inf", count)], sum_value=total)
        return family

    def _read(self, session: Session) -> _Tallies:
        unread = PhaseTime.id > self._settled_up_to
        old = select(func.max(PhaseTime.id)).where(unread, PhaseTime.created_at < db_now(-SETTLED_SECONDS))
        if (newest := session.scalar(old)) is not None:
            self._settled = _added(self._settled, _tallies(session, unread, PhaseTime.id <= newest))
            self._settled_up_to = newest
        return _added(self._settled, _tallies(session, PhaseTime.id > self._settled_up_to))


def _tallies(session: Session, *where: ColumnElement[bool]) -> _Tallies:
    within = [func.sum(case((PhaseTime.seconds <= bound, 1), else_=0)) for bound in PHASE_BUCKETS]
    measured: list[ColumnElement[Any]] = [*within, func.count(), func.sum(PhaseTime.seconds)]
    rows = session.execute(
        select(PhaseTime.phase, PhaseTime.device, *measured).where(*where).group_by(PhaseTime.phase, PhaseTime.device)
    )
    return {(phase, device): numbers for phase, device, *numbers in rows}


def _added(one: _Tallies, two: _Tallies) -> _Tallies:
    nothing = [0.0] * (len(PHASE_BUCKETS) + 2)
    return {
        key: [a + b for a, b in zip(one.get(key, nothing), two.get(key, nothing), strict=True)] for key in one | two
    }


def _now(session: Session) -> datetime:
    """By the clock that wrote the rows."""
    now: datetime = session.execute(select(db_now())).scalar_one()
    return now


def _age(now: datetime, since: datetime) -> float:
    return max((now - since) / timedelta(seconds=1), 0.0)
