"""A job's events as they come: as a stream that is taken up again where it broke, or else by asking."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from cli.http import Interrupted, Patience, Server, Transient, patiently, segment

if TYPE_CHECKING:
    import httpx

ENDED = frozenset({"succeeded", "failed", "cancelled"})

#: A server that restarts is waited for; one that stays away so long is given up.
PATIENCE_SECONDS = 120.0
#: The server sends a sign of life every 15 seconds. What is silent for longer does not stream.
SILENCE_SECONDS = 45.0
#: Streams in a row that brought nothing: then something between here and the server holds them back.
FRUITLESS_STREAMS = 3
POLL_SECONDS = 2.0

Event = dict[str, Any]


def route(job_id: str) -> str:
    return f"/fine_tuning/jobs/{segment(job_id)}"


def past_events(server: Server, job_id: str, *, after: str | None = None) -> list[Event]:
    """Those so far, oldest first; with `after`, the ones behind it."""
    newest_first = server.every(f"{route(job_id)}/events")
    return list(takewhile(lambda event: event["id"] != after, newest_first))[::-1]


def follow_events(server: Server, job_id: str, stop: threading.Event) -> Iterator[Event]:
    """Every event from the first one, until the job's last."""
    last: str | None = None
    patience = Patience(PATIENCE_SECONDS, stop)
    fruitless = 0
    while fruitless < FRUITLESS_STREAMS:
        fruitless += 1
        try:
            for event in _streamed(server, job_id, last):
                if event is None:
                    return
                fruitless, last = 0, event["id"]
                patience.renew()
                yield event
        except Transient as error:
            patience.endure(error)
    yield from _polled(server, job_id, last, stop)


def _streamed(server: Server, job_id: str, last: str | None) -> Iterator[Event | None]:
    """Those behind `last`; None after the job's last one."""
    headers = {"accept": "text/event-stream"} | ({"last-event-id": last} if last else {})
    with server.stream(f"{route(job_id)}/events", headers, seconds=SILENCE_SECONDS, stream="true") as answer:
        if answer.status_code == 204:
            yield None
        for line in _lines(answer):
            field, _, value = line.partition(b":")
            if field == b"data":
                yield None if value.strip() == b"[DONE]" else json.loads(value)


def _lines(answer: httpx.Response) -> Iterator[bytes]:
    """httpx would end a line at each of Unicode's separators, too, which may stand in a message."""
    rest = b""
    for piece in answer.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines


def _polled(server: Server, job_id: str, last: str | None, stop: threading.Event) -> Iterator[Event]:
    def look() -> tuple[bool, list[Event]]:
        has_ended = server.get(route(job_id))["status"] in ENDED  # looked at first: then its last event is there
        return has_ended, past_events(server, job_id, after=last)

    while True:
        has_ended, events = patiently(look, seconds=PATIENCE_SECONDS, stop=stop)
        yield from events
        last = events[-1]["id"] if events else last
        if has_ended:
            return
        if stop.wait(POLL_SECONDS):
            raise Interrupted("Interrupted.")
