"""What earlier jobs say about the time of the next one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from core.history import WIDENING, Kind, Range, expected_finish, time_ranges, usual_seconds
from core.models import Job, PhaseTime, Worker
from tests.core.test_jobs import make_job, make_team

KIND = Kind(pair="tiny", tuning="lora", device="cpu", parameters=1000)


@pytest.fixture
def keep(database):
    """`keep(phase, seconds, ...)`: a finished phase of an earlier job of the pair `tiny`."""
    team = make_team(database)
    job_id = make_job(database, team, "succeeded")

    def keep(phase, seconds, *, busy=0.0, work=1, **values):
        row = {"pair": "tiny", "tuning": "lora", "device": "cpu", "parameters": 1000} | values
        with database.writing() as session:
            session.add(PhaseTime(job_id=job_id, phase=phase, seconds=seconds, busy_seconds=busy, work=work, **row))
            session.commit()

    return keep


def ask(database, kind=KIND, **work):
    with database.reading() as session:
        return time_ranges(session, kind, {phase: Range(*amount) for phase, amount in work.items()})


def test_without_an_earlier_job_nothing_is_said(database):
    assert ask(database, training=(1, 1)) == {"training": None}


def test_time_grows_with_the_work_and_starting_does_not(database, keep):
    keep("training", 110.0, busy=100.0, work=50)
    assert ask(database, training=(100, 200))["training"] == Range(210 / WIDENING, 410 * WIDENING)


def test_the_fastest_and_the_slowest_of_the_earlier_jobs_are_the_range(database, keep):
    for seconds in (10.0, 30.0, 20.0):
        keep("grafting", seconds, busy=seconds, work=10)
    assert ask(database, grafting=(10, 10))["grafting"] == Range(10 / WIDENING, 30 * WIDENING)


@pytest.mark.parametrize(
    "other", [{"device": "cuda"}, {"tuning": "full"}, {"parameters": 1000 * 5, "pair": "large"}, {"parameters": 100}]
)
def test_what_was_done_otherwise_says_nothing_about_training(database, keep, other):
    keep("training", 10.0, busy=10.0, **other)
    assert ask(database, training=(1, 1)) == {"training": None}


def test_a_model_of_about_the_size_is_asked_where_the_pair_has_no_job_of_its_own(database, keep):
    keep("training", 10.0, busy=10.0, pair="other", parameters=2000)
    assert ask(database, training=(1, 1))["training"] == Range(5 / WIDENING, 5 * WIDENING)
    keep("training", 7.0, busy=7.0)
    assert ask(database, training=(1, 1))["training"] == Range(7 / WIDENING, 7 * WIDENING)


def finish_of(database, job_id):
    with database.reading() as session:
        return expected_finish(session.get_one(Job, job_id), partial(usual_seconds, session))


def running(database, **values):
    with database.writing() as session:
        session.add(
            Worker(id="worker-9", host="h", pid=1, queue="jobs", device="cpu", lane_memory_bytes=1, version="1")
        )
        session.commit()
    since = datetime.now(UTC) - timedelta(seconds=100)
    job = {"phase_started_at": since, "worker_id": "worker-9", "progress": {"step": 25, "total_steps": 100}}
    return make_job(database, make_team(database, "red"), "running", **job | values)


def test_a_running_job_ends_when_its_phase_and_those_after_it_have_taken_their_time(database, keep):
    for phase in ("grafting", "evaluating", "publishing"):
        keep(phase, 10.0)
    expected = datetime.now(UTC) + timedelta(seconds=300 + 30)
    assert abs(finish_of(database, running(database)) - expected) < timedelta(seconds=15)


def test_a_phase_without_progress_takes_what_it_usually_takes(database, keep):
    for phase, seconds in (("grafting", 130.0), ("evaluating", 10.0), ("publishing", 10.0)):
        keep(phase, seconds)
    job_id = running(database, phase="grafting", progress=None)
    expected = datetime.now(UTC) + timedelta(seconds=30 + 20)
    assert abs(finish_of(database, job_id) - expected) < timedelta(seconds=15)


@pytest.mark.parametrize("values", [{"phase": "preparing"}, {"phase": "cancelling"}, {"progress": None}])
def test_nothing_is_expected_before_the_training_has_shown_its_pace(database, keep, values):
    for phase in ("training", "grafting", "evaluating", "publishing"):
        keep(phase, 10.0)
    assert finish_of(database, running(database, **values)) is None


def test_nothing_is_expected_while_no_job_of_the_pair_has_succeeded(database):
    assert finish_of(database, running(database)) is None


@pytest.mark.parametrize("status", ["validating_files", "queued", "succeeded", "failed", "cancelled"])
def test_only_a_running_job_is_expected_to_finish(database, keep, status):
    keep("publishing", 1.0)
    assert finish_of(database, make_job(database, make_team(database, "red"), status)) is None
