"""kombu's transport for Redis, but for what it does with a message that is none, and with a Redis that answers and
refuses: it lets the reader die of them."""

from __future__ import annotations

from queue import Empty
from typing import Any

from kombu.transport import redis
from redis.exceptions import ResponseError

from core import messages
from core.messages import NOT_A_MESSAGE, dropped, forgiving, refused


class Channel(redis.Channel):
    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **options: Any) -> Any:
        return super().basic_consume(queue, no_ack, forgiving(callback), consumer_tag, **options)

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)
        except NOT_A_MESSAGE as error:
            dropped(error)
            return True  # it is read
        except ResponseError as error:  # it has become a replica, or cannot save what it holds
            self.client.connection.disconnect()  # another may answer in its place
            refused(error)
            raise Empty from error

    def _put(self, queue: str, message: dict[str, Any], **options: Any) -> None:
        if self._size(queue) < messages.MAX_WAITING:
            super()._put(queue, message, **options)


class Transport(redis.Transport):
    Channel = Channel
