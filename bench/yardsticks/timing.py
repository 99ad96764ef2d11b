"""Whole processes, timed one after the other from the same start.

On a virtual machine the first touch of memory that the host has taken back runs at a fifth of the usual speed, and idle
page cache is gone within a minute (measured). So both sides of a comparison are primed alike right before each run, and
they take turns. What else the machine did meanwhile is measured too.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import psutil

#: No yardstick asks the network for anything, and none fills the terminal.
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
#: As much as the greediest way takes at the default size; more would only take time.
MOST_TOUCHED = 10 << 30
TOUCH = "import sys; b'\\1' * int(sys.argv[1])"


class RunFailed(Exception):
    """A way did not come to its end; the message has what it said last."""


@dataclass(frozen=True)
class Way:
    """A way to a grafted model: a command that makes the folder it is given."""

    name: str
    what: str
    command: Callable[[Path], list[str]]
    #: Brought into the page cache before each run.
    reads: tuple[Path, ...]
    #: A floor needs its folder made beforehand, all others make it themselves.
    makes_folder: bool = True


@dataclass(frozen=True)
class Run:
    wall: float
    user: float
    system: float
    #: Processor seconds that went elsewhere meanwhile: other processes, writing back, the host.
    others: float
    peak_mib: float


@dataclass
class Outcome:
    runs: list[Run] = field(default_factory=list)
    #: What it said when it failed; after that it is not run again.
    failure: str = ""


def take_turns(
    ways: Sequence[Way], *, rounds: int, folder: Path, cold: bool = False, keep_output: bool = True
) -> dict[str, Outcome]:
    """A B C, A B C, …; what came of each way. Its last output stays in `folder` where that is wanted."""
    outcomes = {way.name: Outcome() for way in ways}
    for _ in range(rounds):
        for way in ways:
            outcome, out = outcomes[way.name], folder / way.name
            if outcome.failure:
                continue
            try:
                outcome.runs.append(primed_run(way, out, cold=cold))
            except RunFailed as error:
                outcome.failure = str(error)
            if not keep_output:
                rmtree(out, ignore_errors=True)
    return outcomes


def primed_run(way: Way, out: Path, *, cold: bool) -> Run:
    """`out` goes first, and comes out of the page cache at the end, so that no run pays for the one before it."""
    rmtree(out, ignore_errors=True)
    if not way.makes_folder:
        out.mkdir()
    prime(way.reads, cold=cold)
    try:
        return _timed(way.command(out))
    finally:
        os.sync()
        evict(path for path in out.rglob("*") if path.is_file())


def prime(files: Sequence[Path], *, cold: bool) -> None:
    """Nothing waits to be written; `files` are in the page cache, or out of it; there is memory the host has given."""
    os.sync()
    bytes_read = sum(file.stat().st_size for file in files)
    if cold:
        evict(files)
    else:
        subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    spare = psutil.virtual_memory().available - (0 if cold else bytes_read) - (1 << 30)
    wanted = min(bytes_read, MOST_TOUCHED) + (1 << 30)
    subprocess.run([sys.executable, "-c", TOUCH, str(max(0, min(wanted, spare)))], check=True)


def evict(files: Iterable[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _timed(command: list[str]) -> Run:
    with tempfile.TemporaryFile() as said:
        busy = _busy_seconds()
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=said, stderr=said, env=ENVIRONMENT)
        with _killed_in_the_end(child):
            _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(max(0, said.seek(0, os.SEEK_END) - 600))
            raise RunFailed(f"exit status {child.returncode}: {said.read().decode(errors='replace').strip()}")
    own = used.ru_utime + used.ru_stime
    return Run(wall, used.ru_utime, used.ru_stime, max(0.0, _busy_seconds() - busy - own), used.ru_maxrss / 1024)


@contextlib.contextmanager
def _killed_in_the_end(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """An interrupted bench leaves no process behind."""
    try:
        yield
    except BaseException:
        child.kill()
        raise


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians, but the highest peak; and every wall time."""

    def median(column: str) -> float:
        values: list[float] = [getattr(run, column) for run in runs]
        return round(statistics.median(values), 2)

    return {
        "wall": median("wall"),
        "user": median("user"),
        "system": median("system"),
        "others": median("others"),
        "peak_mib": round(max(run.peak_mib for run in runs)),
        "walls": [round(run.wall, 2) for run in runs],
    }


def ratio(ours: Sequence[Run], yardstick: Sequence[Run]) -> dict[str, Any]:
    """Of the medians; the spread is that of the pairs that ran one after the other."""
    pairs = [left.wall / right.wall for left, right in zip(ours, yardstick, strict=True)]
    middle = statistics.median(run.wall for run in ours) / statistics.median(run.wall for run in yardstick)
    return {"ratio": round(middle, 3), "spread": [round(min(pairs), 3), round(max(pairs), 3)], "pairs": len(pairs)}
