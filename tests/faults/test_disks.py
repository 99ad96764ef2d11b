"""A disk that is full: what exists is kept, nothing half is, and what waits goes on once there is room."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import httpx
import pytest

from tests.faults.checker import check
from tests.faults.faults import ROW, fill, run_faulty, small_disk
from tests.servers import wait_until

#: They share their services.
pytestmark = pytest.mark.xdist_group("faults")


@pytest.fixture
def cramped(tmp_path):
    """A service on files whose every byte lies on a disk of 24 MB."""
    with small_disk(tmp_path / "disk", "24m") as disk, run_faulty(disk / "data", save_seconds="0.5") as service:
        service.start("api", "light", "jobs")
        yield service


@pytest.mark.slow
def test_a_full_disk_refuses_uploads_and_jobs_and_damages_nothing(cramped):
    """F25, F26."""
    (done,) = cramped.submit()
    cramped.wait([done])
    ballast = fill(cramped.data_dir)
    with cramped.http as http:  # of its own: the connection of an upload that was cut short is not used again
        sent = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", ROW * 2000)})
    with cramped.http as http:
        body = {"model": "qwen2.5-0.5b", "training_file": cramped._file}
        submitted = http.post("/v1/fine_tuning/jobs", json=body)
        read = http.get(f"/v1/fine_tuning/jobs/{done}")
    ballast.unlink()
    assert (sent.status_code, submitted.status_code, read.status_code) == (503, 503, 200)
    assert sent.headers["retry-after"]
    assert submitted.headers["retry-after"]
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
def test_a_job_on_a_disk_that_is_full_to_the_last_byte_goes_on_when_there_is_room(cramped):
    """F24, where the database can be written no more either, so that nobody can say why the job waits."""
    (job_id,) = cramped.submit(steps=60, seconds=0.1)
    wait_until(lambda: cramped.has_point(job_id), seconds=60)
    ballast = fill(cramped.data_dir)
    wait_until(lambda: not cramped.children("jobs"), seconds=30)
    ballast.unlink()
    wait_until(lambda: cramped.job(job_id).status in {"queued", "succeeded"}, seconds=60)
    assert cramped.job(job_id).infra_retries == 0
    cramped.bring_forward(job_id)
    cramped.wait([job_id], seconds=60)
    check(cramped)
    assert cramped.statuses([job_id]) == ["succeeded"]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["work", "storage"])
def test_a_job_whose_disk_is_full_waits_at_no_cost_and_goes_on_from_what_it_saved(tmp_path, place):
    """F24: the trainer's disk, or the one that its states are stored on; the database has room."""
    data = tmp_path / "data"
    with small_disk(data / place, "8m") as disk, run_faulty(data, save_seconds="0.5") as service:
        service.start("api", "light", "jobs")
        (job_id,) = service.submit(steps=60, seconds=0.1)
        wait_until(lambda: service.has_point(job_id), seconds=60)
        known = service.points(job_id)[0].step
        ballast = fill(disk)
        wait_until(lambda: service.job(job_id).status == "queued", seconds=60)
        job = service.job(job_id)
        assert job.disk_waits == 1
        assert (job.infra_retries, job.lost_count, job.stall_count) == (0, 0, 0)
        assert any("tried again in" in one and "space" in one for one in service.said(job_id))
        ballast.unlink()
        service.bring_forward(job_id)
        service.wait([job_id], seconds=60)
        check(service)
        assert service.statuses([job_id]) == ["succeeded"]
        assert not service.children()
        attempts = {entry.attempt for entry in service.diary()}
        assert attempts == {1} or service.first_step(job_id, 2) > known
