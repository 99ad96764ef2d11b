"""Fetch one snapshot of the Hub into the models' cache: the only child with network and with the token.

    echo '{"root": …, "repo_id": …, "revision": …}' | python -m worker.hub_download

It is a child because nothing less can be ended: the Hub's client sleeps and reads in threads that heed no one, and a
cancelled job must not go on for tens of gigabytes. The request stands in one line of stdin; when stdin ends, so does
this process. Its last line of stdout is `{"folder": …}` or `{"cause": …}`; the lines before are `{"done": …, "total":
…}` in bytes, and `{"removed": …}` for what made room.

The bytes are fetched here and the cache is laid out by the client's `snapshot_download`, which then finds every blob in
its place. That function alone would do, but for three things: it throws away half a file whenever it fails, it waits
for as long as the Hub's Retry-After says, and it compares sizes but not contents.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status, set_client_factory, snapshot_download
from huggingface_hub.utils import build_hf_headers, filter_repo_objects  # type: ignore[attr-defined]  # lazy exports

from core.checkpoints import (
    CONFIG_FILE,
    INDEX_FILE,
    NOT_SMALL_FILE_PATTERNS,
    SINGLE_FILE,
    SMALL_FILE_PATTERNS,
    read_checkpoint,
    shard_files,
)
from core.durable import sync_folder
from core.errors import Cause, ShadowError, StepFailed, Unavailable
from core.hub import (
    ask_hub,
    hub_away,
    hub_errors,
    is_offline,
    mark_file,
    offline_error,
    our_folder,
    read_mark,
    repository_folder,
    snapshot_at_hand,
    snapshot_folder,
)
from worker.cache_room import Wanted, fetching, make_room
from worker.workspace import write_durably

#: Beside the weights only small files are ever fetched: no pickles, no code. And not the small files of other layouts
#: of the weights, the model's card, or whatever lies in folders.
NOT_MODEL_FILES = [*NOT_SMALL_FILE_PATTERNS, "consolidated*", "adapter_*", "README.md", "*/*"]

#: Files fetched at the same time.
THREADS = 4
CHUNK_BYTES = 1024 * 1024
#: A try that brought at least so much was not in vain, and is not counted.
WORTHWHILE_BYTES = 1024 * 1024
#: The Hub gives larger files to clients of its Xet protocol only; these are left to `snapshot_download`.
PLAIN_LIMIT_BYTES = 50_000_000_000
#: Answers after which asking again helps.
PASSING_STATUS = (408, 429, 500, 502, 503, 504)
#: Between two lines about progress.
SAID_SECONDS = 1.0

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a Hub in trouble is borne with before the job is told so."""

    #: In a row, for one file or listing.
    retries: int = 5
    #: Before the first of them; doubled each time.
    first_wait_seconds: float = 1.0
    #: A Hub that asks for more is left alone: the job comes back later.
    longest_wait_seconds: float = 60.0
    #: Without an answer, or without a byte.
    timeout_seconds: float = 20.0
    #: A transfer slower than `WORTHWHILE_BYTES` in so long is begun anew where it stopped.
    stall_seconds: float = 60.0


@dataclass(frozen=True, kw_only=True)
class Request:
    root: str
    repo_id: str
    #: A commit.
    revision: str
    #: Without the weights.
    small: bool = False
    limit_bytes: int | None = None
    reserve_bytes: int = 0
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub's listing has it."""

    name: str
    bytes: int
    #: The name of its blob in the cache: its sha256 where it is kept in LFS, git's name of it otherwise.
    blob: str

    def digest(self) -> Any:
        """What yields `blob` once it has been fed the content."""
        if len(self.blob) == hashlib.sha256().digest_size * 2:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.bytes, usedforsecurity=False)


class Damaged(Exception):
    """The bytes are not those of the listing."""


class _Later(Unavailable):
    """The Hub is in trouble; it may have said for how long."""

    default_code = "hub_unavailable"
    retry_after_seconds: float | None = None


