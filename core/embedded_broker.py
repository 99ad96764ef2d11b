"""The broker of a single machine: a message is a file.

kombu ships such a transport, but it writes messages in place, so that a reader may meet a torn one and die of it; here
a message appears by rename, and one that cannot be read is dropped (the sweep nudges again).
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from queue import Empty
from typing import Any

import structlog
from kombu.transport import virtual

#: While a job runs for days, every sweep nudges for those that wait. So many messages say "look" as well as more would.
MAX_WAITING = 1000

log = structlog.get_logger(__name__)


class Channel(virtual.Channel):
    """Messages of the queue `q` lie in `folder/q/`, named so that they sort by age."""

    def _folder(self, queue: str) -> Path:
        folder: Path = Path(self.connection.client.transport_options["folder"]) / queue
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _messages(self, queue: str) -> list[Path]:
        folder = self._folder(queue)
        return [folder / name for name in sorted(os.listdir(folder)) if name.endswith(".msg")]

    def _put(self, queue: str, message: dict[str, Any], **_: Any) -> None:
        if self._size(queue) >= MAX_WAITING:
            return
        temporary = self._folder(queue) / f".{uuid.uuid4().hex}"
        temporary.write_text(json.dumps(message))
        temporary.rename(temporary.with_name(f"{uuid.uuid1().time:020d}-{os.getpid()}.msg"))

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        for path in self._messages(queue):
            message = _take(path)
            if message is not None:
                return message
        raise Empty

    def _size(self, queue: str) -> int:
        return len(self._messages(queue))

    def _purge(self, queue: str) -> int:
        paths = self._messages(queue)
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)


def _take(path: Path) -> dict[str, Any] | None:
    """Read and remove a message; None where another worker was faster or the message is none of ours."""
    mine = path.with_name(f".{uuid.uuid4().hex}")
    try:
        path.rename(mine)
        content = mine.read_bytes()
        mine.unlink()
        message = json.loads(content)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) and {"body", "properties"} <= message.keys() else None


class Transport(virtual.Transport):
    Channel = Channel
    #: Seconds between two looks into an empty queue's folder.
    polling_interval = 0.1
    driver_type = "embedded"
    driver_name = "embedded"
    default_port: Any = 0
    global_state = virtual.BrokerState()

    def _deliver(self, message: dict[str, Any], queue: str) -> None:
        try:
            super()._deliver(message, queue)
        except (KeyError, TypeError, AttributeError, ValueError) as error:  # a part of it is missing
            log.warning("message_dropped", error=type(error).__name__)

    def driver_version(self) -> str:
        return "1"
