"""Which workers live, for however many clients ask what their jobs wait for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from sqlalchemy.orm import Session

from core.jobs import LivingLane, Queue, living_lanes

#: The workers are looked up once in this time, however many clients poll.
FRESH_SECONDS = 1.0


class LaneBoard:
    """The living lanes by queue, as they were a moment ago."""

    def __init__(self, stale_worker_seconds: float) -> None:
        self._stale_worker_seconds = stale_worker_seconds
        self._known: dict[Queue, tuple[float, Sequence[LivingLane]]] = {}

    def reader(
        self, open_session: Callable[[], AbstractContextManager[Session]]
    ) -> Callable[[Queue], Sequence[LivingLane]]:
        """A session is opened only where the board is out of date."""
        return lambda queue: self._lanes(open_session, queue)

    def _lanes(self, open_session: Callable[[], AbstractContextManager[Session]], queue: Queue) -> Sequence[LivingLane]:
        until, lanes = self._known.get(queue, (0.0, ()))
        if time.monotonic() < until:
            return lanes
        with open_session() as session:
            lanes = living_lanes(session, queue, stale_worker_seconds=self._stale_worker_seconds)
        self._known[queue] = (time.monotonic() + FRESH_SECONDS, lanes)
        return lanes
