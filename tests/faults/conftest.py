"""Two services to be faulty with: one on files (SQLite, the embedded broker), one on servers (PostgreSQL, Redis).

Each runs once for all tests of a process; a test finds it whole, and leaves behind what the next one is to find mended.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlalchemy import select

from core.models import Job
from tests.faults.faults import TERMINAL, PostgresServer, Proxy, RedisServer, Service, run_faulty

PARTS = ("api", "light", "jobs")
#: What is saved of a job's work lies half a second back at most.
SETTINGS = {"save_seconds": "0.5"}


class Field(NamedTuple):
    service: Service
    postgres: PostgresServer | None = None
    redis: RedisServer | None = None
    #: The lines from the service to its servers.
    to_postgres: Proxy | None = None
    to_redis: Proxy | None = None


#: What runs for the tests below this folder, until the last of them has passed: its sweeps would take the others' time.
_stack = ExitStack()
_made: dict[str, Field] = {}


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    if nextitem is None or not nextitem.path.is_relative_to(Path(__file__).parent):
        _made.clear()
        _stack.close()


@pytest.fixture(scope="session")
def make_field(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Field]:
    def on_files() -> Field:
        return Field(_stack.enter_context(run_faulty(tmp_path_factory.mktemp("files") / "data", **SETTINGS)))

    def on_servers() -> Field:
        postgres, redis = PostgresServer(), RedisServer()
        _stack.callback(postgres.close)
        _stack.callback(redis.close)
        postgres.start()
        redis.start()
        lines = Proxy(postgres.port), Proxy(redis.port)
        for line in lines:
            _stack.callback(line.close)
        urls = {"database_url": postgres.url_at(lines[0].port), "broker_url": redis.url_at(lines[1].port)}
        service = run_faulty(tmp_path_factory.mktemp("servers") / "data", **urls, **SETTINGS)
        return Field(_stack.enter_context(service), postgres, redis, *lines)

    def make(name: str) -> Field:
        if name not in _made:
            _made[name] = on_files() if name == "files" else on_servers()
        return _made[name]

    return make


def _mended(field: Field) -> Field:
    """All parts run, and no job is left of the test before."""
    service = field.service
    missing = [name for name in PARTS if name not in service.parts or not service.parts[name].is_alive()]
    for name in [name for name in service.parts if name not in PARTS]:
        part = service.parts.pop(name)
        if part.is_alive():
            part.kill()
    service.start(*missing)
    with service.database.reading() as session:
        live = session.scalars(select(Job.id).where(Job.status.not_in(TERMINAL))).all()
    with service.http as http:
        for job_id in live:
            http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    service.wait(live)
    return field


@pytest.fixture
def on_files(make_field) -> Field:
    return _mended(make_field("files"))


@pytest.fixture
def on_servers(make_field) -> Field:
    return _mended(make_field("servers"))


@pytest.fixture(params=["files", pytest.param("servers", marks=pytest.mark.slow)])
def field(request: pytest.FixtureRequest, make_field) -> Field:
    """A test that takes this, or `service`, runs once on each; on servers where all tests run."""
    return _mended(make_field(request.param))


@pytest.fixture
def service(field: Field) -> Service:
    return field.service
