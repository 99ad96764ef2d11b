"""A job watched to its end: its events as they come and, on a terminal, a bar of where it stands."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from cli.comparison import comparison
from cli.events import ENDED, PATIENCE_SECONDS, Event, follow_events, route
from cli.http import Patience, Server, ServerRefused, Transient
from cli.printing import console, draw, duration, plain, printable, say
from core.errors import ShadowError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LOOK_SECONDS = 1.0
#: The last events come within a poll of the server's own; longer is not waited for.
LAST_EVENTS_SECONDS = 10.0

Job = dict[str, Any]


class View(Protocol):
    """Who is told."""

    def event(self, event: Event) -> None: ...

    def job(self, job: Job) -> None: ...

    def word(self, words: str) -> None: ...


def watch(server: Server, job_id: str, view: View) -> Job:
    """The job, once it has ended."""
    stop = threading.Event()
    tail = _Tail(server, job_id, stop)
    patience = Patience(PATIENCE_SECONDS, stop)
    lost = False
    try:
        while True:
            for event in tail.take(LOOK_SECONDS):
                view.event(event)
            try:
                job = server.get(route(job_id))
            except Transient as error:
                if not lost:
                    view.word(f"The connection is lost; trying again. {error.message}")
                lost = True
                patience.endure(error)
                continue
            lost = False
            patience.renew()
            view.job(job)
            if job["status"] in ENDED:
                for event in tail.rest():
                    view.event(event)
                return job
    finally:
        stop.set()


class _Tail:
    """The events, read by a thread of their own: the job is asked for meanwhile."""

    def __init__(self, server: Server, job_id: str, stop: threading.Event) -> None:
        self._queue: queue.Queue[Event | None] = queue.Queue()
        self._error: ShadowError | None = None
        self._ended = False
        threading.Thread(target=self._read, args=(server, job_id, stop), daemon=True).start()

    def _read(self, server: Server, job_id: str, stop: threading.Event) -> None:
        try:
            for event in follow_events(server, job_id, stop):
                self._queue.put(event)
        except ShadowError as error:
            self._error = error
        finally:
            self._queue.put(None)

    def take(self, seconds: float) -> Iterator[Event]:
        """What there is, after waiting so long at most for the first."""
        if self._ended:
            time.sleep(seconds)
            return
        try:
            event = self._queue.get(timeout=seconds)
            while event is not None:
                yield event
                event = self._queue.get_nowait()
        except queue.Empty:
            return
        self._ended = True
        if self._error:
            raise self._error

    def rest(self) -> Iterator[Event]:
        while not self._ended:
            try:
                event = self._queue.get(timeout=LAST_EVENTS_SECONDS)
            except queue.Empty:
                return
            if event is None:
                return
            yield event


# --- views ------------------------------------------------------------------------------------------------------------


class Silent:
    """For programs, which want the job at its end."""

    def event(self, event: Event) -> None:
        pass

    def job(self, job: Job) -> None:
        pass

    def word(self, words: str) -> None:
        say(words)


class _Lines:
    """In a pipe: each event is a line."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._waiting_for: str | None = None

    def event(self, event: Event) -> None:
        print_event(self._out, event)

    def job(self, job: Job) -> None:
        if job["waiting_for"] != self._waiting_for and job["waiting_for"]:
            self._out.print(plain(f"{' ' * 8}  {job['waiting_for']}"))
        self._waiting_for = job["waiting_for"]

    def word(self, words: str) -> None:
        say(words)


class _Live:
    """On a terminal: a bar at the bottom, which steps move, and the other events above it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None, note="")

    def event(self, event: Event) -> None:
        if event["type"] != "metrics":
            print_event(self._progress.console, event)

    def job(self, job: Job) -> None:
        done = job["progress"] or {}
        self._progress.update(
            self._task,
            description=job["phase"] or job["status"],
            total=done.get("total_steps"),
            completed=done.get("step", 0),
            note=_note(job, done),
        )

    def word(self, words: str) -> None:
        self._progress.console.print(plain(words))


def _note(job: Job, done: dict[str, Any]) -> str:
    loss, left, end = done.get("loss"), done.get("eta_seconds"), job["estimated_finish"]
    parts = [
        f"step {done['step']}/{done['total_steps']}" if done else "",
        f"loss {loss:.3f}" if loss is not None else "",
        f"ETA {duration(left)}" if left is not None else "",
        f"all done about {datetime.fromtimestamp(end).astimezone():%H:%M}" if end is not None else "",
        job["waiting_for"] or "",
    ]
    return printable("  ".join(part for part in parts if part))


@contextmanager
def shown() -> Iterator[View]:
    out = console()
    if not sys.stdout.isatty():
        yield _Lines(out)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=out, transient=True) as progress:
        yield _Live(progress)


def print_event(out: Console, event: Event) -> None:
    when = f"{datetime.fromtimestamp(event['created_at']).astimezone():%T}"
    style = {"warn": "yellow", "error": "red"}.get(event["level"], "")
    out.print(plain(when), plain(event["message"]), style=style)


# --- the end ----------------------------------------------------------------------------------------------------------


def print_end(server: Server, job: Job) -> None:
    """What came of a job that has succeeded."""
    draw(plain(f"{job['fine_tuned_model']} is made."))
    try:
        evaluation = server.get(f"{route(job['id'])}/evaluation")
    except ServerRefused as error:
        if error.code != "evaluation_left_out":
            raise
        draw(plain(error.message))
        return
    if evaluation["sets"]:
        draw(comparison(evaluation))
    draw(plain(evaluation["verdict"]["summary"]))


def failure(job: Job) -> ShadowError:
    if job["status"] == "cancelled":
        return ShadowError(f"The job {job['id']} was cancelled.")
    error = job["error"]
    return ShadowError(f"The job {job['id']} failed: {error['message']}", hint=error["hint"], code=error["code"])
