"""The kit: a service made of real processes, each of which can be killed, frozen, cut off or starved.

Nothing here is simulated: servers are children, signals are signals, a cut line is a socket that says nothing more.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis
from sqlalchemy import select, update

from core.config import Settings
from core.db import Database
from core.models import Job, JobEvent, ResumePoint
from core.schema import prepare
from tests import servers
from tests.servers import HOST, PLAIN, die_with_parent, ended, free_port, wait_until

ROOT = Path(__file__).parents[2]
MODEL = "qwen2.5-0.5b"
ROW = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
TERMINAL = {"succeeded", "failed", "cancelled"}
#: Leases long enough for two busy cores, sweeps short enough for a test.
INTERVALS = {"LEASE_SECONDS": "4", "BEAT_SECONDS": "0.4", "SWEEP_SECONDS": "0.5", "CANCEL_GRACE_SECONDS": "1"}


# --- servers that die -------------------------------------------------------------------------------------------------


class RedisServer:
    """A Redis without memory of the past, on one port for all its lives."""

    def __init__(self) -> None:
        self.port = free_port()
        self._stack = ExitStack()
        self.process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def url_at(port: int) -> str:
        return f"redis://{HOST}:{port}/0"

    def client(self) -> redis.Redis:
        return redis.Redis(host=HOST, port=self.port, socket_timeout=5)

    def start(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            servers.missing("redis-server is not installed")
        options = ["--bind", HOST, "--port", str(self.port), "--save", "", "--appendonly", "no", "--dir", "/"]
        self.process = self._stack.enter_context(ended(servers._unprivileged([program, *options]), signal.SIGTERM))
        wait_until(lambda: servers._answers(self.client().ping), seconds=30)

    def stop(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self._stack.close()


class PostgresServer:
    """A PostgreSQL that keeps its data from one life to the next: what it has committed is there again."""

    def __init__(self) -> None:
        self.port = free_port()
        self._folder = servers._private_folder("faults")
        self._data = self._folder / "data"
        made = servers._unprivileged(
            [servers._postgres_program("initdb"), "-D", self._data, "--no-sync", "-A", "trust", "-U", "postgres"]
        )
        assert made.wait() == 0
        self.process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def url_at(port: int) -> str:
        return f"postgresql+psycopg://postgres@{HOST}:{port}/postgres"

    def start(self, *, clock: str = "") -> None:
        """`clock`: how far its clock is from everybody else's (`+1h`)."""
        where = ["-D", self._data, "-h", HOST, "-p", str(self.port), "-k", "", "-c", "max_connections=200"]
        command = [*(_with_clock(clock) if clock else []), servers._postgres_program("postgres"), *where]
        self.process = servers._unprivileged(command, at_death=signal.SIGQUIT)
        server = servers.Postgres(self.port)
        wait_until(lambda: servers._answers(lambda: server.execute("SELECT 1")), seconds=60)

    def execute(self, statement: str) -> list[Any]:
        return servers.Postgres(self.port).execute(statement)

    def crash(self) -> None:
        """All of its processes at once, without a word to their clients or to the disk."""
        assert self.process is not None
        # Stopped first: a process that it starts meanwhile would live on with nobody to wake it.
        self.process.send_signal(signal.SIGSTOP)
        family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        with suppress(FileNotFoundError):
            (self._data / "postmaster.pid").unlink()

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            with ended(self.process, signal.SIGINT):
                pass
        shutil.rmtree(self._folder, ignore_errors=True)


