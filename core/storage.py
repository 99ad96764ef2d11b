"""Where uploads and artifacts lie.

A key is made by this service, never by a client. What `put` or `adopt` returned from is durable, and it is there whole
or not at all: a backend that cannot promise both is none.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from core.durable import sync_folder
from core.errors import Unavailable

COPY_BYTES = 4 * 1024 * 1024

#: A piece of this size is hashed by another thread while it is written; a smaller one is hashed at once.
BESIDE_BYTES = 256 * 1024

#: The disk begins with what has come so far each time that this much has, so that the sync at the end is a short one.
SYNC_BYTES = 32 * 1024 * 1024

#: Hashes and syncs; both leave the interpreter's lock alone.
_beside = ThreadPoolExecutor(thread_name_prefix="storage")


@dataclass(frozen=True)
class Stored:
    bytes: int
    sha256: str


class Incoming(Protocol):
    """An object on its way in: written piece by piece, then kept or dropped."""

    def write(self, piece: bytes | bytearray) -> None:
        """Append a piece, which must not change from then on."""

    def keep(self) -> Stored: ...
    def drop(self) -> None: ...


class Storage(Protocol):
    def receive(self, key: str) -> Incoming:
        """Open `key` for writing. It exists once `keep` returns; `drop` leaves nothing behind."""

    def adopt(self, key: str, source: IO[bytes], *, check: Callable[[], None] = lambda: None) -> Stored:
        """Store what `source` still holds under `key`. What `check` raises meanwhile ends it, and leaves
        nothing."""

    def fetch(self, key: str, destination: Path) -> None:
        """Make the object, or the folder of objects below the prefix `key`, readable at `destination`. Its folder is
        made; the one above that must be there."""

    def path(self, key: str) -> Path:
        """A local file with the object's content."""

    def keys(self, prefix: str, *, older_than_seconds: float) -> list[str]:
        """The objects below `prefix` that were stored so long ago or longer."""

    def delete(self, key: str) -> None:
        """Remove the object, or every object below the prefix `key`. Absent is fine."""

    def remove_unfinished(self, older_than_seconds: float) -> None:
        """Remove what was being received when its process died."""

    def close(self) -> None:
        """Drop what is still being received: this process ends, and cannot."""


class LocalStorage:
    """A folder of this machine (or a volume that all machines mount)."""

    def __init__(self, root: Path) -> None:
        self._root = root
        #: Where what is being received lies.
        self._arriving: set[Path] = set()

    def receive(self, key: str) -> LocalIncoming:
        return LocalIncoming(self.path(key), self._arriving)

    def adopt(self, key: str, source: IO[bytes], *, check: Callable[[], None] = lambda: None) -> Stored:
        incoming = self.receive(key)
        try:
            for piece in pieces_of(source):
                check()
                incoming.write(piece)
        except BaseException:
            incoming.drop()
            raise
        return incoming.keep()

    def fetch(self, key: str, destination: Path) -> None:
        destination.parent.mkdir(exist_ok=True)
        destination.unlink(missing_ok=True)
        destination.symlink_to(self.path(key))

    def path(self, key: str) -> Path:
        if key.startswith("/") or ".." in Path(key).parts:
            raise ValueError(f"{key!r} leads out of the storage.")
        return self._root / key

    def keys(self, prefix: str, *, older_than_seconds: float) -> list[str]:
        old = _older_than(older_than_seconds, self.path(prefix).rglob("*"))
        return [str(path.relative_to(self._root)) for path in old if not path.name.startswith(".") and path.is_file()]

    def delete(self, key: str) -> None:
        path = self.path(key)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def remove_unfinished(self, older_than_seconds: float) -> None:
        for path in _older_than(older_than_seconds, self._root.rglob(".*.tmp")):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        for path in self._arriving.copy():  # threads may still write to them, and nobody can keep them any more
            path.unlink(missing_ok=True)


class LocalIncoming:
    """Written under a temporary name beside its place, hashed on the way, synced and renamed at the end.

    While a piece is written, its hash is made by a second thread and what came before goes to the disk by a third: the
    slowest of the three sets the pace, not their sum.
    """

    def __init__(self, path: Path, arriving: set[Path]) -> None:
        self._path = path
        self._arriving = arriving
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._hash = hashlib.sha256()
        self._hashing: Future[None] | None = None
        self._syncing: Future[None] | None = None
        self._bytes = 0
        self._handed_to_disk = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("wb", buffering=0)
            arriving.add(self._temporary)
        except OSError as error:
            raise _disk_trouble(error) from error

    def write(self, piece: bytes | bytearray) -> None:
        _wait(self._hashing)
        if len(piece) < BESIDE_BYTES:
            self._hash.update(piece)
        else:
            self._hashing = _beside.submit(self._hash.update, piece)
        try:
            self._write_whole(piece)
            self._sync_beside()
        except OSError as error:
            raise _disk_trouble(error) from error

    def keep(self) -> Stored:
        try:
            _wait(self._hashing)
            _wait(self._syncing)
            with self._file as file:
                os.fsync(file.fileno())
            self._temporary.rename(self._path)
            self._arriving.discard(self._temporary)
            sync_folder(self._path.parent)
        except OSError as error:
            self.drop()
            raise _disk_trouble(error) from error
        return Stored(bytes=self._bytes, sha256=self._hash.hexdigest())

    def drop(self) -> None:
        with suppress(OSError):  # what does not fit on the disk is wanted by nobody any more
            _wait(self._syncing)
        _wait(self._hashing)
        self._file.close()
        self._temporary.unlink(missing_ok=True)
        self._arriving.discard(self._temporary)

    def _write_whole(self, piece: bytes | bytearray) -> None:
        left = memoryview(piece)
        while left:  # the kernel takes at most 2 GiB at a time, and less on a disk that is filling up
            left = left[self._file.write(left) :]
        self._bytes += len(piece)

    def _sync_beside(self) -> None:
        if self._bytes - self._handed_to_disk < SYNC_BYTES or not _is_done(self._syncing):
            return
        _wait(self._syncing)  # raises what it met
        self._handed_to_disk = self._bytes
        self._syncing = _beside.submit(os.fdatasync, self._file.fileno())


def pieces_of(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(COPY_BYTES):
        yield piece


def _wait(future: Future[Any] | None) -> None:
    if future is not None:
        future.result()


def _is_done(future: Future[Any] | None) -> bool:
    return future is None or future.done()


def _older_than(seconds: float, paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        with suppress(FileNotFoundError):  # whoever wrote it has just finished
            if time.time() - path.stat().st_mtime > seconds:
                yield path


def _disk_trouble(error: OSError) -> Unavailable:
    message = f"The server's storage refused the write ({error.strerror})."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable(message, code="disk_full", hint="Free space on the server's disk, then try again.")
    return Unavailable(
        message, code="storage_unavailable", hint="Look after the server's storage folder, then try again."
    )
