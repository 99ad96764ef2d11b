"""nudge(): tell the workers that there is something to do, over the queues of `core.celery_app`.

Nobody waits for a nudge to be sent: a thread sends them, so that a broker that hangs makes no request slow.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Literal

import structlog

from core.config import Settings

TaskName = Literal["work", "admit", "check_file", "check_pair"]

log = structlog.get_logger(__name__)


class Nudger:
    """Sends nudges from a thread of its own. Those of one task that wait to be sent are one."""

    def __init__(self, send: Callable[[TaskName], None]) -> None:
        self._send = send
        self._waiting: dict[TaskName, None] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def nudge(self, task: TaskName) -> None:
        with self._changed:
            self._waiting[task] = None
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="nudge", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                task = next(iter(self._waiting))
                del self._waiting[task]
            self._send(task)


def _send(task: TaskName) -> None:
    # Celery takes a while to import, and an API that has just started has nothing to tell.
    from core.celery_app import QUEUE_OF, celery

    try:
        celery.send_task(
            task, queue=QUEUE_OF[task], retry=False, ignore_result=True, expires=3600, connection_timeout=2
        )
    except Exception as error:  # noqa: BLE001 - a client of a broker raises what it likes, and the sweep nudges again
        log.warning("nudge_failed", task=task, error=type(error).__name__)


_nudger = Nudger(_send)


def nudge(task: TaskName) -> None:
    """Tell a worker that something waits, soon. A broker that is away delays the work by a sweep and nothing else."""
    _nudger.nudge(task)


def is_reachable(settings: Settings) -> bool:
    """Whether the broker answers within a second."""
    url = settings.broker_url.get_secret_value()
    if not url:
        return os.access(settings.data_dir, os.W_OK)
    import redis

    client = redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1)
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()
