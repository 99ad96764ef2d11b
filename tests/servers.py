"""Real servers for the tests: PostgreSQL, Redis, the API behind a socket, and the whole service, as children.

Each listens on a free port of the loopback, keeps its data in a temporary folder, and ends with the process that
started it, however that one ends.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psycopg
import pytest
import redis
import uvicorn
from fastapi import FastAPI
from sqlalchemy.engine import make_url

from api.app import create_app
from api.protocol import SERVER
from core.config import Settings
from core.db import Database, open_database
from core.keys import create_key, create_team
from core.schema import migrate, prepare

HOST = "127.0.0.1"
START_SECONDS = 60.0
STOP_SECONDS = 15.0
#: The intervals of a service under test: what takes a minute in production takes ten seconds.
SHORT = {"SHADOWFT_LEASE_SECONDS": "10", "SHADOWFT_BEAT_SECONDS": "0.5", "SHADOWFT_SWEEP_SECONDS": "0.5"}

#: For `verify` of an HTTP client: making its own takes 50 ms, and nothing here speaks TLS.
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

_PR_SET_PDEATHSIG = 1
_numbers = count(1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(claim: Callable[[], Any], *, seconds: float = 20.0, every: float = 0.02) -> Any:
    """The first truthy answer of `claim`; the test fails when there is none in time."""
    end = time.monotonic() + seconds
    while not (answer := claim()):
        if time.monotonic() > end:
            pytest.fail(f"not so within {seconds:g} s: {getattr(claim, '__name__', claim)}")
        time.sleep(every)
    return answer


def missing(reason: str) -> None:
    """What a test needs is not on this machine: a skip on somebody's own, a failure where all tests must run."""
    if os.environ.get("CI", "").lower() in {"1", "true"}:
        pytest.fail(f"{reason} (and CI is set)")
    pytest.skip(reason)


# --- servers ----------------------------------------------------------------------------------------------------------


class Postgres:
    """A PostgreSQL of our own. `template` is a migrated, empty database; `database()` makes copies of it."""

    template = "template_shadowft"

    def __init__(self, port: int) -> None:
        self._port = port

    def url(self, name: str) -> str:
        return f"postgresql+psycopg://postgres@{HOST}:{self._port}/{name}"

    def execute(self, statement: str, name: str = "postgres") -> list[Any]:
        address = make_url(self.url(name)).set(drivername="postgresql").render_as_string()
        with psycopg.connect(address, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    @cached_property
    def _by_files(self) -> str:
        """Copying files takes half as long as logging what is in them; before 15 there was no other way."""
        ((version,),) = self.execute("SHOW server_version_num")
        return "STRATEGY FILE_COPY" if int(version) >= 150000 else ""

    @contextmanager
    def database(self, *, migrated: bool = True) -> Iterator[str]:
        """The URL of a fresh database, dropped at the end."""
        name = f"test_{next(_numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {self.template if migrated else 'template0'} {self._by_files}")
        try:
            yield self.url(name)
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def take_away(self, url: str) -> None:
        """Cut every connection to the database and refuse new ones."""
        name = make_url(url).database
        self.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        self.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")  # noqa: S608

    def bring_back(self, url: str) -> None:
        self.execute(f"ALTER DATABASE {make_url(url).database} ALLOW_CONNECTIONS true")


@contextmanager
def run_postgres() -> Iterator[Postgres]:
    folder = _private_folder("postgres")
    data, port = folder / "data", free_port()
    try:
        made = _unprivileged([_postgres_program("initdb"), "-D", data, "--no-sync", "-A", "trust", "-U", "postgres"])
        assert made.wait() == 0, made.args
        # Nothing here must survive a power cut, so nothing waits for the disk.
        fast = ["-F", "-c", "full_page_writes=off", "-c", "synchronous_commit=off", "-c", "max_connections=200"]
        where = ["-D", data, "-h", HOST, "-p", str(port), "-k", ""]
        with ended(
            _unprivileged([_postgres_program("postgres"), *where, *fast], at_death=signal.SIGQUIT), signal.SIGINT
        ):
            server = Postgres(port)
            wait_until(lambda: _answers(lambda: server.execute("SELECT 1")), seconds=START_SECONDS)
            _make_template(server)
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_template(server: Postgres) -> None:
    server.execute(f"CREATE DATABASE {server.template} TEMPLATE template0")
    database = Database(server.url(server.template))
    migrate(database)
    database.close()


def _postgres_program(name: str) -> str:
    found = [*Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), *filter(None, [shutil.which(name)])]
    if not found:
        missing(f"PostgreSQL's {name} is not installed")
    return str(found[-1])


