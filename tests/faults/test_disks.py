"""A disk that is full: what exists is kept, nothing half is, and what waits goes on once there is room."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import httpx
import pytest

from tests.faults.checker import check
from tests.faults.faults import ROW, run_faulty, small_disk
from tests.servers import wait_until

#: They share their services.
pytestmark = pytest.mark.xdist_group("faults")


@pytest.fixture
def cramped(tmp_path):
    """A service on files whose every byte lies on a disk of 24 MB."""
    with small_disk(tmp_path / "disk", "24m") as disk, run_faulty(disk / "data", save_seconds="0.5") as service:
        service.start("api", "light", "jobs")
        yield service


def fill(service):
    """All that is left of the disk but a page."""
    ballast = service.data_dir / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return ballast


@pytest.mark.slow
def test_a_full_disk_refuses_uploads_and_jobs_and_damages_nothing(cramped):
    """F25, F26."""
    (done,) = cramped.submit()
    cramped.wait([done])
    ballast = fill(cramped)
    with cramped.http as http:
        sent = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", ROW * 2000)})
        body = {"model": "qwen2.5-0.5b", "training_file": cramped._file}
        submitted = http.post("/v1/fine_tuning/jobs", json=body)
        read = http.get(f"/v1/fine_tuning/jobs/{done}")
    ballast.unlink()
    assert (sent.status_code, submitted.status_code, read.status_code) == (503, 503, 200)
    with closing(sqlite3.connect(cramped.data_dir / "shadowft.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    wait_until(lambda: is_taken(cramped))
    cramped.wait(cramped.accepted)
    check(cramped)


def is_taken(service):
    try:
        return service.submit()
    except httpx.HTTPStatusError:
        return False


@pytest.mark.slow
def test_a_job_that_meets_a_full_disk_waits_and_goes_on_when_there_is_room(cramped):
    """F24: it is queued again with the reason, uncharged, and nothing of what was saved is lost."""
    (job_id,) = cramped.submit(steps=60, seconds=0.1)
    wait_until(lambda: cramped.has_point(job_id), seconds=60)
    ballast = fill(cramped)
    wait_until(lambda: not cramped.children("jobs"), seconds=30)
    ballast.unlink()
    wait_until(lambda: cramped.job(job_id).status in {"queued", "succeeded"}, seconds=60)
    job = cramped.job(job_id)
    if job.status == "queued":
        assert (job.infra_retries, job.lost_count) <= (0, 1)
        bring_forward(cramped, job_id)
    cramped.wait([job_id], seconds=60)
    check(cramped)
    assert cramped.statuses([job_id]) == ["succeeded"]


def bring_forward(service, job_id):
    from sqlalchemy import update

    from core.models import Job

    with service.database.writing() as session:
        session.execute(update(Job).where(Job.id == job_id).values(not_before=None))
        session.commit()
