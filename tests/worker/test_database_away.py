"""A database that is away for less than a lease costs a job nothing: real children, and real absences."""

from __future__ import annotations

import json
import sqlite3
import threading
from contextlib import closing, contextmanager

import pytest
from sqlalchemy import event, func, select
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from core.models import Artifact, JobEvent
from tests.core.test_jobs import claim, read
from tests.servers import wait_until
from tests.worker import test_job_life as life
from tests.worker.test_job_life import LONG, Working, at_step, begun, said, saved
from tests.worker.test_publish import leave_results
from worker import inputs, pipeline

context, job_id, toy = life.context, life.job_id, life.toy
on_sqlite = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """What takes seconds takes tenths."""
    monkeypatch.setattr("core.db.SQLITE_BUSY_TIMEOUT_MS", 200)
    monkeypatch.setattr("worker.lease.AGAIN_SECONDS", 0.1)
    monkeypatch.setattr("worker.step_runner.RECORD_SECONDS", 0.1)


@pytest.fixture
def away(backend, settings, request):
    """`with away():` nobody can write to the database."""

    @contextmanager
    def locked():
        with closing(sqlite3.connect(settings.data_dir / "shadowft.db", isolation_level=None, timeout=10)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
            other.execute("ROLLBACK")

    @contextmanager
    def refusing():
        postgres = request.getfixturevalue("postgres")
        postgres.take_away(settings.database)
        try:
            yield
        finally:
            postgres.bring_back(settings.database)

    return locked if backend == "sqlite" else refusing


def failures(logs, name):
    return sum(entry["event"] == name for entry in logs)


def costs(job):
    return job.attempt, job.lost_count, job.infra_retries, job.stall_count, job.disk_waits, job.oom_level


NOTHING = (1, 0, 0, 0, 0, 0)


def test_a_training_goes_on_meanwhile_and_what_it_says_is_kept(context, job_id, toy, away):
    toy(**LONG, notes=True)
    working = Working(context)
    at_step(context, job_id, 5)
    with capture_logs() as logs, away():
        wait_until(lambda: failures(logs, "lines_kept") > 1)
    reached = len(said(context, job_id, "Made step"))
    wait_until(lambda: len(said(context, job_id, "Made step")) > reached)
    context.draining.set()
    working.leaves()

    job = read(context.database, job_id)
    assert (job.status, costs(job), begun(context, job_id)) == ("queued", NOTHING, [0])
    (step,) = saved(context, job_id)
    assert said(context, job_id, "Made step") == [f"Made step {number}" for number in range(1, step + 1)]


@on_sqlite
def test_a_job_that_ends_meanwhile_is_settled_afterwards(context, job_id, toy, away):
    toy(steps=2, grafting=0.5)
    working = Working(context)
    wait_until(lambda: read(context.database, job_id).phase == "grafting", seconds=40)
    with capture_logs() as logs, away():
        wait_until(lambda: failures(logs, "database_away") > 1)
    working.leaves()
    job = read(context.database, job_id)
    assert (life.ended_well(job), costs(job)) == (True, NOTHING)


@on_sqlite
def test_a_success_whose_commit_fails_is_written_once_more_and_whole(context, job_id):
    held = claim(context.database, lease=20)
    with pipeline._lease(context, held) as lease:
        run = pipeline._open(context, held, lease)
        inputs.fetch(run.spec, run.workspace, storage=context.storage, settings=context.settings, check=lease.check)
        leave_results(run.workspace, run.spec)
        fails = [True]

        @event.listens_for(context.database.engine, "commit")
        def fail_once(_connection):
            if threading.current_thread() is threading.main_thread() and fails:
                fails.pop()
                raise OperationalError("COMMIT", {}, None)

        pipeline._publish(run)

    job = read(context.database, job_id)
    assert (job.status, costs(job), fails) == ("succeeded", NOTHING, [])
    with context.database.reading() as session:
        published = set(session.scalars(select(Artifact.path)))
        told = session.scalar(select(func.count()).select_from(JobEvent))
    listed = json.loads(context.storage.path(f"jobs/{job_id}/a1/manifest.json").read_bytes())["files"]
    assert published == {*listed, "manifest.json"}
    assert (told, len(job.result_file_ids)) == (job.event_count, 1)


@on_sqlite
def test_a_lease_that_runs_out_meanwhile_ends_the_work_and_raises_nothing(context, job_id, toy, away):
    context.settings.lease_seconds = 2
    toy(**LONG)
    working = Working(context)
    at_step(context, job_id, 2)
    with away():
        working.leaves()
    job = read(context.database, job_id)
    assert (job.status, costs(job)) == ("running", NOTHING)  # it is the sweep's now
