"""Fixtures that every part of the tests may use. A server starts when the first test asks for it, once a process."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from pathlib import Path

import pytest

# Several tests run at once on every core, and their models are tiny: torch's threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
# The broker's app reads its settings when it is imported: nothing of a test may reach a real deployment's folder.
for _name in [name for name in os.environ if name.startswith("SHADOWFT_")]:
    del os.environ[_name]
_SCRATCH = tempfile.mkdtemp(prefix="shadowft-tests-")
os.environ["SHADOWFT_DATA_DIR"] = _SCRATCH
atexit.register(shutil.rmtree, _SCRATCH, ignore_errors=True)

from pydantic import SecretStr  # noqa: E402

from core.config import Settings  # noqa: E402
from core.db import Database, open_database  # noqa: E402
from core.schema import migrate  # noqa: E402
from tests.console import shadowft  # noqa: E402
from tests.servers import Api, Postgres, Running, run_api, run_postgres, run_redis, run_service  # noqa: E402

__all__ = ["shadowft"]

BACKENDS = ("sqlite", "postgresql")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have to say beside that they passed: their property `summary`."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    said = [value for report in reports for name, value in report.user_properties if name == "summary"]
    for line in said:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with run_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with run_redis() as url:
        yield url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    database = Database(f"sqlite:///{path}")
    migrate(database)
    database.close()
    return path


@pytest.fixture(scope="session")
def fresh_settings(request: pytest.FixtureRequest) -> Callable[..., object]:
    """`fresh_settings(backend, data_dir)`: a context with the settings of an empty, migrated database."""

    @contextmanager
    def make(backend: str, data_dir: Path, *, migrated: bool = True, **values: object) -> Iterator[Settings]:
        data_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            url = ""
            if backend == "postgresql":
                url = stack.enter_context(request.getfixturevalue("postgres").database(migrated=migrated))
            elif migrated:
                shutil.copy(request.getfixturevalue("sqlite_template"), data_dir / "shadowft.db")
            quiet = {"log_level": "warning", "device": "cpu"}
            yield Settings(_env_file=None, data_dir=data_dir, database_url=SecretStr(url), **quiet | values)

    return make


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """A test that takes this, or `database`, runs once on each database."""
    return request.param


@pytest.fixture
def settings(backend: str, fresh_settings, tmp_path: Path) -> Iterator[Settings]:
    """Short intervals, and a database of this test's own."""
    short = {"lease_seconds": 2, "beat_seconds": 0.1, "sweep_seconds": 0.1, "cancel_grace_seconds": 0.5}
    with fresh_settings(backend, tmp_path / "data", **short) as made:
        yield made


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    opened = open_database(settings)
    yield opened
    opened.close()


@pytest.fixture(scope="module", params=BACKENDS)
def api(request: pytest.FixtureRequest, fresh_settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A running API without a worker, shared by the tests of a module: each test takes a team of its own."""
    folder = tmp_path_factory.mktemp("api")
    with (
        fresh_settings(request.param, folder, max_file_bytes=100_000, max_json_bytes=50_000) as made,
        run_api(made) as ran,
    ):
        yield ran


@pytest.fixture(scope="session")
def running_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """`running_service(env) -> (url, key, data_dir)`: the whole service, as a user starts it, for many tests.

    The same `env` gives the same service. Its sweeps cost what they cost, so they come seldom. `.process` is its
    supervisor. A test that hurts its service takes one of its own: `run_service`.
    """
    with ExitStack() as stack:
        known: dict[frozenset[tuple[str, str]], Running] = {}

        def run(env: dict[str, str] | None = None) -> Running:
            env = {"SHADOWFT_SWEEP_SECONDS": "2", **(env or {})}
            place = frozenset(env.items())
            if place not in known:
                known[place] = stack.enter_context(run_service(env, tmp_path_factory.mktemp("service")))
            return known[place]

        yield run


@pytest.fixture(scope="session")
def make_outside_servers(postgres: Postgres, redis_url: str) -> Callable[[], AbstractContextManager[dict[str, str]]]:
    """`make_outside_servers()`: a context with the settings of an empty database and of an empty broker."""
    numbers = count()

    @contextmanager
    def make() -> Iterator[dict[str, str]]:
        with postgres.database(migrated=False) as url:
            yield {"SHADOWFT_DATABASE_URL": url, "SHADOWFT_BROKER_URL": f"{redis_url}/{next(numbers)}"}

    return make


@pytest.fixture(scope="session")
def outside_servers(make_outside_servers) -> Iterator[dict[str, str]]:
    """What to give to `running_service` so that it uses PostgreSQL and Redis."""
    with make_outside_servers() as env:
        yield env


@pytest.fixture(params=["embedded", "postgresql and redis"])
def service_env(request: pytest.FixtureRequest) -> dict[str, str]:
    """A test that takes this runs once with the embedded parts and once with the servers."""
    return {} if request.param == "embedded" else request.getfixturevalue("outside_servers")
