"""Runs a graft and looks every few milliseconds at what its threads are doing; prints the lines found most often.

A C function holds the line that called it, so a line stands for all below it.

    python bench/yardsticks/sampled.py INSTRUCT BASE TUNED OUT
"""

from __future__ import annotations

import json
import linecache
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SECONDS_BETWEEN = 0.005
LINES = 14
#: The library's files in which a thread of ours stands when it has nothing to do. The main thread always has.
STANDARD_WAITS = {"threading.py", "thread.py", "queue.py", "_base.py"}
WAITING = "waiting"


def main() -> None:
    seen: Counter[str] = Counter()
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(seen, done), daemon=True)
    watcher.start()
    started = time.perf_counter()
    _graft()
    wall = time.perf_counter() - started
    done.set()
    watcher.join()
    looks = seen.pop("looks")
    threads = {line: round(count / looks, 3) for line, count in seen.most_common(LINES)}
    print(json.dumps({"wall": round(wall, 2), "threads_on_average_in": threads}))


def _graft() -> None:
    from worker.weights import FullDelta, Selection, graft

    instruct, base, tuned, out = map(Path, sys.argv[1:])
    graft(instruct=instruct, delta=FullDelta(base, tuned), out=out, selection=Selection(scope="all"))


def _watch(seen: Counter[str], done: threading.Event) -> None:
    main = threading.main_thread().ident
    while not done.wait(SECONDS_BETWEEN):
        seen["looks"] += 1
        for thread, frame in sys._current_frames().items():  # noqa: SLF001  there is no other name for it
            place = _place(frame)
            if thread != threading.get_ident() and (thread, place) != (main, WAITING):
                seen[place] += 1


def _place(frame: FrameType) -> str:
    """The innermost line of ours."""
    if _stands_in(frame) in STANDARD_WAITS:
        return WAITING
    frames = list(_outwards(frame))
    if any(each.f_code.co_name == "_find_and_load" for each in frames):
        return "import"
    inner = next((each for each in frames if "weights" in Path(each.f_code.co_filename).parts), frame)
    line = linecache.getline(inner.f_code.co_filename, inner.f_lineno).strip()
    return f"{_stands_in(inner)}:{inner.f_code.co_name}: {line[:90]}"


def _stands_in(frame: FrameType) -> str:
    return Path(frame.f_code.co_filename).name


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


if __name__ == "__main__":
    main()
