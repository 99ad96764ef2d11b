"""The Celery app.

A message only says "look": it is empty, so that any of them may be lost, doubled or late without harm. Hence no result
backend, no late acks, no retries, no remote control; the database is the record.
"""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu import Connection, Exchange, Queue
from kombu.transport import TRANSPORT_ALIASES

from core.config import Settings, get_settings

#: The queue on which each task runs: hours of GPU time, or seconds of a CPU.
QUEUE_OF = {"work": "jobs", "admit": "light", "check_file": "light", "check_pair": "light"}

#: A nudge is given up after this long: the sweep finds what it was about.
NUDGE_TIMEOUT_SECONDS = 2.0

TRANSPORT_ALIASES["embedded"] = "core.embedded_broker:Transport"
TRANSPORT_ALIASES["redis"] = TRANSPORT_ALIASES["rediss"] = "core.redis_broker:Transport"


def make_celery(settings: Settings) -> Celery:
    app = Celery("shadowft", set_as_current=True)
    app.conf.update(
        broker_url=_url(settings),
        broker_transport_options=_transport_options(settings),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # A Redis that answers, and refuses, is one that is away.
        broker_channel_error_retry=True,
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


def connection_to(settings: Settings) -> Connection:
    """A connection of its own to the broker, as Celery makes them."""
    return Connection(
        _url(settings), transport_options=_transport_options(settings), connect_timeout=NUDGE_TIMEOUT_SECONDS
    )


def _url(settings: Settings) -> str:
    return settings.broker_url.get_secret_value() or "embedded://localhost"


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
