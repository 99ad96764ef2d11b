"""A job's events as Server-Sent Events.

However many streams are open, one task of the process asks the database what is new, for all of their jobs together,
and keeps the newest events of each job ready to send. A stream holds nothing but its position: it takes what is ready,
and reads for itself what is older (a replay, or what a slow client was too late for).
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from types import FrameType
from typing import Any

import msgspec
import structlog
from anyio import CancelScope, CapacityLimiter, create_task_group, move_on_after, to_thread
from fastapi import Response
from sqlalchemy import and_, or_, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from starlette.types import Receive, Scope, Send

from api.deps import timestamp
from core.db import Database
from core.jobs import TERMINAL
from core.keys import Caller, revoked_of
from core.models import Job, JobEvent

POLL_SECONDS = 0.5
#: A comment after so long a silence tells proxies and clients that the stream lives.
HEARTBEAT_SECONDS = 15.0
#: A client that takes nothing for so long is let go; it comes back with its Last-Event-ID.
STALLED_SECONDS = 60.0
#: Events of each watched job that are kept ready.
READY_EVENTS = 256
#: Events that one read takes for a stream that is behind.
PAGE_EVENTS = 256
#: Jobs that one statement asks for.
JOBS_A_STATEMENT = 200

#: By job: the events after what is known, and whether they are its last.
_News = dict[str, tuple[list[bytes], bool]]

log = structlog.get_logger("api")


def render(event: JobEvent) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": timestamp(event.created_at),
        "level": event.level,
        "type": event.type,
        "message": event.message,
        "data": event.data,
    }


def _encoded(event: JobEvent) -> bytes:
    return b"id: %b\ndata: %b\n\n" % (event.id.encode(), msgspec.json.encode(render(event)))


class _Channel:
    """What the streams of one job share: its newest events, ready to send. `last` is the newest one's number."""

    def __init__(self, last: int, *, ended: bool) -> None:
        self.last = last
        self.ended = ended
        self.streams = 0
        self._ready: deque[bytes] = deque(maxlen=READY_EVENTS)
        self._changed = asyncio.Event()

    def add(self, events: Sequence[bytes], *, ended: bool) -> None:
        self._ready.extend(events)
        self.last += len(events)
        self.ended = ended
        if events or ended:
            self.wake()

    def wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def after(self, position: int) -> list[bytes] | None:
        """What is ready beyond the position; None where the next event is too old to be ready."""
        behind = self.last - position
        if behind > len(self._ready):
            return None
        return list(islice(self._ready, len(self._ready) - behind, None)) if behind > 0 else []

    async def change(self, seconds: float) -> bool:
        """Whether something came within the time."""
        changed = self._changed
        with move_on_after(seconds):
            await changed.wait()
        return changed.is_set()


