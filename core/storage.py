"""Where uploads and artifacts lie.

A key is made by this service, never by a client. What `put` or `adopt` returned from is durable, and it is there whole
or not at all: a backend that cannot promise both is none.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from core.durable import sync_folder
from core.errors import Unavailable

COPY_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Stored:
    bytes: int
    sha256: str


class Incoming(Protocol):
    """An object on its way in: written piece by piece, then kept or dropped."""

    def write(self, piece: bytes) -> None: ...
    def keep(self) -> Stored: ...
    def drop(self) -> None: ...


class Storage(Protocol):
    def receive(self, key: str) -> Incoming:
        """Open `key` for writing. It exists once `keep` returns; `drop` leaves nothing behind."""

    def adopt(self, key: str, source: Path) -> Stored:
        """Store the file `source`, which stays as it is, under `key`."""

    def fetch(self, key: str, destination: Path) -> None:
        """Make the object readable at `destination`."""

    def path(self, key: str) -> Path:
        """A local file with the object's content."""

    def delete(self, key: str) -> None:
        """Remove the object, or every object below the prefix `key`. Absent is fine."""

    def remove_unfinished(self, older_than_seconds: float) -> None:
        """Remove what was being received when its process died."""


class LocalStorage:
    """A folder of this machine (or a volume that all machines mount)."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def receive(self, key: str) -> LocalIncoming:
        return LocalIncoming(self.path(key))

    def adopt(self, key: str, source: Path) -> Stored:
        incoming = self.receive(key)
        try:
            with source.open("rb") as file:
                for piece in _pieces(file):
                    incoming.write(piece)
        except BaseException:
            incoming.drop()
            raise
        return incoming.keep()

    def fetch(self, key: str, destination: Path) -> None:
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.unlink(missing_ok=True)
        destination.symlink_to(self.path(key))

    def path(self, key: str) -> Path:
        return self._root / key

    def delete(self, key: str) -> None:
        path = self.path(key)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def remove_unfinished(self, older_than_seconds: float) -> None:
        for path in self._root.rglob(".*.tmp"):
            with suppress(FileNotFoundError):  # its writer has just finished
                if time.time() - path.stat().st_mtime > older_than_seconds:
                    path.unlink()


class LocalIncoming:
    """Written under a temporary name beside its place, hashed on the way, synced and renamed at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._hash = hashlib.sha256()
        self._bytes = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("wb")
        except OSError as error:
            raise _disk_trouble(error) from error

    def write(self, piece: bytes) -> None:
        try:
            self._file.write(piece)
        except OSError as error:
            raise _disk_trouble(error) from error
        self._hash.update(piece)
        self._bytes += len(piece)

    def keep(self) -> Stored:
        try:
            with self._file as file:
                file.flush()
                os.fsync(file.fileno())
            self._temporary.rename(self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            self.drop()
            raise _disk_trouble(error) from error
        return Stored(bytes=self._bytes, sha256=self._hash.hexdigest())

    def drop(self) -> None:
        with suppress(OSError):  # what is still buffered does not fit either, and nobody wants it
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def _disk_trouble(error: OSError) -> Unavailable:
    return Unavailable(
        f"The server's storage refused the write ({error.strerror}).",
        code="storage_unavailable",
        hint="Free space on the server's disk, then try again.",
    )


def _pieces(file: IO[bytes]) -> Iterable[bytes]:
    while piece := file.read(COPY_BYTES):
        yield piece
