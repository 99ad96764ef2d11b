"""Writes the shards: several threads make blocks, each file gets its blocks' hash in order, and its name when it is
whole and on the disk.

A file's sha256 is one chain, which only one thread at a time can go on with. So where hashes are wanted a few shards
are made at once, and every core hashes: one after the other took half as long again on two cores. A kill then costs the
work on all of the shards that were begun, at most AT_ONCE, and not on one of them.

Blocks go to the disk directly, past the page cache, where the file system allows it: through the cache the writing
would take longer than all the arithmetic (measured: 6.7 s against 3.5; see bench/graft.py).
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from core.durable import sync_folder
from worker.weights.files import Draft, FileRecord
from worker.weights.layout import Shard
from worker.weights.recipe import Recipe
from worker.weights.tensors import Scratch

BLOCK_BYTES = 8 * 1024 * 1024
#: What direct writes must begin and end at. Every disk's block size divides it.
ALIGNMENT = 4096
#: Shards whose hashes grow side by side. More would let a kill cost more, and seldom have a core to hash on.
AT_ONCE = 4
#: Files are made as any program makes them: the umask decides.
_MODE = 0o666
_LOOK_SECONDS = 0.1

#: Bytes written, bytes in all.
OnProgress = Callable[[int, int], None]


class Interrupted(Exception):
    """Another thread has failed."""


@dataclass(frozen=True)
class Written:
    records: dict[str, FileRecord]
    #: Shards that were there already.
    resumed: int


def write_shards(
    recipe: Recipe,
    shards: list[Shard],
    draft: Draft,
    *,
    threads: int | None,
    hashed: bool,
    on_progress: OnProgress | None,
) -> Written:
    """Write every shard that the draft does not hold yet; the sums of those that it holds are put into the tally.

    `on_progress` is called from one thread at a time. The first error of any thread is raised, and files that are not
    whole are removed.
    """
    finished = draft.finished()
    kept = {shard.file: finished[shard.file] for shard in shards if shard.file in finished}
    for record in kept.values():
        recipe.tally.restore(record["measured"])
    records = {file: FileRecord(record["bytes"], record["sha256"]) for file, record in kept.items()}
    progress = _Progress(sum(shard.bytes for shard in shards), on_progress)
    progress.add(sum(record.bytes for record in records.values()))

    def keep(shard: Shard, record: FileRecord) -> None:
        draft.keep(shard.file, record, recipe.tally.of(shard.tensors))
        records[shard.file] = record

    missing = [shard for shard in shards if shard.file not in kept]
    work = _Work(recipe, missing, draft.folder, hashed, progress.add, keep)
    try:
        _run_threads(work, threads or default_threads())
    finally:
        work.discard_parts()
    return Written(records, resumed=len(kept))


def default_threads() -> int:
    """One more than there are cores to use: while one thread waits for the disk, the others compute."""
    return len(os.sched_getaffinity(0)) + 1


def _run_threads(work: _Work, count: int) -> None:
    with ThreadPoolExecutor(count, thread_name_prefix="graft") as pool:
        futures = [pool.submit(work.run) for _ in range(count)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            work.stop.set()
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, Interrupted)), errors[0])


class _Progress:
    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self._done, self._total, self._tell = 0, total, on_progress

    def add(self, count: int) -> None:
        self._done += count
        if count and self._tell is not None:
            self._tell(self._done, self._total)


class _Block(NamedTuple):
    #: Of the shard's blocks, those before it. What is taken in this order ends together in all shards.
    share: float
    file: ShardFile
    number: int
    #: Bytes of the file.
    start: int
    end: int


class _Work:
    """The blocks of all shards, each shard's in order, for whichever thread is free."""

    def __init__(
        self,
        recipe: Recipe,
        shards: list[Shard],
        folder: Path,
        hashed: bool,
        on_bytes: Callable[[int], None],
        on_shard: Callable[[Shard, FileRecord], None],
    ) -> None:
        self.stop = threading.Event()
        self._recipe = recipe
        self._on_bytes, self._on_shard = on_bytes, on_shard
        self._lock = threading.Lock()
        self._open: dict[str, ShardFile] = {}
        self._blocks = self._all_blocks(shards, folder, hashed)

    def run(self) -> None:
        """One thread's part."""
        scratch = Scratch()
        buffer = memoryview(mmap.mmap(-1, BLOCK_BYTES + ALIGNMENT))  # begins at a page, as direct writes must
        while (block := self._next()) is not None:
            file, count = block.file, block.end - block.start
            self._recipe.fill(file.shard, block.start, block.end, buffer[:count], scratch)
            was_last = file.write(block.number, block.start, buffer, count, self.stop)
            record = file.close() if was_last else None
            with self._lock:
                self._on_bytes(count)
                if record is not None:
                    self._on_shard(file.shard, record)
                    del self._open[file.shard.file]

    def discard_parts(self) -> None:
        for file in self._open.values():
            file.discard()

    def _next(self) -> _Block | None:
        with self._lock:
            return None if self.stop.is_set() else next(self._blocks, None)

    def _all_blocks(self, shards: list[Shard], folder: Path, hashed: bool) -> Iterator[_Block]:
        for group in _groups(shards) if hashed else ([shard] for shard in shards):
            parts = [self._blocks_of(shard, folder, hashed) for shard in group]
            yield from heapq.merge(*parts, key=attrgetter("share"))

    def _blocks_of(self, shard: Shard, folder: Path, hashed: bool) -> Iterator[_Block]:
        blocks = shard.blocks(BLOCK_BYTES)
        file = self._open[shard.file] = ShardFile(shard, folder / shard.file, len(blocks), hashed=hashed)
        file.open(direct=all(start % ALIGNMENT == 0 for start, _ in blocks))
        for number, (start, end) in enumerate(blocks):
            yield _Block(number / len(blocks), file, number, start, end)


