"""Threads for work that takes less than the usual way to a thread does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

Given = ParamSpec("Given")
Made = TypeVar("Made")


class Threads:
    """A few that wait for work, for as long as the process lives. Nothing is carried over to them and nobody counts
    on them, which makes them several times as fast as `asyncio.to_thread`."""

    def __init__(self, count: int) -> None:
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._unstarted = count

    async def run(self, do: Callable[Given, Made], *given: Given.args, **named: Given.kwargs) -> Made:
        self._start()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Made] = loop.create_future()

        def work() -> None:
            try:
                told: tuple[Any, ...] = (_succeed, done, do(*given, **named))
            except Exception as error:  # noqa: BLE001 - raised again where it is waited for
                told = (_fail, done, error)
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(*told)

        self._work.put(work)
        return await done

    def _start(self) -> None:
        while self._unstarted:
            self._unstarted -= 1
            threading.Thread(target=self._serve, name="poll", daemon=True).start()

    def _serve(self) -> None:
        while True:
            self._work.get()()


def _succeed(done: asyncio.Future[Any], made: Any) -> None:
    if not done.cancelled():
        done.set_result(made)


def _fail(done: asyncio.Future[Any], error: Exception) -> None:
    if not done.cancelled():
        done.set_exception(error)
