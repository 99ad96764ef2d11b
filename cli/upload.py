"""A file on its way up: in one request, or by parts which are each sent again where a connection breaks."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.http import Interrupted, Server, ServerRefused, patiently
from cli.parallel import Meter, in_parallel
from cli.progress import OnProgress
from core.errors import ShadowError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: The contract's most. A larger file goes by parts.
PART_BYTES = 64 * 1024 * 1024
PARTS_AT_ONCE = 3
#: Each part's tries, and the last request's, end after so long without an answer.
PATIENCE_SECONDS = 60.0
#: The server puts the parts together before it answers: gigabytes are copied and hashed.
COMPLETE_SECONDS = 600.0
READ_BYTES = 1024 * 1024


def upload(
    server: Server, path: Path, *, purpose: str, part_bytes: int, on_progress: OnProgress | None
) -> dict[str, Any]:
    """The file as the server made it, compared with this one by its hash."""
    total = path.stat().st_size
    meter = Meter(total, on_progress)
    if total <= part_bytes:
        try:
            return _upload_whole(server, path, total, purpose, meter)
        except ServerRefused as error:  # its limit of one request is lower than the contract's
            if error.code != "too_large":
                raise
    return _upload_by_parts(server, path, total, purpose, part_bytes, meter)


def _upload_whole(server: Server, path: Path, total: int, purpose: str, meter: Meter) -> dict[str, Any]:
    tell = partial(meter.tell, path.name)
    with _piece(path, 0, total, tell, threading.Event()) as content:
        file = server.send("/files", content, part="file", filename=path.name, fields={"purpose": purpose})
    if file["sha256"] != _digest(path, "sha256"):
        server.delete(f"/files/{file['id']}")
        raise _damaged(path)
    return file


def _upload_by_parts(
    server: Server, path: Path, total: int, purpose: str, part_bytes: int, meter: Meter
) -> dict[str, Any]:
    begun = {"bytes": total, "filename": path.name, "mime_type": "application/octet-stream", "purpose": purpose}
    upload_id: str = server.post("/uploads", begun)["id"]
    stop = threading.Event()

    def send(start: int) -> str:
        length = min(part_bytes, total - start)
        part_id: str = patiently(lambda: send_once(start, length), seconds=PATIENCE_SECONDS, stop=stop)["id"]
        return part_id

    def send_once(start: int, length: int) -> dict[str, Any]:
        with _piece(path, start, length, partial(meter.tell, str(start)), stop) as content:
            return server.send(f"/uploads/{upload_id}/parts", content, part="data", filename="part", fields={})

    def md5_and_parts(start: int | None) -> str:
        return _digest(path, "md5", stop) if start is None else send(start)

    try:
        md5, *part_ids = in_parallel(
            md5_and_parts, [None, *range(0, total, part_bytes)], at_once=PARTS_AT_ONCE + 1, stop=stop
        )
        body = {"part_ids": part_ids, "md5": md5}
        completed = patiently(
            lambda: server.post(f"/uploads/{upload_id}/complete", body, seconds=COMPLETE_SECONDS),
            seconds=PATIENCE_SECONDS,
        )
    except BaseException:
        with suppress(ShadowError):  # the parts take the team's room; without this they go within an hour
            server.post(f"/uploads/{upload_id}/cancel", {})
        raise
    file: dict[str, Any] = completed["file"]
    return file


def _digest(path: Path, name: str, stop: threading.Event | None = None) -> str:
    digest = hashlib.new(name, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            if stop and stop.is_set():
                raise Interrupted("Interrupted.")
    return digest.hexdigest()


def _damaged(path: Path) -> ShadowError:
    return ShadowError(f"{path} has changed while it was sent, or was damaged on the way.", hint="Send it again.")


def _piece(
    path: Path, start: int, length: int, tell: Callable[[int], None], stop: threading.Event
) -> io.BufferedReader:
    return io.BufferedReader(_Piece(path, start, length, tell, stop), READ_BYTES)


class _Piece(io.RawIOBase):
    """A stretch of a file, read as if it were one of its own; says how far it has been read."""

    def __init__(self, path: Path, start: int, length: int, tell: Callable[[int], None], stop: threading.Event) -> None:
        self._path = path
        self._file = path.open("rb", buffering=0)
        self._start = start
        self._length = length
        self._tell = tell
        self._stop = stop
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._length}[whence]
        return self._file.seek(self._start + at + offset) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        if self._stop.is_set():
            raise Interrupted("Interrupted.")
        left = self._length - self.tell()
        read = self._file.readinto(memoryview(buffer)[:left]) or 0
        if left and not read:
            raise _damaged(self._path)
        self._tell(self.tell())
        return read

    def close(self) -> None:
        self._file.close()
        super().close()
