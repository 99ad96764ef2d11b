"""Writing an output folder so that it stands whole or not at all, with the hash of every file."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from core.durable import sync_folder

_BLOCK_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    sha256: str


class HashedFile:
    """What is written goes through the hash on its way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._bytes += len(content)

    def copy(self, source: Path, start: int, end: int) -> None:
        """Take over the bytes `start` to `end` of `source`."""
        with source.open("rb") as file:
            file.seek(start)
            while start < end:
                block = file.read(min(_BLOCK_BYTES, end - start))
                if not block:
                    raise OSError(f"{source.name} has been cut while it was copied")
                self.write(block)
                start += len(block)

    @property
    def record(self) -> FileRecord:
        return FileRecord(self._bytes, self._hash.hexdigest())


@contextmanager
def hashed_file(path: Path) -> Iterator[HashedFile]:
    """A file that gets its name only when it is complete and on the disk. Its mode follows the umask."""
    part = path.with_name(f"{path.name}.part")
    with part.open("xb") as raw:
        yield HashedFile(raw)
        raw.flush()
        os.fsync(raw.fileno())
    part.rename(path)


def copy_file(source: Path, target: Path) -> FileRecord:
    with hashed_file(target) as file:
        file.copy(source, 0, source.stat().st_size)
    return file.record


def write_json(target: Path, value: Any) -> FileRecord:
    with hashed_file(target) as file:
        file.write(json.dumps(value, indent=2, allow_nan=False).encode() + b"\n")
    return file.record


@contextmanager
def folder_at(out: Path) -> Iterator[Path]:
    """A folder to fill, beside `out`, which becomes `out` at the end. On any failure it goes and `out` stays absent."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    draft.mkdir()
    try:
        yield draft
        for folder in (*(entry for entry in draft.iterdir() if entry.is_dir()), draft):
            sync_folder(folder)
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync_folder(out.parent)