def _with_clock(offset: str) -> list[str]:
    found = list(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not found:
        servers.missing("libfaketime is not installed")
    return ["env", f"LD_PRELOAD={found[0]}", f"FAKETIME={offset}", "FAKETIME_DONT_FAKE_MONOTONIC=1"]


class Proxy:
    """A line to a server on this machine that can be cut, made slow, or made to swallow what it is given."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        #: Seconds that each piece is held up on its way to the server.
        self.delay = 0.0
        #: While set, nothing passes in either direction, and nobody is told.
        self.silent = threading.Event()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._closed = threading.Event()
        #: Those that were swallowed: open still, and mute for good.
        self._dead: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection((HOST, self._to))
                except OSError:
                    near.close()
                    continue
                self._pairs.append((near, far))
                threading.Thread(target=self._carry, args=(near, far, True), daemon=True).start()
                threading.Thread(target=self._carry, args=(far, near, False), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, is_forth: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(65536):
                if is_forth and self.delay:
                    time.sleep(self.delay)
                if self.silent.is_set():
                    self._closed.wait()  # this connection is dead for good, and nobody is told
                    break
                target.sendall(piece)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """End every connection; new ones come through."""
        for end in chain.from_iterable(self._pairs):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def swallowing(self) -> Iterator[None]:
        """Nobody is told that nothing comes through any more, also not afterwards, when new connections do."""
        self.silent.set()
        try:
            yield
        finally:
            self._dead += self._pairs
            self._pairs = []
            self.silent.clear()

    def close(self) -> None:
        self._closed.set()
        self._listener.close()
        self._pairs += self._dead
        self.cut()
        for end in chain.from_iterable(self._pairs):
            end.close()


# --- the service ------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """One process of the service, and how to start it again."""

    name: str
    command: Sequence[str]
    env: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    #: How much it had said in its earlier lives.
    began: int = 0

    def start(self) -> None:
        self.began = len(self.said()) if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                list(self.command), cwd=ROOT, env=self.env, stdout=log, stderr=log, preexec_fn=die_with_parent()
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def stop(self, seconds: float = 30) -> int:
        """As a deploy does."""
        self.signal(signal.SIGTERM)
        assert self.process is not None
        return self.process.wait(seconds)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def said(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass
class Service:
    """An API, a light worker and workers of toys, on one database and one broker."""

    data_dir: Path
    env: dict[str, str]
    settings: Settings
    database: Database
    port: int = field(default_factory=free_port)
    parts: dict[str, Part] = field(default_factory=dict)
    accepted: list[str] = field(default_factory=list)

    def start(self, *names: str, **env: str) -> None:
        """`api`, `light`, `jobs`, `jobs-2`…; and wait until they are ready. `env` is added to what they are given."""
        for name in names:
            self.parts[name] = Part(name, self._command(name), {**self.env, **env}, self.data_dir / f"{name}.log")
            self.parts[name].start()
        for name in names:
            wait_until(lambda name=name: self._is_ready(name), seconds=120, every=0.1)

    def _command(self, name: str) -> list[str]:
        if name == "api":
            return [sys.executable, "-m", "tests.faults.toy_api"]
        return [sys.executable, "-m", "tests.faults.toy", name.partition("-")[0]]

    def _is_ready(self, name: str) -> bool:
        part = self.parts[name]
        if not part.is_alive():
            pytest.fail(f"{name} has ended:\n{part.said()[-3000:]}")
        if name != "api":
            return "worker_ready" in part.said()[part.began :]
        try:
            return httpx.get(f"{self.url}/healthz", timeout=2, verify=PLAIN).status_code == 200
        except httpx.TransportError:
            return False

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def http(self) -> httpx.Client:
        key = self.settings.admin_key_file.read_text().strip()
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {key}"}, timeout=30, verify=PLAIN)

    def submit(self, number: int = 1, *, key: str | None = None, **metadata: object) -> list[str]:
        """Submit toy jobs over HTTP. What was answered with a 2xx counts as accepted."""
        with self.http as http:
            if not hasattr(self, "_file"):
                sent = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", ROW)})
                self._file = sent.raise_for_status().json()["id"]
            body = {
                "model": MODEL,
                "training_file": self._file,
                "metadata": {name: str(value) for name, value in metadata.items()},
            }
            headers = {"idempotency-key": key} if key else {}
            made = [http.post("/v1/fine_tuning/jobs", json=body, headers=headers) for _ in range(number)]
        ids = [one.raise_for_status().json()["id"] for one in made]
        self.accepted += [job_id for job_id in ids if job_id not in self.accepted]
        return ids

    def try_to_submit(self, *, seconds: float = 30) -> int:
        """The status of what the API says just now to a submission of one step; 0 where it says nothing in time."""
        body = {"model": MODEL, "training_file": self._file, "metadata": {"steps": "1"}}
        with self.http as http:
            try:
                answer = http.post("/v1/fine_tuning/jobs", json=body, timeout=seconds)
            except httpx.TransportError:
                return 0
        if answer.status_code == 200:
            self.accepted.append(answer.json()["id"])
        return answer.status_code

    def job(self, job_id: str) -> Job:
        with self.database.reading() as session:
            return session.scalars(select(Job).where(Job.id == job_id)).one()

    def statuses(self, ids: Sequence[str]) -> list[str]:
        with self.database.reading() as session:
            found = {one.id: one.status for one in session.execute(select(Job.id, Job.status).where(Job.id.in_(ids)))}
        return [found.get(job_id, "missing") for job_id in ids]

    def wait(self, ids: Sequence[str], *, status: str | None = None, seconds: float = 60) -> None:
        """Until all have ended, or have the status."""
        wanted = {status} if status else TERMINAL
        try:
            wait_until(lambda: set(self.statuses(ids)) <= wanted, seconds=seconds, every=0.1)
        except pytest.fail.Exception:
            tails = "\n".join(f"--- {name}\n{part.said()[-2500:]}" for name, part in self.parts.items())
            pytest.fail(f"{list(zip(ids, self.statuses(ids), strict=True))} after {seconds} s\n{tails}")

    def wait_for_step(self, job_id: str, step: int = 1, *, seconds: float = 60) -> None:
        wait_until(lambda: any(one.job == job_id and one.step >= step for one in self.diary()), seconds=seconds)

    def furthest(self, job_id: str) -> int:
        """The last step that any of its attempts began."""
        return max(entry.step for entry in self.diary() if entry.job == job_id)

    def has_point(self, job_id: str) -> bool:
        return bool(self.points(job_id))

    def points(self, job_id: str) -> list[ResumePoint]:
        """What was saved of a job and is on record, the newest first."""
        with self.database.reading() as session:
            found = select(ResumePoint).where(ResumePoint.job_id == job_id).order_by(ResumePoint.step.desc())
            return list(session.scalars(found))

    def said(self, job_id: str) -> list[str]:
        with self.database.reading() as session:
            found = select(JobEvent.message).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)
            return list(session.scalars(found))

    def bring_forward(self, job_id: str) -> None:
        """What is tried again later is tried again now."""
        with self.database.writing() as session:
            session.execute(update(Job).where(Job.id == job_id).values(not_before=None))
            session.commit()

    def first_step(self, job_id: str, attempt: int) -> int:
        return min(entry.step for entry in self.diary() if (entry.job, entry.attempt) == (job_id, attempt))

    def holder(self, job_id: str) -> Part:
        """The worker that has the job."""
        worker = self.job(job_id).worker_id
        return next(part for part in self.parts.values() if worker and worker in part.said())

    def children(self, name: str | None = None) -> list[psutil.Process]:
        """The toys that run, wherever they come from; with `name` those of that part."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if "toy_step.py" in line and str(self.data_dir) in line and process.status() != "zombie":
                    found.append(process)
        if name is None:
            return found
        return [process for process in found if process.ppid() == self.parts[name].pid]

    def diary(self) -> list[Entry]:
        path = self.data_dir / "toys" / "diary"
        if not path.exists():
            return []
        return [Entry(*line.split()) for line in path.read_text().splitlines() if line.count(" ") == 3]

    def close(self) -> None:
        for part in self.parts.values():
            if part.is_alive():
                part.signal(signal.SIGCONT)
                part.kill()
        self.database.close()


class Entry:
    """What a toy wrote down at a step."""

    def __init__(self, job: str, attempt: str, step: str, moment: str) -> None:
        self.job, self.attempt, self.step, self.moment = job, int(attempt), int(step), float(moment)


@contextmanager
def run_faulty(data_dir: Path, *, database_url: str = "", broker_url: str = "", **settings: str) -> Iterator[Service]:
    """A service of which nothing runs yet. `settings` are those of SHADOWFT_…, in any case."""
    data_dir.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ours = {
        "DATA_DIR": str(data_dir),
        "DATABASE_URL": database_url,
        "BROKER_URL": broker_url,
        "PORT": str(port),
        "DEVICE": "cpu",
        "SANDBOX": "off",
        "LANE_MEMORY_BYTES": str(2**30),
        **INTERVALS,
        **{name.upper(): value for name, value in settings.items()},
    }
    values = {f"SHADOWFT_{name}": value for name, value in ours.items()}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SHADOWFT_")}
    made = Settings(_env_file=None, **{name.lower(): value for name, value in ours.items()})  # type: ignore[arg-type]
    prepare(made)
    service = Service(
        data_dir, {**inherited, **values, "PYTHONPATH": str(ROOT)}, made, Database(made.database), port=port
    )
    try:
        yield service
    finally:
        service.close()


def freeze_outside_of_writing(part: Part, settings: Settings) -> None:
    """Freeze it; again where SQLite's write lock was caught with it, which nobody else gets until it wakes."""
    while True:
        part.signal(signal.SIGSTOP)
        if not settings.uses_sqlite or can_write(settings.data_dir / "shadowft.db"):
            return
        part.signal(signal.SIGCONT)
        time.sleep(0.05)


def can_write(database: Path, *, seconds: float = 1.0) -> bool:
    """Whether SQLite's write lock is to be had within so long."""
    with closing(sqlite3.connect(database, timeout=seconds, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        connection.execute("ROLLBACK")
        return True


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


@dataclass
class Injected:
    """What a tracer writes down of the calls that it makes fail."""

    log: Path

    def __bool__(self) -> bool:
        return "(INJECTED)" in self.log.read_text()


@contextmanager
def failing_calls(
    process: int, fault: str, *, below: Path | None = None, threads_only: bool = False
) -> Iterator[Injected]:
    """Kernel calls of a process and of its children fail as strace's `inject` says: `fsync:error=EIO`. `below`: only
    those on this file. `threads_only`: those of children pass, and of threads that begin later."""
    program = shutil.which("strace")
    if program is None:
        servers.missing("strace is not installed")
    with tempfile.TemporaryDirectory(prefix="shadowft-strace-") as folder:
        log = Path(folder) / "log"
        command = [
            str(program),
            "-qq",
            "-o",
            str(log),
            "-e",
            f"trace={fault.partition(':')[0]}",
            "-e",
            f"inject={fault}",
        ]
        command += ["-P", str(below)] if below else []
        wanted = [int(task.name) for task in Path(f"/proc/{process}/task").iterdir()]
        command += [f"--attach={task}" for task in wanted] if threads_only else ["-f", f"--attach={process}"]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=die_with_parent())
        with ended(tracer, signal.SIGTERM), tracer.stderr:  # type: ignore[union-attr]
            wait_until(lambda: tracer.poll() is not None or all(_is_traced(process, task) for task in wanted))
            if tracer.poll() is not None:
                assert tracer.stderr is not None
                servers.missing(f"no process can be traced here: {tracer.stderr.read().decode().strip()}")
            yield Injected(log)


def _is_traced(process: int, task: int) -> bool:
    try:
        status = Path(f"/proc/{process}/task/{task}/status").read_text()
    except OSError:  # it has ended meanwhile
        return True
    return "TracerPid:\t0\n" not in status


def fill(disk: Path) -> Path:
    """The file that takes all that is left of the disk but a page."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 65536)
    with ballast.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return ballast


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own at `folder`, of so many bytes ("8m")."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        servers.missing(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
