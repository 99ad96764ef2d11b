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
from typing import Self

import structlog
from sqlalchemy.exc import DBAPIError

from core.errors import LeaseLost
from core.jobs import Wish

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
        self._renew()
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

    def _keep(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            try:
                self._renew()
            except LeaseLost:
                self._lost = True
                return
            except DBAPIError as error:
                log.warning("beat_failed", error=type(error).__name__, seconds_left=round(self.remaining(), 1))

    def _renew(self) -> None:
        started = time.monotonic()
        self._wish = self._beat()
        self._deadline = started + self._lease_seconds
