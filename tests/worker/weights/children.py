"""Grafts in real processes, which may be killed. They are forked from a server that has the library loaded."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from core.durable import sync_folder
from worker.weights import files, graft

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["worker.weights"])


def run_child(work: Callable[..., None], *arguments: Any) -> int:
    """Its exit code; minus the signal's number where one ended it."""
    child = start_child(work, *arguments)
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def start_child(work: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    child = _context.Process(target=work, args=arguments, daemon=True)
    child.start()
    return child


def pipe() -> tuple[Connection, Connection]:
    return _context.Pipe()


# --- what a child does ------------------------------------------------------------------------------------------------


def graft_until_killed(share: float, options: dict[str, Any]) -> None:
    """A graft that kills itself, as nothing can prevent, once it has written that share of the bytes."""

    def watch(done: int, total: int) -> None:
        if done >= share * total:
            os.kill(os.getpid(), signal.SIGKILL)

    graft(**options, on_progress=watch)


def graft_until_published(options: dict[str, Any]) -> None:
    """A graft that kills itself as soon as its folder has its name."""

    def die_if_it_stands(folder: Path) -> None:
        if options["out"].exists():
            os.kill(os.getpid(), signal.SIGKILL)
        sync_folder(folder)

    files.sync_folder = die_if_it_stands
    graft(**options)


def graft_slowly(pauses: float, options: dict[str, Any]) -> None:
    graft(**options, on_progress=lambda done, total: time.sleep(pauses))


def graft_and_wait(talk: Connection, options: dict[str, Any]) -> None:
    """A graft that says when it is half-way, and goes on when it is told to."""
    waited = []

    def watch(done: int, total: int) -> None:
        if not waited and 2 * done >= total:
            waited.append(done)
            talk.send("half-way")
            talk.recv()

    graft(**options, on_progress=watch)


def graft_within(limit: int, talk: Connection, options: dict[str, Any]) -> None:
    """A graft whose files may not grow beyond `limit` bytes; sends what it raised, or None."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        graft(**options)
    except Exception as error:  # noqa: BLE001 - the test looks at it
        talk.send((type(error).__name__, str(error)))
    else:
        talk.send(None)
