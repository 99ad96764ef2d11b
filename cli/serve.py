"""`shadowft serve`: one process that keeps three others running, and `shadowft api`, one of them."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import psutil
import structlog

from core.config import Settings, get_settings
from core.errors import Conflict
from core.logs import configure_logging
from core.schema import prepare

#: A process that died is started again after this long, doubled each time up to the maximum.
RESTART_SECONDS = 0.5
MAX_RESTART_SECONDS = 30.0
#: One that has run this long counts as healthy again.
HEALTHY_SECONDS = 60.0
#: How long the processes may take to end before they are killed, besides the time that a training gets to save its
#: state: a worker ends its children first.
STOP_SECONDS = 40.0

_PR_SET_PDEATHSIG = 1

log = structlog.get_logger("serve")


def run_api() -> None:
    import uvicorn

    from api.protocol import SERVER

    settings = get_settings()
    _announce_key(settings)
    uvicorn.run(
        "api.app:create_app",
        factory=True,
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=5,
        **SERVER,
    )


def _announce_key(settings: Settings) -> None:
    configure_logging(settings)
    key_file = prepare(settings)
    if key_file:
        log.info("admin_key_written", file=str(key_file))


@dataclass
class Part:
    """One of the processes, and when to start it (again)."""

    name: str
    arguments: list[str]
    #: Variables that it has no business to know.
    withheld: frozenset[str] = frozenset()
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    start_at: float = 0.0
    delay: float = RESTART_SECONDS
    #: Since when it has been seen stopped, by the clock of `time.monotonic`.
    stopped_since: float | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "cli", *self.arguments]
        environment = {name: value for name, value in os.environ.items() if name not in self.withheld}
        # A group of its own, so that Ctrl-C reaches only this supervisor, which then stops them in order.
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=die_with_parent())
        self.started = time.monotonic()

    def watch(self, patience_seconds: float) -> None:
        """Notice that it died, or that it has been stopped for too long, and plan its next start."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self._end_if_stopped(self.process, patience_seconds)
            return
        if time.monotonic() - self.started > HEALTHY_SECONDS:
            self.delay = RESTART_SECONDS
        log.warning("process_died", name=self.name, status=self.process.returncode, again_in_seconds=self.delay)
        self.process, self.start_at = None, time.monotonic() + self.delay
        self.delay = min(self.delay * 2, MAX_RESTART_SECONDS)

    def _end_if_stopped(self, process: subprocess.Popen[bytes], patience_seconds: float) -> None:
        """Stopped by a signal it has lost its job to another worker; the lock it may hold on SQLite's file it keeps,
        and everybody else would wait for that until somebody woke it."""
        if psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            self.stopped_since = None
            return
        self.stopped_since = self.stopped_since or time.monotonic()
        if time.monotonic() - self.stopped_since >= patience_seconds:
            log.warning("process_stopped", name=self.name, seconds=patience_seconds)
            process.kill()


@dataclass
class Supervisor:
    parts: list[Part]
    #: How long a part may be stopped by a signal before it is ended.
    patience_seconds: float
    stop_seconds: float = STOP_SECONDS
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        try:
            while not self.stopping.wait(0.2):
                self._tick()
        finally:
            self._end_all()
        return 0

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping.set()

    def _tick(self) -> None:
        for part in self.parts:
            part.watch(self.patience_seconds)
            if part.process is None and time.monotonic() >= part.start_at:
                part.start()

    def _end_all(self) -> None:
        living = [part.process for part in self.parts if part.process is not None]
        for process in living:
            process.terminate()
        deadline = time.monotonic() + self.stop_seconds
        for process in living:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def serve() -> int:
    settings = get_settings()
    _announce_key(settings)
    _refuse_taken_port(settings)
    with _only_one(settings):
        return _serve(settings)


def _serve(settings: Settings) -> int:
    log.info("serving", url=f"http://{settings.host}:{settings.port}", docs="/docs", data=str(settings.data_dir))
    return Supervisor(
        [
            Part("api", ["api"], withheld=frozenset({"HF_TOKEN"})),  # it fetches no model
            Part("worker jobs", ["worker", "--queue", "jobs"]),
            Part("worker light", ["worker", "--queue", "light"]),
        ],
        patience_seconds=settings.lease_seconds,
        stop_seconds=STOP_SECONDS + settings.save_grace_seconds,
    ).run()


def _refuse_taken_port(settings: Settings) -> None:
    """Said at once: otherwise the API would die again and again while the workers take jobs."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise Conflict(
                f"The address {settings.host}:{settings.port} cannot be used ({error.strerror}).",
                hint="Stop what listens there, or choose another SHADOWFT_PORT.",
            ) from error


@contextmanager
def _only_one(settings: Settings) -> Iterator[None]:
    """Two services on one data folder would each count on the whole machine's memory."""
    with (settings.data_dir / "serve.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(
                f"Another `shadowft serve` uses the data folder {settings.data_dir}.",
                hint="Stop it, or give this one another SHADOWFT_DATA_DIR.",
            ) from error
        yield


def die_with_parent() -> Callable[[], None]:
    """For Popen's `preexec_fn`: end the new process when the one that starts it is killed outright."""
    parent = os.getpid()

    def prepare() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return prepare
