"""nudge(): tell the workers that there is something to do, over the queues of `core.celery_app`.

Nobody waits for a nudge to be sent: a thread sends them, so that a broker that hangs makes no request slow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

import structlog

from core.config import Settings

TaskName = Literal["work", "admit", "check_file", "check_pair"]

log = structlog.get_logger(__name__)


class Nudger:
    """Hands on nudges from a thread of its own. Those of one task that wait for it are one."""

    def __init__(self, send: Callable[[TaskName], None]) -> None:
        self._send = send
        self._waiting: dict[TaskName, None] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def nudge(self, task: TaskName) -> None:
        with self._changed:
            self._waiting[task] = None
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="nudge", daemon=True)
                thread.start()
                self._thread = thread
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                task = next(iter(self._waiting))
                del self._waiting[task]
            try:
                self._send(task)
            except Exception as error:  # noqa: BLE001 - a client of a broker raises what it likes, and the sweep goes on
                log.warning("nudge_failed", task=task, error=type(error).__name__)


def _send(task: TaskName) -> None:
    # Celery takes a while to import, and an API that has just started has nothing to tell.
    from core.celery_app import QUEUE_OF, celery

    celery.send_task(task, queue=QUEUE_OF[task], retry=False, ignore_result=True, expires=3600, connection_timeout=2)


_nudger = Nudger(_send)


def nudge(task: TaskName) -> None:
    """Tell a worker that something waits, soon. A broker that is away delays the work by a sweep and nothing else."""
    _nudger.nudge(task)


def takes_messages(settings: Settings) -> bool:
    """Whether the broker takes a message, and lets it be removed, as it would for a nudge."""
    from core.celery_app import connection_to

    try:
        with connection_to(settings) as connection:
            channel = connection.ensure_connection(max_retries=1, interval_start=0).default_channel
            channel.basic_publish(channel.prepare_message(""), "", "readiness")
            channel.queue_purge("readiness")
    except Exception as error:  # noqa: BLE001 - a client of a broker raises what it likes
        log.warning("broker_away", error=type(error).__name__)
        return False
    return True