def _groups(shards: list[Shard]) -> Iterator[list[Shard]]:
    """At most AT_ONCE shards each, and as alike in number as can be: no shard is left to a single core at the end."""
    count = math.ceil(len(shards) / AT_ONCE)
    for number in range(count):
        yield shards[number * len(shards) // count : (number + 1) * len(shards) // count]


class ShardFile:
    """A file that is written in blocks, by any thread, and hashed in their order."""

    def __init__(self, shard: Shard, path: Path, blocks: int, *, hashed: bool) -> None:
        self.shard = shard
        self._path, self._part = path, path.with_name(f"{path.name}.part")
        self._hash = hashlib.sha256() if hashed else None
        self._turn = threading.Condition()
        self._blocks, self._finished = blocks, 0
        self._descriptor = -1
        self._direct = False

    def open(self, *, direct: bool) -> None:
        """Make the file at its full size: a full disk is told of here, and not after an hour."""
        self._descriptor = self._create(direct=direct)
        os.posix_fallocate(self._descriptor, 0, self.shard.bytes)

    def write(self, number: int, start: int, buffer: memoryview, count: int, stop: threading.Event) -> bool:
        """Write the first `count` bytes of `buffer` as block `number`; whether it was the last one to come.

        `buffer` has room behind them: direct writes end at a multiple of ALIGNMENT, and `close` cuts what is too much.
        """
        self._pwrite(buffer[: -(-count // ALIGNMENT) * ALIGNMENT] if self._direct else buffer[:count], start)
        with self._turn:
            while self._hash is not None and self._finished != number:
                if stop.is_set():
                    raise Interrupted
                self._turn.wait(_LOOK_SECONDS)
            if self._hash is not None:
                self._hash.update(buffer[:count])
            self._finished += 1
            self._turn.notify_all()
            return self._finished == self._blocks

    def close(self) -> FileRecord:
        """Make the file durable and give it its name."""
        os.ftruncate(self._descriptor, self.shard.bytes)
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
        self._part.rename(self._path)
        sync_folder(self._path.parent)
        return FileRecord(self.shard.bytes, self._hash.hexdigest() if self._hash else None)

    def discard(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._part.unlink(missing_ok=True)

    def _create(self, *, direct: bool) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        if direct:
            try:
                descriptor = os.open(self._part, flags | os.O_DIRECT, _MODE)
            except OSError as error:
                if error.errno != errno.EINVAL:  # what a file system answers that has no direct writes
                    raise
            else:
                self._direct = True
                return descriptor
        return os.open(self._part, flags, _MODE)

    def _pwrite(self, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done:], start + done)
