"""An output folder that stands whole or not at all, is resumed after a kill, and knows the hash of every file."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from core.durable import sync_folder
from core.errors import Conflict, InvalidInput, ShadowError, Unavailable

MANIFEST_FILE = "manifest.json"

_BLOCK_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    #: None where hashing was not asked for.
    sha256: str | None


class HashedFile:
    """What is written goes through the hash on its way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._bytes += len(content)

    @property
    def record(self) -> FileRecord:
        return FileRecord(self._bytes, self._hash.hexdigest())


@contextmanager
def hashed_file(path: Path) -> Iterator[HashedFile]:
    """A file that gets its name only when it is complete and on the disk; an error leaves nothing. Its mode follows
    the umask."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as raw:
            yield HashedFile(raw)
            raw.flush()
            os.fsync(raw.fileno())
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def copy_file(source: Path, target: Path) -> FileRecord:
    with hashed_file(target) as file, source.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            file.write(block)
    return file.record


def write_bytes(target: Path, content: bytes) -> FileRecord:
    with hashed_file(target) as file:
        file.write(content)
    return file.record


def write_json(target: Path, value: Any) -> FileRecord:
    return write_bytes(target, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """One text for one value, so that a change of any byte can be seen."""
    return json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"


def write_manifest(folder: Path, records: dict[str, FileRecord]) -> int:
    """Name every file of the folder, last of all. Returns the bytes of the whole folder."""
    files = {file: asdict(records[file]) for file in sorted(records)}
    manifest = write_json(folder / MANIFEST_FILE, {"format": 1, "files": files})
    return manifest.bytes + sum(record.bytes for record in records.values())


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Draft:
    """The hidden folder beside `out` in which it is made: `.{out.name}.graft`.

    folder/    what becomes `out`
    records/   one for each finished shard, written after it: its own sha256, and what is known of the shard
    plan.json  what is being made of what; a draft of another plan is thrown away
    lock       held while a process writes here; removed last
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._root = out.with_name(f".{out.name}.graft")
        self._new_parents = [parent for parent in out.parents if parent.name != ".." and not parent.exists()]
        self.folder = self._root / "folder"
        self._records = self._root / "records"
        self._lock = self._root / "lock"

    def begin(self, plan: str) -> None:
        """A kill may have left any part of a draft, or all but its folder."""
        plan_file, content = self._root / "plan.json", plan.encode()
        if not plan_file.exists() or plan_file.read_bytes() != content:
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self._records, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        self._records.mkdir(exist_ok=True)
        write_bytes(plan_file, content)

    def finished(self) -> dict[str, dict[str, Any]]:
        """What was kept of each shard that is whole."""
        kept = (_read_record(path) for path in sorted(self._records.glob("*.json")))
        return {
            record["file"]: record
            for record in kept
            if record is not None
            and (path := self.folder / record["file"]).exists()
            and path.stat().st_size == record["bytes"]
        }

    def keep(self, file: str, record: FileRecord, measured: dict[str, Any]) -> None:
        content = json_bytes({"file": file, **asdict(record), "measured": measured})
        write_bytes(self._records / f"{file}.json", _seal(content) + content)

    def publish(self) -> None:
        for folder in (*(entry for entry in self.folder.iterdir() if entry.is_dir()), self.folder):
            sync_folder(folder)
        self.folder.rename(self._out)
        sync_folder(self._out.parent)

    def keep_only(self, names: Iterable[str]) -> None:
        """Files that another run left, and that may be old: small ones are made again."""
        kept = set(names)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in kept:
                path.unlink()

    def remove(self) -> None:
        """All of it, and the folders that were made for it, where nothing else came to lie in them.

        The lock goes last: until then nobody else begins a draft here, whose files would go too.
        """
        with suppress(OSError):
            for path in self._root.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path != self._lock:
                    path.unlink()
            self._lock.unlink()
            for folder in (self._root, *self._new_parents):
                folder.rmdir()

    def remove_empty(self) -> None:
        """Where no shard is finished there is nothing to go on from."""
        if not self.finished():
            self.remove()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Conflict: another process is writing to the same `out`, or something else lies where the draft would."""
        while True:
            with self._open_lock() as lock:
                self._take(lock)
                if self._is_in_place(lock):
                    yield
                    return

    def _open_lock(self) -> BinaryIO:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            return self._lock.open("wb")
        except OSError as error:
            raise self._refusal(error) from error

    def _take(self, lock: BinaryIO) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"Another process is writing {self._out.name} at this moment",
                code="output_busy",
                hint="Wait for it, or write elsewhere.",
            ) from None

    def _is_in_place(self, lock: BinaryIO) -> bool:
        """Whoever held it may have removed it between our opening and our locking, and a third may hold a new one."""
        try:
            return os.path.samestat(os.fstat(lock.fileno()), self._lock.stat())
        except FileNotFoundError:
            return False

    def _refusal(self, error: OSError) -> ShadowError:
        if error.errno == errno.ENAMETOOLONG:
            return InvalidInput(
                f"The name {self._out.name[:40]}… is too long",
                param="out",
                hint="Name a shorter one: the folder that it is made in has a name seven letters longer.",
            )
        if error.errno in (errno.EEXIST, errno.EISDIR):
            return Conflict(
                f"{error.filename} is in the way of {self._out.name} ({error.strerror})",
                code="output_busy",
                hint="Remove it, or write elsewhere.",
            )
        return Unavailable(
            f"{self._out.name} cannot be written into {self._out.parent.name or self._out.parent} "
            f"({error.strerror or error})",
            code="storage_unavailable",
            hint="Name a place where you may write.",
        )


@contextmanager
def draft_of(out: Path, plan: str) -> Iterator[Draft]:
    """A draft that becomes `out` at the end.

    InvalidInput: `out` is there already. Unavailable: the disk refused. Finished shards outlive a kill and every error
    but a refusal, which would come again.
    """
    draft = Draft(out)
    with draft.locked():
        try:
            refuse_taken(out)
            draft.begin(plan)
            yield draft
            draft.publish()
        except InvalidInput:  # would come again
            draft.remove()
            raise
        except OSError as error:
            raise _disk_refused(draft, out, error) from error
        except BaseException:
            draft.remove_empty()
            raise
        draft.remove()


def refuse_taken(out: Path) -> None:
    """InvalidInput: something is there, be it under another name. `..` of what is yet to be made will be there."""
    place = os.path.realpath(out)
    if out.name == ".." or os.path.lexists(out) or os.path.exists(place):  # noqa: PTH110 - pathlib's own may raise
        raise InvalidInput(f"{out.name} exists already", param="out", hint="Name a folder that does not exist yet.")


def _seal(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b"\n"


def _read_record(path: Path) -> dict[str, Any] | None:
    """What was kept of one shard; None where the file is not as it was written."""
    raw = path.read_bytes()
    content = raw.partition(b"\n")[2]
    if raw != _seal(content) + content:
        return None
    record: dict[str, Any] = json.loads(content)
    return record


def _disk_refused(draft: Draft, out: Path, error: OSError) -> Unavailable:
    done = len(draft.finished())
    draft.remove_empty()
    return Unavailable(
        f"The disk refused a part of {out.name} ({error.strerror or error}); {done} of its files are finished",
        code="storage_unavailable",
        hint="Free space and run the same again: it goes on behind the files that are finished.",
    )
