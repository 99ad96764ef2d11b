"""What the parts of a graft cost alone, in one process: the import, reading, arithmetic, hashing, writing.

The work of each is that of a whole full graft of the pair (bytes, threads, block sizes), and nothing else; so the
largest says what bounds the whole, and the whole against their sum says how much of them goes on at once.

    python bench/yardsticks/stages.py PAIR SCRATCH_FILE
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

THREADS = 2
BLOCK = 8 << 20
CHUNK = 128 << 10

Figures = dict[str, dict[str, float]]


def main() -> None:
    pair, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    files = {model: sorted((pair / model).glob("model*.safetensors")) for model in ("instruct", "base", "tuned")}
    blocks = [
        (file, start) for model in files for file in files[model] for start in range(0, file.stat().st_size, BLOCK)
    ]
    written = len([file for file, _ in blocks if file.parent.name == "instruct"])
    figures: Figures = {}
    with _measured(figures, "import"):
        import worker.weights  # noqa: F401
    _add(mmap.mmap(-1, BLOCK))  # loads the kernels
    buffers = [mmap.mmap(-1, BLOCK) for _ in range(THREADS)]  # page-aligned, as direct writes want them
    with _measured(figures, "read"):
        _share(len(blocks), lambda thread, item: _read(*blocks[item], buffers[thread]))
    with _measured(figures, "arithmetic"):
        _share(written, lambda thread, _: _add(buffers[thread]))
    with _measured(figures, "hash"):
        _share(written, lambda thread, _: hashlib.sha256(buffers[thread]).digest())
    with _measured(figures, "write"):
        _write(scratch, written, buffers)
    print(json.dumps(figures))


@contextmanager
def _measured(figures: Figures, stage: str) -> Iterator[None]:
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    yield
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    used = {"user": after.ru_utime - before.ru_utime, "system": after.ru_stime - before.ru_stime}
    figures[stage] = {name: round(seconds, 2) for name, seconds in {"wall": wall, **used}.items()}


def _share(items: int, work: Callable[[int, int], object]) -> None:
    """`work(thread, item)`, every second item to each of two threads."""

    def every_second(thread: int) -> None:
        for item in range(thread, items, THREADS):
            work(thread, item)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(every_second, range(THREADS)))


def _read(file: Path, start: int, buffer: mmap.mmap) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.preadv(descriptor, [buffer], start)
    finally:
        os.close(descriptor)


def _add(buffer: mmap.mmap) -> None:
    """Three blocks in, one out, by chunks that the processor's cache holds."""
    import numpy as np

    from worker.weights import kernels

    values = np.frombuffer(buffer, np.uint16)  # (BLOCK / 2,) bfloat16
    decrement = np.empty(CHUNK, np.float32)
    for chunk in values.reshape(-1, CHUNK):
        kernels.difference(chunk, chunk, 1.0, decrement)
        kernels.add(chunk, decrement, chunk)


def _write(scratch: Path, blocks: int, buffers: list[mmap.mmap]) -> None:
    """Past the page cache where the file system takes it, and on the disk in the end."""
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    except OSError:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT)
    try:
        os.posix_fallocate(descriptor, 0, blocks * BLOCK)
        _share(blocks, lambda thread, item: os.pwrite(descriptor, buffers[thread], item * BLOCK))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
        scratch.unlink()


if __name__ == "__main__":
    main()