class EventFeed:
    """Every open stream of this process, and the task that reads for them."""

    def __init__(self, database: Database) -> None:
        self.closed = False
        self._database = database
        self._channels: dict[str, _Channel] = {}
        #: Open streams by the key that opened them, and which of those keys have been revoked since.
        self._keys: Counter[str] = Counter()
        self._revoked: frozenset[str] = frozenset()
        self._reader: asyncio.Task[None] | None = None
        #: A thread of its own: a crowd of requests must not keep news from the streams.
        self._thread = CapacityLimiter(1)

    @contextmanager
    def open_until_exit(self) -> Iterator[None]:
        """End the streams at the signal that ends the process: the server waits for open answers, and an app hears of
        its end only after that."""
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def end(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self.close)
            handler = before[signal.Signals(number)]
            if callable(handler):
                handler(number, frame)

        # Elsewhere than in the main thread nobody can listen to signals, the server neither.
        chained = before if threading.current_thread() is threading.main_thread() else {}
        for number in chained:
            signal.signal(number, end)
        try:
            yield
        finally:
            for number, handler in chained.items():
                signal.signal(number, handler)
            self.close()

    def close(self) -> None:
        self.closed = True
        self._wake_all()

    def is_open_to(self, key_id: str) -> bool:
        return not self.closed and key_id not in self._revoked

    def join(self, job_id: str, key_id: str, last: int, *, ended: bool) -> _Channel:
        channel = self._channels.setdefault(job_id, _Channel(last, ended=ended))
        channel.streams += 1
        self._keys[key_id] += 1
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read_on())
        return channel

    def leave(self, job_id: str, key_id: str) -> None:
        channel = self._channels[job_id]
        channel.streams -= 1
        if channel.streams == 0:
            del self._channels[job_id]
        self._keys[key_id] -= 1
        if self._keys[key_id] == 0:
            del self._keys[key_id]

    def read_page(self, job_id: str, position: int) -> list[bytes]:
        """The next events after the position, for a stream that is behind."""
        page = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.seq > position)
        with self._database.reading() as session:
            return [_encoded(event) for event in session.scalars(page.order_by(JobEvent.seq).limit(PAGE_EVENTS))]

    async def _read_on(self) -> None:
        """Until nobody listens any more."""
        while self._channels and not self.closed:
            await asyncio.sleep(POLL_SECONDS)
            await self._read_news()

    async def _read_news(self) -> None:
        positions = {job_id: channel.last for job_id, channel in self._channels.items() if not channel.ended}
        try:
            news, self._revoked = await to_thread.run_sync(
                self._look, positions, list(self._keys), limiter=self._thread
            )
        except SQLAlchemyError as error:
            log.warning("event_stream_waits", error=type(error).__name__)
            return
        for job_id, (events, ended) in news.items():
            # A channel that was left and joined again meanwhile may begin elsewhere.
            channel = self._channels.get(job_id)
            if channel is not None and channel.last == positions[job_id]:
                channel.add(events, ended=ended)
        if self._revoked:
            self._wake_all()

    def _wake_all(self) -> None:
        for channel in self._channels.values():
            channel.wake()

    def _look(self, positions: dict[str, int], key_ids: list[str]) -> tuple[_News, frozenset[str]]:
        with self._database.reading() as session:
            return _news(session, positions), revoked_of(session, key_ids)


def _news(session: Session, positions: dict[str, int]) -> _News:
    """Of each job that has more events than its position says."""
    found: _News = {}
    for job_ids in _batches(list(positions)):
        state = select(Job.id, Job.status, Job.event_count).where(Job.id.in_(job_ids))
        moved = [row for row in session.execute(state) if row.event_count > positions[row.id]]
        found |= {row.id: ([], row.status in TERMINAL) for row in moved}
        newer = [
            and_(JobEvent.job_id == row.id, JobEvent.seq.between(positions[row.id] + 1, row.event_count))
            for row in moved
        ]
        if newer:
            for event in session.scalars(select(JobEvent).where(or_(*newer)).order_by(JobEvent.seq)):
                found[event.job_id][0].append(_encoded(event))
    return found


def _batches(job_ids: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(job_ids), JOBS_A_STATEMENT):
        yield job_ids[start : start + JOBS_A_STATEMENT]


class EventStream(Response):
    """Every event after `position`, as it comes, until the job's last one or the revocation of the caller's key."""

    def __init__(self, feed: EventFeed, job: Job, position: int, caller: Caller) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._feed = feed
        self._job = job
        self._position = position
        self._key_id = caller.key_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ended = self._job.status in TERMINAL
        channel = self._feed.join(self._job.id, self._key_id, self._job.event_count, ended=ended)
        try:
            async with create_task_group() as group:
                group.start_soon(_end_when_gone, receive, group.cancel_scope)
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                with move_on_after(None) as writing:
                    await self._write_all(channel, send, writing)
                group.cancel_scope.cancel()
        finally:
            self._feed.leave(self._job.id, self._key_id)

    async def _write_all(self, channel: _Channel, send: Send, writing: CancelScope) -> None:
        while self._feed.is_open_to(self._key_id):
            events = await self._next_events(channel)
            if events:
                await _write(send, b"".join(events), writing)
                self._position += len(events)
            elif channel.ended:
                await _write(send, b"data: [DONE]\n\n", writing)
                break
            elif not await channel.change(HEARTBEAT_SECONDS):
                # Without an empty line behind it, which the SDK would take for the end of an event.
                await _write(send, b": the job goes on\n", writing)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next_events(self, channel: _Channel) -> list[bytes]:
        ready = channel.after(self._position)
        if ready is not None:
            return ready
        return await to_thread.run_sync(self._feed.read_page, self._job.id, self._position)


async def _write(send: Send, piece: bytes, writing: CancelScope) -> None:
    """Sending waits while the client takes nothing."""
    with move_on_after(STALLED_SECONDS) as waiting:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    if waiting.cancelled_caught:
        writing.cancel()


async def _end_when_gone(receive: Receive, streaming: CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    streaming.cancel()
