"""A few things at once, in threads that end together."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from cli.progress import OnProgress

T = TypeVar("T")
R = TypeVar("R")

#: What the others have, after an error, to come to an end.
STOP_SECONDS = 2.0


def in_parallel(work: Callable[[T], R], items: Iterable[T], *, at_once: int, stop: threading.Event) -> list[R]:
    """What `work` returns for each, in their order. The first error sets `stop`, which the others look at.

    The threads are daemons, so that an interrupt needs to wait for no socket.
    """
    todo = deque(enumerate(items))
    done: queue.Queue[tuple[int, R | None, BaseException | None]] = queue.Queue()

    def run() -> None:
        while not stop.is_set():
            try:
                number, item = todo.popleft()
            except IndexError:
                return
            try:
                done.put((number, work(item), None))
            except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
                done.put((number, None, error))

    results: dict[int, Any] = {}
    count = len(todo)
    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(at_once, count))]
    for thread in threads:
        thread.start()
    try:
        while len(results) < count:
            number, result, error = done.get()
            if error is not None:
                raise error
            results[number] = result
    except Exception:
        stop.set()
        for thread in threads:
            thread.join(STOP_SECONDS)
        raise
    return [results[number] for number in range(count)]


class Meter:
    """Adds up what several threads have done, for a bar that never goes back."""

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self._total = total
        self._on_progress = on_progress
        self._done: dict[str, int] = {}
        self._most = 0
        self._lock = threading.Lock()

    def tell(self, name: str, done: int) -> None:
        """One of them has done so much of its own."""
        if self._on_progress is None:
            return
        with self._lock:
            self._done[name] = done
            self._most = max(self._most, sum(self._done.values()))
            self._on_progress(self._most, self._total)