class Download:
    """One snapshot: listed, given room, fetched, laid out, verified, marked."""

    def __init__(self, request: Request, say: Callable[[dict[str, Any]], None]) -> None:
        self.request = request
        self.root = Path(request.root)
        self.blobs = repository_folder(self.root, request.repo_id) / "blobs"
        self.folder = snapshot_folder(self.root, request.repo_id, request.revision)
        self._verified: dict[str, int] = {}
        self._say = say
        self._done = self._total = 0
        self._said = 0.0
        self._lock = threading.Lock()

    def run(self) -> Path:
        request = self.request
        with fetching(self.root, request.repo_id, small=request.small) as lock:
            if there := snapshot_at_hand(self.root, request.repo_id, request.revision, small=request.small):
                return there.folder
            self._verified = self._known()
            if is_offline():
                self._verify_alone()
            else:
                _prepare_client(request)
                self._fetch(lock)
        return self.folder

    def _fetch(self, lock: int) -> None:
        listed = self._patiently(self._list)
        names = {*_small_files(listed), *(() if self.request.small else self._weight_files(listed))}
        files = [file for name, file in listed.items() if name in names]
        self._remove_damaged(files)
        missing = [file for file in files if not (self.blobs / file.blob).exists()]
        if missing:
            self._make_room(files, missing, lock)
            self._bring(missing)
        self._patiently(lambda: self._lay_out(names))
        for file in files:
            self._require_sound(file)
        if not self.request.small:
            read_checkpoint(self.folder)
        self._mark([file.name for file in files], sorted(listed.keys() - names))

    # --- what there is --------------------------------------------------------------------------------------------

    def _list(self) -> dict[str, RemoteFile]:
        request = self.request
        info = ask_hub(
            request.repo_id, request.revision, with_sizes=True, timeout_seconds=request.patience.timeout_seconds
        )
        return {one.rfilename: _remote_file(one) for one in info.siblings or []}

    def _weight_files(self, listed: dict[str, RemoteFile]) -> set[str]:
        """The single file, else those that the index names: what else lies there is never read, nor paid for."""
        if SINGLE_FILE in listed:
            return {SINGLE_FILE}
        if INDEX_FILE not in listed:
            return set()
        index = listed[INDEX_FILE]
        self._remove_damaged([index])
        if not (self.blobs / index.blob).exists():
            self._bring([index])
        return shard_files(self.blobs / index.blob, f"{self.request.repo_id}/{INDEX_FILE}")

    def _known(self) -> dict[str, int]:
        """Blobs that were verified for this or another snapshot of the repository, with their times."""
        marks = filter(None, map(read_mark, our_folder(self.root, self.request.repo_id).glob("*.json")))
        return {file["blob"]: file["mtime_ns"] for mark in marks for file in mark["files"].values()}

    def _remove_damaged(self, files: list[RemoteFile]) -> None:
        for file in files:
            blob = self.blobs / file.blob
            if blob.exists() and not self._is_sound(blob, file):
                blob.unlink()

    def _make_room(self, files: list[RemoteFile], missing: list[RemoteFile], lock: int) -> None:
        have = sum(min(_size(self._partial(file)), file.bytes) for file in missing)
        wanted = Wanted(
            repo_id=self.request.repo_id,
            commit=self.request.revision,
            blobs=frozenset(self.blobs / file.blob for file in files),
            total_bytes=sum(file.bytes for file in files),
            missing_bytes=sum(file.bytes for file in missing) - have,
        )
        limit, reserve = self.request.limit_bytes, self.request.reserve_bytes
        for removed in make_room(self.root, wanted, lock, limit_bytes=limit, reserve_bytes=reserve):
            self._say({"removed": removed})

    # --- bytes ----------------------------------------------------------------------------------------------------

    def _bring(self, missing: list[RemoteFile]) -> None:
        self.blobs.mkdir(parents=True, exist_ok=True)
        plain = [file for file in missing if file.bytes <= PLAIN_LIMIT_BYTES]
        self._done, self._total = 0, sum(file.bytes for file in plain)
        pool = ThreadPoolExecutor(THREADS)
        try:
            for transfer in as_completed([pool.submit(self._bring_one, file) for file in plain]):
                transfer.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # the process ends at once where one has failed
        sync_folder(self.blobs)

    def _bring_one(self, file: RemoteFile) -> None:
        try:
            self._transfer(file)
        except Damaged:
            try:
                self._transfer(file)
            except Damaged as again:
                raise _damaged(self.request.repo_id, f"{file.name} {again}, twice") from None

    def _transfer(self, file: RemoteFile) -> None:
        """Fetch a blob, from where an earlier try stopped. Raises Damaged, and then the half is gone."""
        path = self._partial(file)
        with path.open("a+b") as sink:
            partial = _Partial(sink, file.digest())
            self._note(partial.bytes)
            self._patiently(lambda: self._receive(file, partial), progress=lambda: partial.bytes)
            sink.flush()
            os.fsync(sink.fileno())
        finding = partial.finding(file)
        if finding is not None:
            path.unlink()
            self._note(-partial.bytes)
            raise Damaged(finding)
        if (self.blobs / file.blob).exists():  # who fetched the small files alone was quicker
            path.unlink()
        else:
            path.rename(self.blobs / file.blob)
        self._verified[file.blob] = (self.blobs / file.blob).stat().st_mtime_ns

    def _receive(self, file: RemoteFile, partial: _Partial) -> None:
        """One request for what is missing of a blob."""
        start = partial.bytes
        if start >= file.bytes:
            return
        url = hf_hub_url(self.request.repo_id, file.name, revision=self.request.revision)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # zipped bytes could not be resumed
        if start:
            headers["Range"] = f"bytes={start}-"
        pace = _Pace(self.request.patience.stall_seconds)
        with get_session().stream("GET", url, headers=headers) as response:
            if response.status_code == 416:  # there is nothing beyond what has come: too little, as will be found
                return
            hf_raise_for_status(response)
            if start and response.status_code != 206:  # it gives the whole file, whatever was asked for
                self._note(-start)
                partial.restart()
            for chunk in response.iter_bytes():  # as they come: what the client held back would be lost with a cut
                partial.add(chunk)
                self._note(len(chunk))
                if partial.bytes > file.bytes:
                    return
                if pace.is_stalled(len(chunk)):
                    raise hub_away(
                        self.request.repo_id, f"sent fewer than {WORTHWHILE_BYTES} bytes in {pace.seconds:g} s"
                    )

    def _partial(self, file: RemoteFile) -> Path:
        return self.blobs / f"{file.blob}{'.small' if self.request.small else ''}.incomplete"

    def _note(self, count: int) -> None:
        with self._lock:
            self._done += count
            if time.monotonic() - self._said >= SAID_SECONDS:
                self._said = time.monotonic()
                self._say({"done": self._done, "total": self._total})

    def _patiently(self, act: Callable[[], Result], progress: Callable[[], int] = lambda: 0) -> Result:
        """Try again what the Hub failed for the moment, with longer and longer waits. A try with progress is free."""
        patience, tries = self.request.patience, 0
        while True:
            before = progress()
            try:
                with hub_errors(self.request.repo_id, self.request.revision):
                    return act()
            except Unavailable as error:
                tries = 0 if progress() - before >= WORTHWHILE_BYTES else tries
                if tries >= patience.retries:
                    raise
                time.sleep(_wait_seconds(error, tries, patience))
                tries += 1

    # --- the snapshot ---------------------------------------------------------------------------------------------

    def _lay_out(self, names: Iterable[str]) -> None:
        snapshot_download(
            self.request.repo_id,
            revision=self.request.revision,
            cache_dir=self.root,
            allow_patterns=[glob.escape(name) for name in names],
            etag_timeout=self.request.patience.timeout_seconds,
            max_workers=THREADS,
        )

    def _require_sound(self, file: RemoteFile) -> None:
        path = (self.folder / file.name).resolve()
        if not self._is_sound(path, file):
            path.unlink(missing_ok=True)
            raise _damaged(self.request.repo_id, f"{file.name} is not the file of the listing")

    def _is_sound(self, blob: Path, file: RemoteFile) -> bool:
        """Whether it has the listing's size and content; a content that was verified before is not read again."""
        found = blob.stat()
        if found.st_size != file.bytes:
            return False
        if self._verified.get(blob.name) == found.st_mtime_ns and blob.name == file.blob:
            return True
        digest = file.digest()
        _feed(digest, blob)
        if digest.hexdigest() != file.blob:
            return False
        self._verified[blob.name] = found.st_mtime_ns
        return True

    def _verify_alone(self) -> None:
        """Without the Hub: index, headers and sizes must agree, and a blob that is named by its sha256 must have it."""
        if not (self.folder / CONFIG_FILE).exists():
            raise offline_error(self.request.repo_id, self.request.revision)
        weights = () if self.request.small else read_checkpoint(self.folder).files
        names = sorted({*_small_files(path.name for path in self.folder.iterdir()), *weights})
        for name in names:
            blob = (self.folder / name).resolve()
            file = RemoteFile(name, blob.stat().st_size, blob.name)
            if len(blob.name) in (40, 64) and not self._is_sound(blob, file):
                raise _damaged(self.request.repo_id, f"{name} in the models' cache is not what its name says")
        self._mark(names, [])

    def _mark(self, names: Iterable[str], left_out: list[str]) -> None:
        files = {}
        for name in names:
            blob = (self.folder / name).resolve()
            files[name] = {"blob": blob.name, "bytes": blob.stat().st_size, "mtime_ns": blob.stat().st_mtime_ns}
        mark = mark_file(self.root, self.request.repo_id, self.request.revision, small=self.request.small)
        write_durably(mark, json.dumps({"files": files, "left_out": left_out}).encode())


