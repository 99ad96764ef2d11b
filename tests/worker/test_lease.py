"""A lease against a real database: it renews itself, and says in time when the work must end."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import update
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from core import jobs
from core.db import db_now
from core.errors import LeaseLost
from core.models import Job
from tests.core.test_jobs import act, claim, make_job, make_team, read
from tests.servers import wait_until
from worker import lease as lease_module
from worker.lease import Cancelled, Draining, Lease, Pausing, TimeUp


@pytest.fixture
def held(database):
    make_job(database, make_team(database))
    return claim(database, lease=2)


@pytest.fixture
def draining():
    return threading.Event()


@pytest.fixture
def lease(database, settings, held, draining):
    return lease_of(database, settings, held, draining)


def lease_of(database, settings, held, draining):
    """As the pipeline makes it."""

    def beat():
        return act(database, jobs.beat, held, lease_seconds=settings.lease_seconds)

    return Lease(beat, lease_seconds=settings.lease_seconds, beat_seconds=settings.beat_seconds, draining=draining)


def stopped(lease, kind):
    """Whether `check` raises `kind` now."""
    try:
        lease.check()
    except kind:
        return True
    return False


def test_a_lease_moves_on_in_the_database_while_work_is_done(database, held, lease):
    with lease:
        first = read(database, held.job_id).lease_until
        wait_until(lambda: read(database, held.job_id).lease_until > first)
        lease.check()
        assert 0 < lease.remaining() <= 2


def test_a_lease_beats_no_more_after_its_end(database, held, lease):
    with lease:
        pass
    last = read(database, held.job_id).lease_until
    assert not any(thread.name == "lease" for thread in threading.enumerate())
    assert read(database, held.job_id).lease_until == last


def test_no_work_begins_under_a_lease_that_is_lost_already(database, held, lease):
    set_job(database, held, attempt=2)
    with pytest.raises(LeaseLost), lease:
        pytest.fail("the block was entered")


def test_a_lease_taken_by_another_attempt_is_noticed(database, held, lease):
    with lease:
        set_job(database, held, attempt=2)
        wait_until(lambda: stopped(lease, LeaseLost))
        assert lease.remaining() == 0


def test_a_lease_that_ran_out_is_not_renewed(database, held, lease):
    with lease:
        set_job(database, held, lease_until=db_now(-1))
        wait_until(lambda: stopped(lease, LeaseLost))


def set_job(database, held, **values):
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == held.job_id).values(**values))
        session.commit()


def test_a_cancel_is_heard_with_the_next_beat(database, held, lease):
    with lease:
        act(database, jobs.request_cancel, held.job_id)
        wait_until(lambda: stopped(lease, Cancelled))


def test_a_cancel_that_another_write_brought_back_is_heard_at_once(lease):
    with lease:
        lease.heard("cancel")
        with pytest.raises(Cancelled):
            lease.check()


def test_a_worker_that_shuts_down_is_heard_at_once(lease, draining):
    with lease:
        draining.set()
        with pytest.raises(Draining):
            lease.check()


def test_a_pause_is_heard_with_the_next_beat_and_a_resume_too(database, held, lease):
    with lease:
        act(database, jobs.request_pause, held.job_id)
        wait_until(lambda: stopped(lease, Pausing))
        lease.check_held()  # what saves the state may be brought to its end
        act(database, jobs.request_resume, held.job_id)
        wait_until(lambda: not stopped(lease, Pausing))


def test_a_cancel_lets_nothing_be_saved_any_more(lease):
    with lease:
        lease.heard("cancel")
        with pytest.raises(Cancelled):
            lease.check_held()


def test_the_time_of_a_job_is_up_after_what_is_left_of_it(draining):
    with Lease(lambda: "run", lease_seconds=60, beat_seconds=60, draining=draining, run_seconds=0.2) as lease:
        wait_until(lambda: stopped(lease, TimeUp))
        lease.check_held()


def test_a_lost_lease_goes_before_a_cancel_and_a_shutdown(database, held, lease, draining):
    """Who has lost the lease may not even say that the job was cancelled."""
    with lease:
        set_job(database, held, attempt=2)
        wait_until(lambda: stopped(lease, LeaseLost))
        lease.heard("cancel")
        draining.set()
        with pytest.raises(LeaseLost):
            lease.check()


class Beats:
    """Of a database that says `errors`, one after the other, behind the first beat; then it answers again."""

    def __init__(self, *errors) -> None:
        self._errors = [*errors]
        self.answered = 0

    def __call__(self) -> str:
        if self.answered and self._errors:
            raise self._errors.pop(0)
        self.answered += 1
        return "run"


def test_no_word_of_the_database_ends_the_beating(draining):
    """Not even of this process: a pool without a connection left."""
    beats = Beats(PoolTimeout("no connection left"), OperationalError("", {}, None), ProgrammingError("", {}, None))
    with Lease(beats, lease_seconds=30, beat_seconds=0.01, draining=draining):
        wait_until(lambda: beats.answered > 2)


def test_a_beat_that_failed_is_tried_again_before_the_next_one_is_due(draining, monkeypatch):
    """One that hung for most of the lease has left no time for another interval."""
    monkeypatch.setattr(lease_module, "AGAIN_SECONDS", 0.01)
    beats = Beats(*[OperationalError("", {}, None)] * 20)
    with Lease(beats, lease_seconds=3, beat_seconds=0.5, draining=draining) as lease:
        wait_until(lambda: beats.answered > 1)
        assert lease.remaining() > 0  # twenty intervals are more than three leases


def test_what_asks_the_database_is_asked_again_while_the_lease_holds(draining, monkeypatch):
    monkeypatch.setattr(lease_module, "AGAIN_SECONDS", 0.01)
    answers = iter([OperationalError("", {}, None), PoolTimeout(""), "done"])

    def act():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with Lease(lambda: "run", lease_seconds=30, beat_seconds=30, draining=draining) as lease:
        assert lease.outlast(act) == "done"
        with pytest.raises(StopIteration):  # a fault of the question, or of ours, is no matter of time
            lease.outlast(act)


@pytest.mark.parametrize("beat_seconds", [30, 0.05], ids=["beats fail too", "beats come through"])
def test_a_database_that_stays_away_is_asked_no_more_after_a_whole_lease(draining, monkeypatch, beat_seconds):
    monkeypatch.setattr(lease_module, "AGAIN_SECONDS", 0.01)

    def act():
        raise OperationalError("", {}, None)

    with (
        Lease(lambda: "run", lease_seconds=0.2, beat_seconds=beat_seconds, draining=draining) as lease,
        pytest.raises(LeaseLost, match="stayed away"),
    ):
        lease.outlast(act)


@pytest.fixture
def away(postgres, settings):
    """`away(True)` takes the database away, `away(False)` brings it back."""

    def switch(is_away):
        (postgres.take_away if is_away else postgres.bring_back)(settings.database)

    yield switch
    switch(False)


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_database_that_is_away_for_a_moment_costs_nothing(database, settings, held, draining, away):
    with lease_of(database, settings.model_copy(update={"lease_seconds": 30}), held, draining) as lease:
        away(True)
        was = lease.remaining()
        wait_until(lambda: lease.remaining() < was - 0.5)  # several beats have failed
        lease.check()
        away(False)
        wait_until(lambda: lease.remaining() > 29.5)
        lease.check()


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_database_that_stays_away_ends_the_work_before_another_can_begin(database, held, lease, away):
    with lease:
        away(True)
        wait_until(lambda: stopped(lease, LeaseLost))
        away(False)
        assert read(database, held.job_id).lease_until is not None
