"""The Celery tasks, a few lines each, and the worker process around them.

This process stays small: it never imports torch, so that it can be killed and started anew within a second, and a
job's memory comes back when its children exit.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import structlog
from celery.signals import setup_logging, worker_ready, worker_shutdown, worker_shutting_down
from sqlalchemy import delete

from core import jobs
from core.broker import Nudger, TaskName, nudge
from core.celery_app import QUEUE_OF, celery
from core.config import get_settings
from core.db import open_database
from core.ids import new_id
from core.logs import configure_logging
from core.models import Worker
from core.storage import LocalStorage
from core.version import VERSION
from worker.admission import admit_waiting
from worker.file_check import check_waiting
from worker.lane import find_lane
from worker.pair_check import check_next
from worker.pipeline import Context, run
from worker.step_runner import walls_around
from worker.sweep import Sweeper

log = structlog.get_logger(__name__)


class WorkerProcess:
    """What the tasks of this process share."""

    def __init__(self, queue: str) -> None:
        self.queue = queue
        self.id = new_id("worker-")
        settings = get_settings()
        self.lane = find_lane(settings)
        # Said, or refused, now and not at the first job.
        walls_around(self.lane.device if queue == "jobs" else "cpu")
        self.context = Context(
            settings=settings,
            database=open_database(settings),
            storage=LocalStorage(settings.storage_dir),
            device=self.lane.device,
            draining=threading.Event(),
        )
        self.sweeper = Sweeper(self.context, self.row, self.announce)
        #: Held by whoever works: the lane is one, and a message is not the only one who asks for it.
        self.lane_lock = threading.Lock()
        self._own_nudges = Nudger(self._work_unasked)
        #: As Celery says when it ends.
        self.exit_status: int | None = None

    def row(self) -> Worker:
        """What the database should know of this process."""
        return Worker(
            id=self.id,
            host=socket.gethostname(),
            pid=os.getpid(),
            queue=self.queue,
            device=self.lane.device,
            lane_memory_bytes=self.lane.memory_bytes,
            version=VERSION,
            draining=self.context.draining.is_set(),
        )

    def announce(self, task: TaskName) -> None:
        """Something waits for `task`. An idle process whose task it is does it, with or without a broker; otherwise
        whoever listens is told."""
        if QUEUE_OF[task] == self.queue and not self.lane_lock.locked():
            self._own_nudges.nudge(task)
        else:
            nudge(task)

    def _work_unasked(self, task: TaskName) -> None:
        try:
            celery.tasks[task].run()
        except Exception:  # the next sweep finds it waiting still
            log.exception("task_crashed", task=task)

    def leave(self) -> None:
        """End what runs, and only then what says that this worker lives."""
        self.context.draining.set()
        with self.lane_lock:
            self.sweeper.stop()
        with self.context.database.writing() as session:
            session.execute(delete(Worker).where(Worker.id == self.id))
            session.commit()


#: Set by `main`, before Celery starts.
process: WorkerProcess


def _task(name: TaskName) -> Callable[[Callable[[], None]], Any]:
    """Make a Celery task of a function: one that runs alone in its process, and no more once that is to leave."""

    def register(function: Callable[[], None]) -> Any:
        def run() -> None:
            with process.lane_lock:
                if not process.context.draining.is_set():
                    function()

        return celery.task(run, name=name)

    return register


@_task("work")
def work() -> None:
    """Run jobs until none is left that this lane can hold."""
    while not process.context.draining.is_set():
        with process.context.database.writing() as session:
            claim = jobs.claim_next(
                session,
                worker_id=process.id,
                lane_memory_bytes=process.lane.memory_bytes,
                lease_seconds=process.context.settings.lease_seconds,
                on_gpu=process.lane.device != "cpu",
            )
            session.commit()
        if claim is None:
            return
        run(process.context, claim)


@_task("admit")
def admit() -> None:
    admit_waiting(process.context)


@_task("check_file")
def check_file() -> None:
    if check_waiting(process.context):
        nudge("admit")


@_task("check_pair")
def check_pair() -> None:
    """One check at a time: files and admissions that wait behind it come before the next one."""
    if check_next(process.context):
        nudge("check_pair")


def main(queue: str) -> None:
    """Run a worker for `queue` in this process until it is told to stop."""
    global process
    configure_logging(get_settings())  # Celery asks for it later than the first lines are said
    process = WorkerProcess(queue)
    process.sweeper.start()  # not once Celery has its broker: what waits is in the database
    celery.worker_main(
        [
            "worker",
            "--pool=threads",
            "--concurrency=1",
            f"--queues={queue}",
            f"--hostname={process.id}@%h",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
        ]
    )
    sys.exit(process.exit_status)


@setup_logging.connect
def _keep_our_logging(**_: Any) -> None:
    configure_logging(get_settings())


@worker_ready.connect
def _ready(**_: Any) -> None:
    log.info("worker_ready", queue=process.queue, device=process.lane.device, memory_bytes=process.lane.memory_bytes)


@worker_shutting_down.connect
def _drain(**_: Any) -> None:
    process.context.draining.set()


@worker_shutdown.connect
def _leave(sender: Any, **_: Any) -> None:
    process.exit_status = sender.exitcode
    process.leave()
