"""A worker as a process: what it does is in the database, and a broker only tells it sooner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import select

from core import files
from core.ids import new_id
from core.models import File, Worker
from core.storage import LocalStorage
from tests.core.test_jobs import act, make_team
from tests.servers import HOST, SHORT, die_with_parent, ended, free_port, wait_until

ROOT = Path(__file__).parents[2]
ROW = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'


@pytest.fixture
def upload(settings, database):
    """`upload()`: a file that waits for its check, and of which nobody is told."""
    team_id, storage = make_team(database), LocalStorage(settings.storage_dir)

    def make():
        incoming = storage.receive(key := new_id(f"files/{team_id}/"))
        incoming.write(ROW)
        stored = incoming.keep()
        sent = {"filename": "r", "purpose": "fine-tune", "bytes": stored.bytes, "sha256": stored.sha256}
        file = File(team_id=team_id, storage_key=key, **sent)
        act(database, files.add, file, lifetime_seconds=None)
        return file.id

    return make


def start_worker(settings, queue, **env):
    values = {
        **os.environ,
        **SHORT,
        "PYTHONPATH": str(ROOT),
        "SHADOWFT_DATA_DIR": str(settings.data_dir),
        "SHADOWFT_DATABASE_URL": settings.database_url.get_secret_value(),
        "SHADOWFT_DEVICE": "cpu",
        "SHADOWFT_SANDBOX": "off",
        **{f"SHADOWFT_{name.upper()}": value for name, value in env.items()},
    }
    command = [sys.executable, "-m", "cli", "worker", "--queue", queue]
    with (settings.data_dir / "log").open("wb") as log:
        return subprocess.Popen(command, env=values, stdout=log, stderr=log, preexec_fn=die_with_parent())


@pytest.mark.parametrize("backend", ["sqlite"])
def test_a_worker_whose_broker_is_away_works_and_leaves_when_told(settings, database, upload):
    """It has never reached it: the sweep takes what waits, also of what comes later."""

    def status(file_id):
        with database.reading() as session:
            return session.get_one(File, file_id).status

    def workers():
        with database.reading() as session:
            return session.scalars(select(Worker.queue)).all()

    early = upload()
    worker = start_worker(settings, "light", broker_url=f"redis://{HOST}:{free_port()}/0")
    with ended(worker, signal.SIGKILL):
        wait_until(lambda: status(early) == "processed", seconds=30)
        late = upload()
        wait_until(lambda: status(late) == "processed")
        assert workers() == ["light"]
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
    assert workers() == []
    assert "worker_ready" not in (settings.data_dir / "log").read_text()
