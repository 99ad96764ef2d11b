"""A lease that renews itself, and the reasons to stop early.

A thread beats with a database session of its own, so that neither a long download nor a busy step lets the lease run
out. Each beat brings back what the job's owner wants, so that cancelling needs no broker.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

import structlog
from sqlalchemy.exc import InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from core.db import Database
from core.errors import LeaseLost
from core.jobs import Wish

#: What is said of a database that is away, busy, full or about to end, and not of one that was asked a wrong question.
AWAY = (OperationalError, InternalError, PoolTimeout)
#: Until a database that was away is asked again.
AGAIN_SECONDS = 1.0

Answer = TypeVar("Answer")

log = structlog.get_logger(__name__)


class Stop(Exception):
    """The work must end now, through no fault of its own."""


class Cancelled(Stop):
    """The job's owner cancelled it."""


class Leaving(Stop):
    """Another attempt will go on with the work: a step that can save its state does so first."""


class Draining(Leaving):
    """This worker is shutting down."""


class Pausing(Leaving):
    """The job's owner paused it."""


class TimeUp(Leaving):
    """The job has run as long as its team allows."""


class Lease:
    """Renews by `beat` until the block ends; `check` tells whether to go on.

    `beat` returns the owner's wish and raises LeaseLost. A database that is away is asked again until the lease, as
    this process counts it from before its last good beat, has run out. The time is up after `run_seconds`.
    """

    def __init__(
        self,
        beat: Callable[[], Wish],
        *,
        lease_seconds: float,
        beat_seconds: float,
        draining: threading.Event,
        run_seconds: float = math.inf,
    ) -> None:
        self._beat = beat
        self._lease_seconds = lease_seconds
        self._beat_seconds = beat_seconds
        self._draining = draining
        self._deadline = time.monotonic() + lease_seconds
        self._time_up = time.monotonic() + run_seconds
        self._wish: Wish = "run"
        self._lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self.outlast(self._renew)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def remaining(self) -> float:
        """Seconds that the lease still holds."""
        return 0.0 if self._lost else self._deadline - time.monotonic()

    def check(self) -> None:
        """Raises LeaseLost, Cancelled or one of Leaving when the work must end."""
        self.check_held()
        if time.monotonic() >= self._time_up:
            raise TimeUp
        if self._wish == "pause":
            raise Pausing
        if self._draining.is_set():
            raise Draining

    def check_held(self) -> None:
        """Raises LeaseLost or Cancelled: reasons for which not even a saved state is worth anything."""
        if self.remaining() <= 0:
            raise LeaseLost("The lease ran out.")
        if self._wish == "cancel":
            raise Cancelled

    def heard(self, wish: Wish) -> None:
        """Take the wish that another write brought back."""
        self._wish = wish

    def outlast(self, act: Callable[[], Answer]) -> Answer:
        """What `act` returns, which asks the database and may be done again while that is away.

        Raises LeaseLost when the lease has run out meanwhile, and after as long where beats come through and this does
        not: a job that cannot be written is given up rather than held for ever.
        """
        end = time.monotonic() + self._lease_seconds
        while True:
            try:
                return act()
            except AWAY as error:
                left = min(self.remaining(), end - time.monotonic())
                log.warning("database_away", error=type(error).__name__, seconds_left=round(left, 1))
                if left <= AGAIN_SECONDS:
                    raise LeaseLost("The database stayed away for a whole lease.") from error
                time.sleep(AGAIN_SECONDS)

    def write(self, database: Database, act: Callable[[Session], Answer]) -> Answer:
        """What `act` returns, once what it wrote is committed; otherwise as `outlast`."""

        def attempt() -> Answer:
            with database.writing() as session:
                try:
                    answer = act(session)
                    session.commit()
                except SQLAlchemyError:
                    session.rollback()  # or rows that were added would count as stored, and not be added again
                    raise
            return answer

        return self.outlast(attempt)

    def _keep(self) -> None:
        wait = self._beat_seconds
        while not self._ended.wait(wait):
            try:
                self._renew()
                wait = self._beat_seconds
            except LeaseLost:
                self._lost = True
                return
            except SQLAlchemyError as error:
                log.warning("beat_failed", error=type(error).__name__, seconds_left=round(self.remaining(), 1))
                # One that hung has left no time for another interval.
                wait = min(AGAIN_SECONDS, self._beat_seconds)

    def _renew(self) -> None:
        started = time.monotonic()
        self._wish = self._beat()
        self._deadline = started + self._lease_seconds