class _Partial:
    """A file that grows, and the digest of what it holds."""

    def __init__(self, sink: Any, digest: Any) -> None:
        self._sink, self._empty, self._digest = sink, digest.copy(), digest
        sink.seek(0)
        while chunk := sink.read(CHUNK_BYTES):
            self._digest.update(chunk)
        self.bytes: int = sink.tell()

    def add(self, chunk: bytes) -> None:
        self._sink.write(chunk)
        self._digest.update(chunk)
        self.bytes += len(chunk)

    def restart(self) -> None:
        self._sink.truncate(0)
        self._digest, self.bytes = self._empty.copy(), 0

    def finding(self, file: RemoteFile) -> str | None:
        """What is wrong with it."""
        if self.bytes != file.bytes:
            found = f"more than {file.bytes}" if self.bytes > file.bytes else str(self.bytes)
            return f"has {found} bytes where the listing says {file.bytes}"
        if self._digest.hexdigest() != file.blob:
            return f"has the hash {self._digest.hexdigest()} where the listing says {file.blob}"
        return None


class _Pace:
    """Tells a transfer that moves from one that drips."""

    def __init__(self, stall_seconds: float) -> None:
        self.seconds = stall_seconds
        self._began, self._bytes = time.monotonic(), 0

    def is_stalled(self, count: int) -> bool:
        self._bytes += count
        if self._bytes >= WORTHWHILE_BYTES:
            self._began, self._bytes = time.monotonic(), 0
        return time.monotonic() - self._began > self.seconds


