"""Disks that fail instead of being full, and a process that runs out of memory or descriptors.

The kernel's answers are made by strace: it attaches to a process of the service and has calls of its fail.
"""

from __future__ import annotations

import resource
import shutil
import sqlite3
import time
from contextlib import closing, contextmanager

import psutil
import pytest
from sqlalchemy import func, select

from core.models import Job
from tests.faults.checker import check
from tests.faults.faults import failing_calls
from tests.servers import wait_until

#: They share their services.
pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.slow]

LONG = {"steps": 60, "seconds": 0.1}
SYNC_FAILS = "fsync,fdatasync:error=EIO"


def count(service):
    with service.database.reading() as session:
        return session.scalar(select(func.count()).select_from(Job))


# --- storage ----------------------------------------------------------------------------------------------------------


def test_what_a_disk_did_not_take_is_neither_recorded_nor_published(on_servers):
    """F27: from the middle of a training on, every sync of the worker fails. No later state counts, the result is not
    published, and another try goes on from the last good state."""
    service = on_servers.service
    (job_id,) = service.submit(**LONG)
    wait_until(lambda: service.has_point(job_id), seconds=60)
    with failing_calls(service.parts["jobs"].pid, SYNC_FAILS, threads_only=True) as injected:
        known = service.points(job_id)[0].step
        wait_until(lambda: service.job(job_id).status == "queued", seconds=60)
        assert injected
    job = service.job(job_id)
    assert (job.infra_retries, job.disk_waits, job.lost_count) == (1, 0, 0)
    assert service.points(job_id)[0].step <= known + 10  # one may have been on its way in as the tracer came
    assert any("could not be stored" in one for one in service.said(job_id))
    service.bring_forward(job_id)
    service.wait([job_id])
    check(service)
    assert service.statuses([job_id]) == ["succeeded"]


def test_a_saved_state_that_cannot_be_read_just_now_is_passed_over_and_not_thrown_away(on_servers):
    """F28, on another machine: the newest cannot be read, so the one before it is taken. It is whole, so that it is not
    called damaged."""
    service = on_servers.service
    (job_id,) = service.submit(**LONG)
    wait_until(lambda: len(service.points(job_id)) == 2, seconds=60)
    service.parts["jobs"].kill()
    shutil.rmtree(service.settings.work_dir)
    newest, before = service.points(job_id)
    service.start("jobs")
    digest = service.settings.storage_dir / newest.prefix / "digest"
    with failing_calls(service.parts["jobs"].pid, "read:error=EIO", below=digest) as injected:
        wait_until(lambda: service.job(job_id).attempt == 2 and service.children("jobs"), seconds=30)
        wait_until(lambda: any((one.job, one.attempt) == (job_id, 2) for one in service.diary()))
        assert injected
    assert service.first_step(job_id, 2) == before.step + 1
    service.wait([job_id])
    check(service)
    assert service.statuses([job_id]) == ["succeeded"]
    assert not any("set aside" in one for one in service.said(job_id))


def test_a_child_whose_disk_fails_ends_its_attempt_and_not_its_job(on_files):
    """F27, on the trainer's side: what it could not sync it does not call saved."""
    service = on_files.service
    (job_id,) = service.submit(**LONG)
    wait_until(lambda: service.has_point(job_id), seconds=60)
    (child,) = service.children("jobs")
    with failing_calls(child.pid, SYNC_FAILS) as injected:
        wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, seconds=30)
        assert injected
    wait_until(lambda: service.job(job_id).status == "queued")
    assert service.job(job_id).infra_retries == 1
    service.bring_forward(job_id)
    service.wait([job_id])
    check(service)
    assert service.statuses([job_id]) == ["succeeded"]
    assert service.first_step(job_id, 2) > 1


# --- the database -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [SYNC_FAILS, "pwrite64:error=EIO"])
def test_a_job_that_the_database_could_not_keep_is_not_accepted(on_files, fault):
    """F27 of SQLite's own files: refused, and no job there; taken again once the disk works."""
    service = on_files.service
    service.wait(service.submit())
    before = count(service)
    with failing_calls(service.parts["api"].pid, fault) as injected:
        assert service.try_to_submit() == 503
        assert injected
    assert count(service) == before
    with closing(sqlite3.connect(service.settings.data_dir / "shadowft.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    wait_until(lambda: service.try_to_submit() == 200)
    service.wait(service.accepted)
    check(service)


def test_a_worker_whose_database_fails_for_a_moment_goes_on_with_its_job(on_files):
    """F27: beats and records fail meanwhile; it is no reason to end the training."""
    service = on_files.service
    (job_id,) = service.submit(**LONG)
    service.wait_for_step(job_id, 3)
    log = service.settings.data_dir / "shadowft.db-wal"
    with failing_calls(service.parts["jobs"].pid, SYNC_FAILS, below=log, threads_only=True) as injected:
        wait_until(lambda: injected)
        reached = service.furthest(job_id)
        service.wait_for_step(job_id, reached + 10)
    service.wait([job_id])
    check(service)
    job = service.job(job_id)
    assert (job.status, job.attempt, job.lost_count, job.infra_retries) == ("succeeded", 1, 0, 0)


# --- memory and descriptors -------------------------------------------------------------------------------------------


def test_a_worker_that_finds_no_memory_fails_the_attempt_and_lives(service):
    """F19: in a job it is an attempt that is charged; in an admission, the next sweep's."""
    before = {name: part.pid for name, part in service.parts.items()}
    (job_id,) = service.submit(act="memory", steps=3)
    wait_until(lambda: service.job(job_id).infra_retries == 1)
    (service.data_dir / "admit-without-memory").touch()
    (other,) = service.submit(steps=1)
    service.bring_forward(job_id)
    service.wait([job_id, other])
    check(service)
    assert not (service.data_dir / "admit-without-memory").exists()
    assert service.statuses([job_id, other]) == ["succeeded", "succeeded"]
    assert {name: part.pid for name, part in service.parts.items() if part.is_alive()} == before


@contextmanager
def no_descriptors(pid):
    """None beyond those that the process has open."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (8, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def test_an_api_without_descriptors_answers_again_once_it_has_some(service):
    """F50."""
    service.submit()
    pid = service.parts["api"].pid
    with no_descriptors(pid):
        codes = {service.try_to_submit(seconds=3) for _ in range(5)}
    wait_until(lambda: service.try_to_submit() == 200, seconds=30)
    service.wait(service.accepted)
    check(service)
    assert service.parts["api"].pid == pid
    assert codes <= {0, 200, 503}


def test_a_worker_without_descriptors_begins_no_child_and_is_whole_again_once_it_has_some(service):
    """F50: no job is lost with it, and none is failed."""
    pids = {name: part.pid for name, part in service.parts.items()}
    service.wait(service.submit())
    with no_descriptors(pids["jobs"]):
        (job_id,) = service.submit(steps=3)
        time.sleep(5)
        assert service.job(job_id).status in {"queued", "running"}
    wait_until(lambda: bring_forward_where_queued(service, job_id))
    service.wait(service.accepted)
    check(service)
    assert service.statuses([job_id]) == ["succeeded"]
    assert {name: part.pid for name, part in service.parts.items() if part.is_alive()} == pids


def bring_forward_where_queued(service, job_id):
    """An attempt that began meanwhile has ended by now, or runs."""
    service.bring_forward(job_id)
    return service.job(job_id).status in {"running", "succeeded"}