@contextmanager
def run_redis() -> Iterator[str]:
    """Its URL without a database; there are a thousand of them."""
    program = shutil.which("redis-server")
    if program is None:
        missing("redis-server is not installed")
    folder, port = _private_folder("redis"), free_port()
    options = [
        "--bind",
        HOST,
        "--port",
        str(port),
        "--dir",
        folder,
        "--save",
        "",
        "--appendonly",
        "no",
        "--databases",
        "1000",
    ]
    try:
        with ended(_unprivileged([program, *options]), signal.SIGTERM):
            client = redis.Redis(host=HOST, port=port)
            wait_until(lambda: _answers(client.ping), seconds=START_SECONDS)
            client.close()
            yield f"redis://{HOST}:{port}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _answers(ask: Callable[[], object]) -> bool:
    with suppress(psycopg.OperationalError, redis.RedisError, OSError):
        ask()
        return True
    return False


def _account() -> str | None:
    """Whom the servers run as when we are root, whom PostgreSQL refuses."""
    if os.geteuid() != 0:
        return None
    accounts = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in accounts else "nobody"


def _private_folder(name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"shadowft-{name}-"))
    if account := _account():
        shutil.chown(folder, account)
    return folder


def _unprivileged(command: list[Any], *, at_death: int = signal.SIGTERM) -> subprocess.Popen[bytes]:
    account = _account()
    return subprocess.Popen(
        [str(part) for part in command],
        cwd="/",
        user=account,
        group=pwd.getpwnam(account).pw_gid if account else None,
        extra_groups=[] if account else None,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent(at_death),
    )


def die_with_parent(number: int = signal.SIGTERM) -> Callable[[], None]:
    """For `preexec_fn`: a test run that is killed leaves no server behind."""
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, number) and None


@contextmanager
def ended(process: subprocess.Popen[Any], number: int) -> Iterator[subprocess.Popen[Any]]:
    """Ends the process when the block does: asked by signal `number` first, then killed."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(number)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --- the API alone ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A team of its own and its key."""

    team_id: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}


@dataclass(frozen=True)
class Api:
    """A running API behind a real socket, and what it works with. No worker runs."""

    url: str
    port: int
    admin_key: str
    settings: Settings
    database: Database
    #: As the admin, of the team `default`.
    http: httpx.Client
    app: FastAPI

    def member(self, *, is_admin: bool = False) -> Member:
        """A new team with a key."""
        with self.database.writing() as session:
            team = create_team(session, f"team-{next(_numbers)}")
            _, key = create_key(session, team, name="test", is_admin=is_admin)
            session.commit()
            return Member(team_id=team.id, key=key)


@contextmanager
def run_api(settings: Settings) -> Iterator[Api]:
    """The API in a thread of this process, on a socket of its own."""
    prepare(settings)
    admin_key = settings.admin_key_file.read_text().strip()
    app = create_app(settings)
    config = uvicorn.Config(app, **SERVER, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listener],), name="api")
        thread.start()
        database = open_database(settings)
        url = f"http://{HOST}:{port}"
        try:
            headers = {"authorization": f"Bearer {admin_key}"}
            with httpx.Client(base_url=url, headers=headers, timeout=30, verify=PLAIN) as http:
                wait_until(lambda: server.started)
                yield Api(url, port, admin_key, settings, database, http, app)
        finally:
            server.should_exit = True
            thread.join()
            database.close()


# --- the whole service ------------------------------------------------------------------------------------------------


class _Running(NamedTuple):
    url: str
    key: str
    data_dir: Path


class Running(_Running):
    """`(url, key, data_dir)` of a service, and its supervisor's process."""

    process: subprocess.Popen[bytes]


@contextmanager
def run_service(env: dict[str, str], data_dir: Path) -> Iterator[Running]:
    """`shadowft serve` with short intervals, once the API and both workers say that they are ready.

    What it prints is in `data_dir/serve.log`. `env` adds settings or overrides those here.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ours = {"SHADOWFT_DATA_DIR": str(data_dir), "SHADOWFT_PORT": str(port), "SHADOWFT_DEVICE": "cpu"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SHADOWFT_")}
    with (data_dir / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", "serve"],
            cwd=data_dir,
            env={**inherited, "PYTHONPATH": str(Path(__file__).parents[1]), **ours, **SHORT, **env},
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent(),
        )
        url = f"http://{HOST}:{port}"
        with ended(process, signal.SIGTERM):
            wait_until(lambda: _is_ready(process, url, data_dir), seconds=START_SECONDS, every=0.2)
            running = Running(url, (data_dir / "admin.key").read_text().strip(), data_dir)
            running.process = process
            yield running


def _is_ready(process: subprocess.Popen[bytes], url: str, data_dir: Path) -> bool:
    if process.poll() is not None:
        pytest.fail(f"shadowft serve ended with {process.returncode}:\n{(data_dir / 'serve.log').read_text()[-4000:]}")
    try:
        answer = httpx.get(f"{url}/readyz", timeout=5, verify=PLAIN)
    except httpx.TransportError:
        return False
    return answer.status_code == 200 and answer.json()["status"] == "ok"
