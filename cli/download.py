"""Files on their way down: a few at once, each resumed where it stopped and verified before it gets its name.

What is not whole yet lies in a folder `.shadowft-download` beside it, by its id and hash. A run that was killed leaves
it there, and the next one goes on from it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cli.http import Interrupted, Patience, Server, Transient
from cli.parallel import Meter, in_parallel
from cli.printing import say, size
from cli.progress import OnProgress
from core.errors import ShadowError

FILES_AT_ONCE = 4
#: A file is given up after so long without a byte.
PATIENCE_SECONDS = 60.0
READ_BYTES = 1024 * 1024
UNFINISHED = ".shadowft-download"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Wanted:
    """A file as the server lists it."""

    id: str
    #: Where its bytes are.
    route: str
    #: Below the folder, with slashes.
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Summary:
    fetched: int
    #: Of what was fetched now, without what an earlier run had left.
    bytes: int
    #: Files that were there already, with the right hash.
    kept: int


def download(server: Server, wanted: Sequence[Wanted], folder: Path, *, on_progress: OnProgress | None) -> Summary:
    """Put every file below `folder`. Raises ShadowError for a path that leads out of it, and for a full disk."""
    with _told(folder):
        places = {one.id: _place(one, folder) for one in wanted}
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder) as unfinished:
            _require_room(wanted, places, unfinished, folder)
            stop = threading.Event()
            meter = Meter(sum(one.bytes for one in wanted), on_progress)
            fetches = [_Fetch(server, one, places[one.id], unfinished, meter, stop) for one in wanted]
            try:
                counts = in_parallel(lambda fetch: fetch.run(), fetches, at_once=FILES_AT_ONCE, stop=stop)
            except KeyboardInterrupt:
                say("Interrupted. Give the command again to go on from here.")
                raise
            shutil.rmtree(unfinished)
    fetched = [count for count in counts if count is not None]
    return Summary(fetched=len(fetched), bytes=sum(fetched), kept=len(counts) - len(fetched))


def has_hash(path: Path, sha256: str) -> bool:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


# --- where it may be written ------------------------------------------------------------------------------------------


def _place(wanted: Wanted, folder: Path) -> Path:
    parts = wanted.path.split("/")
    odd = any(part in {"", ".", ".."} or "\\" in part or not part.isprintable() for part in parts)
    place = folder.joinpath(*parts)
    # Also where a link that somebody has put there leads out.
    inside = not odd and place.parent.resolve().is_relative_to(folder.resolve())
    if not inside or parts[0] == UNFINISHED or not _ID.fullmatch(wanted.id) or not _SHA256.fullmatch(wanted.sha256):
        raise ShadowError(
            f"The server lists a file {wanted.path!r}, which does not lie inside of {folder}; nothing was downloaded.",
            hint="Check that the server is the one you mean, and that no link in the folder leads out of it.",
        )
    return place


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """The folder of unfinished files, which no other run uses now."""
    unfinished = folder / UNFINISHED
    unfinished.mkdir(exist_ok=True)
    with (unfinished / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShadowError(
                f"Another download into {folder} is running.", hint="Wait for it, or take another folder with --out."
            ) from None
        yield unfinished


def _require_room(wanted: Sequence[Wanted], places: dict[str, Path], unfinished: Path, folder: Path) -> None:
    """Before anything is fetched; a file that has the right size is taken for finished here."""
    missing = [one for one in wanted if _bytes_of(places[one.id]) != one.bytes]
    needed = sum(one.bytes - _bytes_of(_unfinished(one, unfinished)) for one in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ShadowError(
            f"The download needs {size(needed)} more in {folder}, and the disk has {size(free)} left.",
            hint="Free space, or take another folder with --out.",
        )


def _unfinished(wanted: Wanted, folder: Path) -> Path:
    return folder / f"{wanted.id}-{wanted.sha256[:16]}"


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What the disk says, as a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ShadowError(
                f"The disk is full: {folder} takes no more ({error.strerror}).",
                hint="Free space and run the command again; it goes on where it stopped.",
            ) from None
        place = error.filename2 or error.filename or folder
        raise ShadowError(f"{place} cannot be written or read: {error.strerror}.") from None


# --- one file ---------------------------------------------------------------------------------------------------------


class _Damaged(Exception):
    """All bytes are there, and they are not the file's."""


class _Fetch:
    """One file, from wherever it stands to its place."""

    def __init__(
        self, server: Server, wanted: Wanted, place: Path, unfinished: Path, meter: Meter, stop: threading.Event
    ) -> None:
        self._server = server
        self._wanted = wanted
        self._place = place
        self._partial = _unfinished(wanted, unfinished)
        self._meter = meter
        self._stop = stop
        self._patience = Patience(PATIENCE_SECONDS, stop)
        self._fetched = 0

    def run(self) -> int | None:
        """Bytes that came; None where the file was in its place."""
        if self._is_in_place():
            self._tell(self._wanted.bytes)
            return None
        try:
            self._complete()
        except _Damaged:
            # The bytes of an earlier run may have been bad; those of a second try are the server's own.
            try:
                self._complete()
            except _Damaged:
                raise ShadowError(
                    f"{self._wanted.path} comes with other bytes than its hash says; it was not kept.",
                    hint="The server's storage, or what lies between, damages it.",
                ) from None
        self._place.parent.mkdir(parents=True, exist_ok=True)
        self._partial.replace(self._place)
        return self._fetched

    def _is_in_place(self) -> bool:
        return _bytes_of(self._place) == self._wanted.bytes and (
            self._place.is_file() and has_hash(self._place, self._wanted.sha256)
        )

    def _complete(self) -> None:
        """The partial file whole and verified, however often the connection breaks."""
        while True:
            try:
                return self._go_on()
            except Transient as error:
                self._patience.endure(error)

    def _go_on(self) -> None:
        with self._partial.open("a+b") as file:
            file.seek(0)
            digest = hashlib.sha256()
            for piece in iter(lambda: file.read(READ_BYTES), b""):
                digest.update(piece)
            have = file.tell()
            if have != self._wanted.bytes:
                digest = self._append(file, have if have < self._wanted.bytes else 0, digest)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != self._wanted.sha256:
            self._partial.unlink()
            raise _Damaged

    def _append(self, file: BinaryIO, have: int, digest: hashlib._Hash) -> hashlib._Hash:
        """The digest of all, `have` bytes of which are there already."""
        headers = {"accept-encoding": "identity"}
        if have:
            headers |= {"range": f"bytes={have}-", "if-range": f'"{self._wanted.sha256}"'}
        with self._server.stream(self._wanted.route, headers) as answer:
            if answer.status_code != 206:
                file.truncate(0)
                have, digest = 0, hashlib.sha256()
            for piece in answer.iter_raw():  # as it comes: what httpx gathered into larger pieces, a cut would take
                self._check(have := have + len(piece))
                file.write(piece)
                digest.update(piece)
                self._fetched += len(piece)
                self._patience.renew()
                self._tell(have)
        return digest

    def _check(self, have: int) -> None:
        if self._stop.is_set():
            raise Interrupted("Interrupted.")
        if have > self._wanted.bytes:
            self._partial.unlink()
            raise _Damaged

    def _tell(self, have: int) -> None:
        self._meter.tell(self._wanted.id, have)
