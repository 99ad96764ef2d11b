"""The broker of a single machine: a message is a file.

kombu ships such a transport, but it writes messages in place, so that a reader may meet a torn one and die of it; here
a message appears by rename, and one that cannot be read is dropped (the sweep nudges again).
"""

from __future__ import annotations

import json
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import Any

from kombu.transport import virtual

from core import messages
from core.messages import NOT_A_MESSAGE, dropped, forgiving, refused

#: A message is written, or read, within this time; what is older is left of a process that died in between.
UNFINISHED_SECONDS = 60.0


class Channel(virtual.Channel):
    """Messages of the queue `q` lie in `folder/q/`, named so that they sort by age."""

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **options: Any) -> Any:
        return super().basic_consume(queue, no_ack, forgiving(callback), consumer_tag, **options)

    def _folder(self, queue: str) -> Path:
        folder: Path = Path(self.connection.client.transport_options["folder"]) / queue
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _messages(self, queue: str) -> list[Path]:
        folder = self._folder(queue)
        return [folder / name for name in sorted(os.listdir(folder)) if name.endswith(".msg")]

    def _put(self, queue: str, message: dict[str, Any], **_: Any) -> None:
        if self._size(queue) >= messages.MAX_WAITING:
            return
        temporary = self._folder(queue) / f".{uuid.uuid4().hex}"
        try:
            temporary.write_text(json.dumps(message))
            temporary.rename(temporary.with_name(f"{uuid.uuid1().time:020d}-{os.getpid()}.msg"))
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        try:
            for path in self._messages(queue):
                message = _take(path)
                if message is not None:
                    return message
            _remove_unfinished(self._folder(queue))
        except OSError as error:  # the folder is none, or may not be read
            refused(error)
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
    except (OSError, *NOT_A_MESSAGE):
        return None
    return message if isinstance(message, dict) and {"body", "properties"} <= message.keys() else None


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob(".*"):
        with suppress(FileNotFoundError):  # it has been finished
            # Its last change of name, not of content: a message that is being taken may have waited for long.
            if time.time() - path.stat().st_ctime > UNFINISHED_SECONDS:
                path.unlink()


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
        except NOT_A_MESSAGE as error:
            dropped(error)

    def driver_version(self) -> str:
        return "1"
