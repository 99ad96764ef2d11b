"""The Celery app, and nudge().

A message only says "look": it is empty, so that any of them may be lost, doubled or late without harm. Hence no result
backend, no late acks, no retries, no remote control; the database is the record. Nor does anybody wait for one to be
sent: a thread sends them, so that a broker that hangs makes no request slow.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Literal

import redis
import structlog
from celery import Celery
from kombu import Exchange, Queue
from kombu.transport import TRANSPORT_ALIASES

from core.config import Settings, get_settings

TaskName = Literal["work", "admit", "check_file", "check_pair"]

#: The queue on which each task runs: hours of GPU time, or seconds of a CPU.
QUEUE_OF: dict[TaskName, str] = {"work": "jobs", "admit": "light", "check_file": "light", "check_pair": "light"}

#: A nudge is given up after this long: the sweep will repeat it.
NUDGE_TIMEOUT_SECONDS = 2.0

TRANSPORT_ALIASES["embedded"] = "core.embedded_broker:Transport"
TRANSPORT_ALIASES["redis"] = TRANSPORT_ALIASES["rediss"] = "core.redis_broker:Transport"

log = structlog.get_logger(__name__)


def make_celery(settings: Settings) -> Celery:
    app = Celery("shadowft", set_as_current=True)
    app.conf.update(
        broker_url=settings.broker_url.get_secret_value() or "embedded://localhost",
        broker_transport_options=_transport_options(settings),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=NUDGE_TIMEOUT_SECONDS,
        result_backend=None,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_acks_late=False,
        task_queues=[_queue(name) for name in sorted(set(QUEUE_OF.values()))],
        task_default_queue="light",
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
    )
    return app


def _queue(name: str) -> Queue:
    # The default exchange routes by the queue's name, so that there is no binding to keep.
    return Queue(name, Exchange(""), routing_key=name)


def _transport_options(settings: Settings) -> dict[str, Any]:
    if not settings.broker_url.get_secret_value():
        return {"folder": str(settings.broker_dir)}
    return {
        # What is taken is taken: a message that is lost is none the worse, and a full Redis refuses to keep account.
        "ack_emulation": False,
        "socket_keepalive": True,
        "health_check_interval": 25,
        # Longer than a reader waits for a message, which is a second.
        "socket_timeout": 5,
        "socket_connect_timeout": NUDGE_TIMEOUT_SECONDS,
    }


celery = make_celery(get_settings())


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
    client = redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1)
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()