def _prepare_client(request: Request) -> None:
    """Make the Hub's client tell of trouble at once instead of waiting: how long is waited is decided here."""
    usual = get_session()

    def refuse_trouble(response: Any) -> None:
        if response.status_code in PASSING_STATUS:
            raise _later(request.repo_id, response)

    set_client_factory(
        lambda: type(usual)(
            event_hooks={**usual.event_hooks, "response": [refuse_trouble]},
            follow_redirects=True,
            timeout=request.patience.timeout_seconds,
        )
    )


def _later(repo_id: str, response: Any) -> _Later:
    said = response.headers.get("retry-after", "")
    asks = f" and asks to wait for {said} s" if said.isdigit() else ""
    usual = hub_away(repo_id, f"answered with HTTP status {response.status_code}{asks}")
    error = _Later(usual.message, hint=usual.hint)
    error.retry_after_seconds = float(said) if said.isdigit() else None
    return error


def _wait_seconds(error: Unavailable, tries: int, patience: Patience) -> float:
    """Raises the error where the Hub asks for more than can be borne."""
    asked = error.retry_after_seconds if isinstance(error, _Later) else None
    if asked is not None:
        if asked > patience.longest_wait_seconds:
            raise error
        return asked
    spread = random.uniform(0.8, 1.2)  # noqa: S311 - guards nothing
    return float(min(patience.first_wait_seconds * 2.0**tries, patience.longest_wait_seconds)) * spread


def _small_files(names: Iterable[str]) -> Iterator[str]:
    return filter_repo_objects(names, allow_patterns=SMALL_FILE_PATTERNS, ignore_patterns=NOT_MODEL_FILES)


def _remote_file(sibling: Any) -> RemoteFile:
    blob = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
    return RemoteFile(sibling.rfilename, sibling.size, blob)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _feed(digest: Any, path: Path) -> None:
    with path.open("rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            digest.update(chunk)


def _damaged(repo_id: str, finding: str) -> StepFailed:
    return StepFailed(
        Cause(
            code="damaged_download",
            message=f"The download of {repo_id} is damaged: {finding}.",
            hint="See whether a proxy or mirror before the Hub serves stale files, then create the job again.",
            fault="infrastructure",
            param="model",
        )
    )


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"The worker's disk refused a model file ({error.strerror or error}).",
            code="storage_unavailable",
            hint="Free space in the worker's data folder.",
        ) from error


# --- the program ------------------------------------------------------------------------------------------------------


def main() -> None:
    say = _speaker()
    asked = json.loads(sys.stdin.readline())
    request = Request(**{**asked, "patience": Patience(**asked.get("patience", {}))})
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        with _disk_errors():
            say({"folder": str(Download(request, say).run())})
    except ShadowError as error:
        say({"cause": error.cause.as_dict()})
    except Exception:  # noqa: BLE001 - its last line becomes the cause, and the end below must come whatever it was
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(0)  # transfers that go on after one of them has failed are not waited for


def _speaker() -> Callable[[dict[str, Any]], None]:
    """Writes our lines to stdout; whatever a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(line: dict[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    return say


def _leave_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
