"""What happens to a job when somebody cancels it, or when one of its processes dies. Real signals, real processes."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import (
    Ready,
    Tiny,
    artifacts,
    command_line,
    follow,
    has_ended,
    messages,
    prepare,
    roots,
    submit,
)
from tests.servers import run_service, wait_until

pytestmark = pytest.mark.xdist_group("e2e-main")

#: Some minutes of training: whatever the test does, it does in the middle.
LONG = {"n_epochs": 50, "batch_size": 1}
TUNING = {"tuning": {"rank": 2, "learning_rate": 1e-4}}


@pytest.fixture
def own(tiny: Tiny, tmp_path: Path) -> Iterator[Ready]:
    """A service that this test may hurt."""
    with run_service(roots(tiny), tmp_path / "data") as ran:
        yield prepare(ran, tiny)


def start_training(ready: Ready) -> Any:
    job = submit(ready, TUNING, hyperparameters=LONG)
    return follow(ready, job.id, lambda found: found.phase == "training" and (found.progress or {}).get("step"))


def processes(ready: Ready, words: str) -> list[psutil.Process]:
    """The service's processes whose command line holds `words`."""
    family = psutil.Process(ready.process.pid).children(recursive=True)
    return [process for process in family if words in " ".join(command_line(process))]


def test_a_running_job_is_cancelled_and_leaves_nothing(embedded: Ready):
    job = start_training(embedded)
    asked = embedded.client.fine_tuning.jobs.cancel(job.id)

    ended = follow(embedded, job.id, has_ended, seconds=10)

    assert (asked.status, asked.phase) == ("running", "cancelling")
    assert ended.status == "cancelled"
    assert not processes(embedded, "worker.steps.train")
    assert artifacts(embedded, job.id) == []
    wait_until(lambda: not list((embedded.data_dir / "work").iterdir()))


@pytest.mark.slow
def test_a_queued_job_is_cancelled_at_once(embedded: Ready):
    first, second = start_training(embedded), submit(embedded, TUNING)

    assert embedded.client.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    embedded.client.fine_tuning.jobs.cancel(first.id)
    follow(embedded, first.id, has_ended)


@pytest.mark.slow
def test_a_job_whose_worker_was_killed_is_taken_up_again(own: Ready):
    job = start_training(own)
    (child,) = processes(own, "worker.steps.train")
    (worker,) = processes(own, "worker --queue jobs")

    worker.kill()

    # The child ends with its supervisor, the lease runs out, and a worker that was started anew takes the job.
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running()
    again = follow(own, job.id, lambda found: found.attempt == 2 and found.phase == "training")
    assert again.status == "running"
    assert "The worker stopped answering; the job is queued again" in messages(own, job.id)
    own.client.fine_tuning.jobs.cancel(job.id)
    follow(own, job.id, has_ended)


@pytest.mark.slow
def test_a_frozen_worker_loses_its_child_its_job_and_its_place(own: Ready):
    """One that wakes while another has its job is met in tests/faults/test_workers.py."""
    job = start_training(own)
    (child,) = processes(own, "worker.steps.train")
    (worker,) = processes(own, "worker --queue jobs")

    freeze_outside_of_writing(own, worker)

    # The kernel's alarm ends the child at the lease's end, although nobody told it anything any more. Then `serve` ends
    # the worker and starts another one.
    _, alive = psutil.wait_procs([child], timeout=20)
    assert not alive or child.status() == psutil.STATUS_ZOMBIE
    follow(own, job.id, lambda found: found.attempt == 2 and found.phase == "training")
    assert not worker.is_running()


def freeze_outside_of_writing(ready: Ready, worker: psutil.Process) -> None:
    """A process that is stopped in the middle of a write keeps SQLite's lock, without which nobody can take its job."""
    while True:
        worker.suspend()
        database = sqlite3.connect(ready.data_dir / "shadowft.db", timeout=1, isolation_level=None)
        try:
            database.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            worker.resume()
        else:
            return
        finally:
            database.close()


@pytest.mark.slow
def test_a_killed_child_is_tried_again_and_then_fails_the_job_with_a_cause(own: Ready):
    """A single row at a time needs no less memory another time; but who killed it once may not come again."""
    job = start_training(own)
    (child,) = processes(own, "worker.steps.train")
    child.kill()
    follow(own, job.id, lambda found: found.status == "queued")
    do_not_wait(own, job.id)
    follow(own, job.id, lambda found: found.phase == "training" and (found.progress or {}).get("step"))
    (child,) = processes(own, "worker.steps.train")
    child.kill()

    ended = follow(own, job.id, has_ended)
    assert (ended.status, ended.error.code) == ("failed", "step_killed")
    assert ended.error.model_extra["fault"] == "memory"


@pytest.mark.slow
def do_not_wait(ready: Ready, job_id: str) -> None:
    """What the job is to wait for passes at once."""
    with closing(sqlite3.connect(ready.data_dir / "shadowft.db", timeout=10)) as database, database:
        database.execute("UPDATE job SET not_before = NULL WHERE id = ?", [job_id])


@pytest.mark.slow
def test_a_stopped_service_puts_its_job_back(own: Ready):
    job = start_training(own)

    own.process.send_signal(signal.SIGTERM)
    own.process.wait(30)

    assert not Path(f"/proc/{own.process.pid}").exists()
    assert status_in_database(own, job.id) == ("queued", 0)


def status_in_database(ready: Ready, job_id: str) -> tuple[str, int]:
    from sqlalchemy import select

    from core.db import Database
    from core.models import Job

    database = Database(f"sqlite:///{ready.data_dir / 'shadowft.db'}")
    with database.reading() as session:
        found = session.execute(select(Job.status, Job.lost_count).where(Job.id == job_id)).one()
    database.close()
    return found.status, found.lost_count


@pytest.mark.slow
def test_no_process_outlives_a_service_that_was_killed(own: Ready):
    start_training(own)
    family = psutil.Process(own.process.pid).children(recursive=True)

    os.kill(own.process.pid, signal.SIGKILL)

    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
