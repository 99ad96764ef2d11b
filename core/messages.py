"""What both brokers make of a message: a nudge, which may be lost without harm, and must do none."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import structlog

#: What reading a message raises that no Celery has written: no JSON, no dictionary, a part is missing, too deep.
NOT_A_MESSAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)

#: Of one queue: while all workers are busy for days, so many messages say "look" as well as more would.
MAX_WAITING = 1000

#: A broker that answers, and refuses, is asked again after this long: it may do so for hours.
REFUSED_SECONDS = 1.0

log = structlog.get_logger(__name__)


def dropped(error: Exception) -> None:
    """Say that a message was read and dropped; the sweep finds what it was about."""
    log.warning("message_dropped", error=type(error).__name__)


def refused(error: Exception) -> None:
    """Say that the broker gives no message, and wait before it is asked again."""
    log.warning("broker_refuses", error=type(error).__name__, said=str(error))
    time.sleep(REFUSED_SECONDS)


def forgiving(callback: Callable[[Any], object]) -> Callable[[Any], None]:
    """Celery's reader of messages, but for one that it chokes on. A worker is given its next message when it has
    acknowledged the one before: without that it would be deaf from then on."""

    def read(message: Any) -> None:
        try:
            callback(message)
        except Exception as error:  # noqa: BLE001 - headers are a stranger's, and Celery reads a dozen of them
            dropped(error)
            if not message.acknowledged:
                message.ack()

    return read
