"""Who uses what of the models' cache, and how room is made in it.

Users and fetchers hold file locks, which the kernel lets go however their process ends: a shared one on a snapshot for
as long as a job reads it, an exclusive one on a repository while a process fetches from it. What nobody holds may be
removed, the longest unused first. The Hub client's own scan and delete are not used: they pass over every repository
that a killed download left without a snapshot, and those are what must go first.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from core.errors import InvalidInput, Unavailable
from core.hub import mark_file, our_folder, repository_folder

#: A blob without a snapshot is spared for so long: small files come into this cache without the fetcher's lock.
YOUNG_SECONDS = 60.0

# --- locks ----------------------------------------------------------------------------------------------------------


@contextmanager
def using(root: Path, repo_id: str, commit: str) -> Iterator[None]:
    """Nobody removes the snapshot while this is open; it need not be there yet."""
    with _open_lock(_use_lock(root, repo_id, commit)) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        touch(root, repo_id, commit)
        yield


@contextmanager
def fetching(root: Path, repo_id: str, *, small: bool = False) -> Iterator[int]:
    """One process of this machine at a time; the others wait here. Gives the lock's descriptor, for `make_room`.

    Those who want small files alone (`small`) wait for each other, but not for hours behind somebody's weights.
    """
    with _open_lock(_small_lock(root, repo_id) if small else _fetch_lock(root, repo_id)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.ftruncate(lock, 0)  # what its last holder was promised
        yield lock


def touch(root: Path, repo_id: str, commit: str) -> None:
    """Note that the snapshot was used now, as far as it is there."""
    for small in (False, True):
        with suppress(FileNotFoundError):
            os.utime(mark_file(root, repo_id, commit, small=small))


def _room_lock(root: Path) -> Path:
    """One process at a time counts and makes room."""
    return our_folder(root, "").parent / "room.lock"


def _use_lock(root: Path, repo_id: str, commit: str) -> Path:
    return our_folder(root, repo_id) / f"{commit}.lock"


def _fetch_lock(root: Path, repo_id: str) -> Path:
    return our_folder(root, repo_id) / "fetch.lock"


def _small_lock(root: Path, repo_id: str) -> Path:
    return our_folder(root, repo_id) / "small.lock"


@contextmanager
def _open_lock(path: Path) -> Iterator[int]:
    """A lock file stays for ever: one that was removed and made again would lock nobody out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o664)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class _Taken(ExitStack):
    """Locks taken without waiting, each asked for once, and held until this is closed."""

    def __init__(self) -> None:
        super().__init__()
        self._answers: dict[Path, bool] = {}

    def take(self, path: Path) -> bool:
        """Whether nobody else holds it."""
        if path not in self._answers:
            descriptor = self.enter_context(_open_lock(path))
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._answers[path] = False
            else:
                self._answers[path] = True
        return self._answers[path]


# --- room -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What is about to be fetched."""

    repo_id: str
    commit: str
    #: Every blob of the snapshot, also what is there already.
    blobs: frozenset[Path]
    total_bytes: int
    #: Bytes still to come.
    missing_bytes: int


@dataclass(frozen=True)
class _Revision:
    """A snapshot in the cache."""

    repository: Path
    commit: str
    blobs: frozenset[Path]
    #: Seconds since the epoch.
    used_at: float

    @property
    def repo_id(self) -> str:
        return _repo_id(self.repository)


def make_room(root: Path, wanted: Wanted, lock: int, *, limit_bytes: int | None, reserve_bytes: int) -> list[str]:
    """Remove what is needed for `wanted` to fit, and promise it the room until `lock` (of `fetching`) is let go.

    What was removed, in words for a log.

    Without a limit only what dead downloads left is removed. Raises InvalidInput for a model above the limit,
    Unavailable where what is in use leaves no room or the disk has too little. Nothing is removed in vain.
    """
    if limit_bytes is not None and wanted.total_bytes > limit_bytes:
        raise _too_large(wanted, limit_bytes)
    with _open_lock(_room_lock(root)) as room_lock, _Taken() as taken:
        fcntl.flock(room_lock, fcntl.LOCK_EX)
        used, promised = _used_and_promised(root, wanted.repo_id, taken)
        over = used + promised + wanted.missing_bytes - limit_bytes if limit_bytes is not None else 0
        free = shutil.disk_usage(root).free
        lacking = wanted.missing_bytes + promised + reserve_bytes - free
        removed: list[str] = []
        if (short := max(over, lacking)) > 0:
            removed = _free(root, wanted, taken, short, whole=limit_bytes is not None)
            if not removed:
                raise _no_room(root, wanted, limit_bytes, over, free, reserve_bytes)
        expected = _size(repository_folder(root, wanted.repo_id)) + wanted.missing_bytes
        os.pwrite(lock, str(expected).encode(), 0)
        return removed


def _used_and_promised(root: Path, own: str, taken: _Taken) -> tuple[int, int]:
    """Bytes of all blobs, and those that others who fetch now were promised and do not have yet."""
    used = promised = 0
    for repository in root.glob("models--*"):
        size = _size(repository)
        used += size
        lock = _fetch_lock(root, _repo_id(repository))
        if _repo_id(repository) != own and not taken.take(lock):
            promised += max(0, int(lock.read_bytes() or b"0") - size)
    return used, promised


