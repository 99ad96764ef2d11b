"""The console script, as a user runs it: a child process, its output and its status."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from core.keys import authenticate, find_team
from core.models import Worker

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(settings):
    def shadowft(*arguments, **env):
        ours = {
            "PYTHONPATH": str(ROOT),
            "SHADOWFT_DATA_DIR": str(settings.data_dir),
            "SHADOWFT_DATABASE_URL": settings.database_url.get_secret_value(),
            "COLUMNS": "200",
        }
        return subprocess.run(
            [sys.executable, "-m", "cli", *arguments],
            cwd=settings.data_dir, env={**os.environ, **ours, **env}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return shadowft


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_key_is_made_used_listed_and_revoked(run, database):
    assert run("teams", "create", "blue").stdout.startswith("team-")
    made = run("keys", "create", "laptop", "--team", "blue")
    key = made.stdout.strip()
    with database.reading() as session:
        caller = authenticate(session, key)
    assert (caller.team_name, caller.is_admin) == ("blue", False)
    listed = run("keys", "list").stdout
    assert "laptop" in listed
    assert key.split("_")[2] not in listed
    assert run("keys", "revoke", caller.key_id).stdout == f"{caller.key_id} is revoked.\n"
    assert re.search(rf"{caller.key_id}.*laptop.*\d{{4}}.*\d{{4}}", run("keys", "list").stdout)


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_the_time_of_a_teams_jobs_is_limited_and_freed(run, database):
    run("teams", "create", "blue")
    assert run("teams", "limit", "blue", "86400").stdout == "Jobs of blue may run 86,400 s.\n"
    assert "86,400" in run("teams", "list").stdout
    assert run("teams", "limit", "blue", "0").stdout == "Jobs of blue may run as long as they take.\n"
    with database.reading() as session:
        assert find_team(session, "blue").max_job_seconds is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("keys", "create", "x", "--team", "absent"), "shadowft teams create absent"),
        (("keys", "revoke", "key_absent"), "shadowft keys list"),
        (("teams", "create", "Not Usable"), "a-z"),
        (("teams", "create", "default"), "already"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_mistake_is_a_sentence_and_a_status(run, arguments, said):
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("shadowft: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_the_script_tells_its_version_and_its_commands(run):
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run("version").stdout)
    done = run("--help")
    for command in ("serve", "api", "worker", "migrate", "keys", "teams", "pairs", "files", "jobs", "version"):
        assert command in done.stdout
    assert run("nonsense").returncode == 2


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_worker_on_a_device_that_is_not_there_says_so(run):
    done = run("worker", "--queue", "jobs", SHADOWFT_DEVICE="7", PATH="/nonexistent")
    assert done.returncode == 1
    assert "SHADOWFT_DEVICE" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_containers_health_is_whether_a_worker_of_this_host_lives(run, database):
    assert run("worker-health").returncode == 1
    with database.writing() as session:
        shared = {"pid": 1, "queue": "jobs", "device": "cpu", "lane_memory_bytes": 1, "version": "1"}
        session.add(Worker(id="worker-1", host=socket.gethostname(), **shared))
        session.commit()
    assert run("worker-health").returncode == 0


@pytest.mark.parametrize(
    "arguments", [["--help"], ["jobs", "create", "--help"], ["files", "check", "rows.jsonl"]], ids=str
)
def test_a_command_imports_only_what_it_needs(arguments, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    program = f"""
import atexit, sys
from cli.main import main
heavy = {{"httpx", "sqlalchemy", "fastapi", "uvicorn", "celery", "alembic", "torch", "huggingface_hub"}}
atexit.register(lambda: print(sorted(sys.modules.keys() & heavy), file=sys.stderr))
sys.argv = ["shadowft", *{arguments!r}]
main()
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stderr == "[]\n"
