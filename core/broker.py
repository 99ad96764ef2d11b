"""nudge(): tell the workers that there is something to do, over the queues of `core.celery_app`."""

from __future__ import annotations

from typing import Literal

import structlog

TaskName = Literal["work", "admit", "check_file", "check_pair"]

log = structlog.get_logger(__name__)


def nudge(task: TaskName) -> None:
    """Tell a worker that something waits. A broker that is away delays the work by a sweep and nothing else."""
    # Celery takes a while to import, and an API that has just started has nothing to tell.
    from kombu.exceptions import OperationalError

    from core.celery_app import QUEUE_OF, celery

    try:
        celery.send_task(
            task, queue=QUEUE_OF[task], retry=False, ignore_result=True, expires=3600, connection_timeout=2
        )
    except (OperationalError, OSError) as error:
        log.warning("nudge_failed", task=task, error=type(error).__name__)