def _free(root: Path, wanted: Wanted, taken: _Taken, short: int, *, whole: bool) -> list[str]:
    """Remove at least `short` bytes, leftovers first and then (`whole`) snapshots; or nothing."""
    loose = list(_loose(root, wanted, taken))
    freed = sum(_bytes(path) for path in loose)
    chosen: list[_Revision] = []
    if freed < short and whole:
        revisions = [one for repository in root.glob("models--*") for one in _revisions(root, repository)]
        links = Counter(blob for one in revisions for blob in one.blobs) + Counter(wanted.blobs)
        for one in sorted(revisions, key=lambda one: one.used_at):
            if freed >= short:
                break
            if not _is_idle(root, one, wanted, taken):
                continue
            chosen.append(one)
            links.subtract(one.blobs)
            freed += sum(_bytes(blob) for blob in one.blobs if links[blob] == 0)
    if freed < short:
        return []
    for path in loose:
        path.unlink(missing_ok=True)
    for one in chosen:
        _remove(root, one, spared=wanted.blobs)
    return [*map(str, loose), *(f"{one.repo_id}@{one.commit}" for one in chosen)]


def _is_idle(root: Path, one: _Revision, wanted: Wanted, taken: _Taken) -> bool:
    """Whether nobody uses it or fetches from its repository; if so, nobody begins to until `taken` is closed."""
    if (one.repo_id, one.commit) == (wanted.repo_id, wanted.commit):
        return False
    if one.repo_id != wanted.repo_id and not taken.take(_fetch_lock(root, one.repo_id)):
        return False
    return taken.take(_use_lock(root, one.repo_id, one.commit))


def _loose(root: Path, wanted: Wanted, taken: _Taken) -> Iterator[Path]:
    """Blobs that no snapshot names and nobody is fetching: halves, and wholes whose download ended before the end."""
    for repository in root.glob("models--*"):
        linked = {blob for one in _revisions(root, repository) for blob in one.blobs} | wanted.blobs
        loose = [path for path in _blobs(repository) if path.with_suffix("") not in linked and path not in linked]
        loose = [path for path in loose if time.time() - path.stat().st_mtime > YOUNG_SECONDS]
        own = _repo_id(repository) == wanted.repo_id
        if loose and (own or taken.take(_fetch_lock(root, _repo_id(repository)))):
            yield from loose


def _remove(root: Path, one: _Revision, *, spared: Collection[Path]) -> None:
    """The mark first, so that nobody takes for whole what is going; the blobs last."""
    for small in (False, True):
        mark_file(root, one.repo_id, one.commit, small=small).unlink(missing_ok=True)
    shutil.rmtree(one.repository / "snapshots" / one.commit)
    for ref in (one.repository / "refs").rglob("*"):
        if ref.is_file() and ref.read_text().strip() == one.commit:
            ref.unlink()
    (one.repository / "trees" / f"{one.commit}.json").unlink(missing_ok=True)
    linked = {blob for other in _revisions(root, one.repository) for blob in other.blobs}
    for blob in one.blobs - linked - set(spared):
        blob.unlink(missing_ok=True)


def _revisions(root: Path, repository: Path) -> Iterator[_Revision]:
    for folder in (repository / "snapshots").glob("*"):
        links = [path for path in folder.rglob("*") if path.is_symlink()]
        blobs = frozenset(repository / "blobs" / path.readlink().name for path in links)
        yield _Revision(repository, folder.name, blobs, _used_at(root, repository, folder))


def _used_at(root: Path, repository: Path, folder: Path) -> float:
    marks = [mark_file(root, _repo_id(repository), folder.name, small=small) for small in (False, True)]
    noted = [mark.stat().st_mtime for mark in marks if mark.exists()]
    return max(noted, default=folder.stat().st_mtime)


def _repo_id(repository: Path) -> str:
    return repository.name.removeprefix("models--").replace("--", "/")


def _blobs(repository: Path) -> Iterator[Path]:
    return (repository / "blobs").glob("*")


def _size(repository: Path) -> int:
    return sum(map(_bytes, _blobs(repository)))


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it was a half, and is whole by now
        return 0


# --- words ----------------------------------------------------------------------------------------------------------


def _too_large(wanted: Wanted, limit_bytes: int) -> InvalidInput:
    return InvalidInput(
        f"{wanted.repo_id} has {wanted.total_bytes} bytes; this server's cache of models may hold {limit_bytes}",
        code="model_too_large",
        param="model",
        hint="Take a smaller model, or raise SHADOWFT_MODEL_CACHE_BYTES.",
    )


def _no_room(
    root: Path, wanted: Wanted, limit_bytes: int | None, over: int, free: int, reserve_bytes: int
) -> Unavailable:
    if over > 0:
        return Unavailable(
            f"{wanted.repo_id} needs {wanted.missing_bytes} bytes; {root} is {over} bytes short of them under its "
            f"limit of {limit_bytes}, and what could be removed is in use",
            code="model_cache_full",
            hint="Wait until other jobs have ended, or raise SHADOWFT_MODEL_CACHE_BYTES.",
        )
    return Unavailable(
        f"{wanted.repo_id} needs {wanted.missing_bytes} bytes; the disk of {root} has {free} free, of which "
        f"{reserve_bytes} are kept in reserve",
        code="storage_full",
        hint="Free space there. With SHADOWFT_MODEL_CACHE_BYTES set, unused models are removed when room is needed.",
    )
