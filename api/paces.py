"""How long earlier jobs took, for however many clients ask when theirs will have ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from sqlalchemy.orm import Session

from core.history import tuning_of, usual_seconds
from core.models import Job

#: A job that ends changes what the next ones may expect; nobody needs to know at once.
FRESH_SECONDS = 10.0
MAX_KINDS = 1000


class PaceBoard:
    """The usual seconds of each phase by pair, tuning and worker, as they were a moment ago."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str | None], tuple[float, Mapping[str, float]]] = {}

    def reader(
        self, open_session: Callable[[], AbstractContextManager[Session]]
    ) -> Callable[[Job], Mapping[str, float]]:
        """A session is opened only where the board is out of date."""
        return lambda job: self._seconds(open_session, job)

    def _seconds(self, open_session: Callable[[], AbstractContextManager[Session]], job: Job) -> Mapping[str, float]:
        kind = (job.request["pair"]["name"], tuning_of(job), job.worker_id)
        until, seconds = self._known.get(kind, (0.0, {}))
        if time.monotonic() < until:
            return seconds
        with open_session() as session:
            seconds = usual_seconds(session, job)
        if len(self._known) >= MAX_KINDS:
            self._known.clear()
        self._known[kind] = (time.monotonic() + FRESH_SECONDS, seconds)
        return seconds
