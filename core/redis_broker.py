"""kombu's transport for Redis, but for what it does with a message that is none: it lets the reader die of it."""

from __future__ import annotations

from typing import Any

import structlog
from kombu.transport import redis

#: What reading a message raises that no Celery has written: no JSON, no dictionary, a part is missing.
NOT_A_MESSAGE = (ValueError, KeyError, TypeError, AttributeError)

log = structlog.get_logger(__name__)


class Channel(redis.Channel):
    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)
        except NOT_A_MESSAGE as error:
            log.warning("message_dropped", error=type(error).__name__)
            return True  # it is read, and the sweep nudges again


class Transport(redis.Transport):
    Channel = Channel
