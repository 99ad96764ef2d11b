"""A worker that dies, freezes, is told to go, or meets a job that kills it."""

from __future__ import annotations

import signal

import psutil
import pytest

from tests.faults.checker import check
from tests.faults.faults import freeze_outside_of_writing
from tests.servers import wait_until

#: They share their services.
pytestmark = pytest.mark.xdist_group("faults")

#: Some seconds of work: whatever a test does, it does in the middle.
LONG = {"steps": 60, "seconds": 0.1}


def test_jobs_that_nothing_befalls_end_well(service):
    ids = service.submit(5)
    service.wait(ids)
    check(service)
    assert set(service.statuses(ids)) == {"succeeded"}


def test_a_killed_workers_job_goes_on_where_it_was_saved(service):
    """F14, F16: the child goes with its worker, and the next attempt loses no more than what was not saved."""
    (job_id,) = service.submit(**LONG)
    wait_until(lambda: service.has_point(job_id), seconds=60)
    at_death = service.furthest(job_id)
    (child,) = service.children("jobs")

    service.parts["jobs"].kill()

    wait_until(lambda: not child.is_running(), seconds=2)
    service.start("jobs")
    service.wait([job_id])
    check(service)
    assert service.statuses([job_id]) == ["succeeded"]
    assert 1 < service.first_step(job_id, 2) <= at_death + 1


def test_a_frozen_worker_that_wakes_changes_nothing_any_more(service):
    """F17: another one has the job meanwhile. It wakes in the middle of the other's work."""
    service.start("jobs-2")
    (job_id,) = service.submit(**LONG)
    service.wait_for_step(job_id)
    first = service.holder(job_id)
    (child,) = service.children(first.name)
    freeze_outside_of_writing(first, service.settings)

    wait_until(lambda: service.job(job_id).attempt == 2, seconds=30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    service.wait_for_step(job_id, 3)
    first.signal(signal.SIGCONT)

    service.wait([job_id])
    wait_until(lambda: "lease_lost" in first.said())
    check(service)
    assert (service.job(job_id).attempt, service.statuses([job_id])) == (2, ["succeeded"])


def test_a_worker_that_is_told_to_go_leaves_its_job_to_another_at_no_cost(service):
    """F20: saved, queued again at once, nothing charged."""
    (job_id,) = service.submit(**LONG)
    service.wait_for_step(job_id, 5)

    assert service.parts["jobs"].stop() == 0

    job = service.job(job_id)
    assert (job.status, job.lost_count, job.infra_retries) == ("queued", 0, 0)
    done = service.furthest(job_id)
    service.start("jobs")
    service.wait([job_id])
    check(service)
    assert service.first_step(job_id, 2) == done + 1


@pytest.mark.slow
def test_a_worker_that_is_told_twice_goes_all_the_same(service):
    """F21."""
    (job_id,) = service.submit(**LONG)
    service.wait_for_step(job_id, 5)
    service.parts["jobs"].signal(signal.SIGTERM)
    service.parts["jobs"].stop()
    service.start("jobs")
    service.wait([job_id])
    check(service)
    assert service.statuses([job_id]) == ["succeeded"]


def test_a_child_that_is_deaf_is_cancelled_all_the_same(service):
    """F41."""
    (job_id,) = service.submit(act="deaf", **LONG)
    service.wait_for_step(job_id)
    with service.http as http:
        http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
    service.wait([job_id], status="cancelled", seconds=15)
    check(service)
    assert service.children() == []


@pytest.mark.slow
def test_a_job_that_kills_its_workers_is_given_up_and_others_are_not(service):
    """F48."""
    (poison,) = service.submit(act="poison")
    (other,) = service.submit()
    for _ in range(3):
        wait_until(lambda: not service.parts["jobs"].is_alive(), seconds=30)
        service.parts["jobs"].process.wait()
        service.start("jobs")
    service.wait([poison, other])
    check(service)
    assert service.statuses([poison, other]) == ["failed", "succeeded"]
    assert service.job(poison).error["code"] == "worker_lost"


@pytest.mark.slow
def test_two_workers_may_sweep_at_once_and_die_of_it(service):
    """F39: four sweep every half second, and one after the other is killed while jobs lose their leases."""
    service.start("jobs-2", "jobs-3")
    ids = service.submit(6, steps=30, seconds=0.1)
    for name in ("jobs", "jobs-2", "jobs-3"):
        wait_until(lambda name=name: service.children(name), seconds=30)
        service.parts[name].kill()
        service.start(name)
    service.wait(ids, seconds=120)
    check(service)
    assert set(service.statuses(ids)) == {"succeeded"}
    lost = {job_id: sum("stopped answering" in one for one in service.said(job_id)) for job_id in ids}
    assert lost == {job_id: service.job(job_id).attempt - 1 for job_id in ids}
    assert sum(lost.values()) >= 3  # three were killed; a busy machine may take more of them for dead
