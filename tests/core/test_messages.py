"""What both brokers make of messages: one that Celery chokes on costs itself alone, and no queue grows for ever."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import uuid
from itertools import count
from pathlib import Path

import pytest
import redis

from core import messages
from core.broker import takes_messages
from core.celery_app import connection_to
from core.config import Settings
from tests.servers import die_with_parent, ended, free_port, wait_until

ROOT = Path(__file__).parents[2]

_databases = count(900)


@pytest.fixture(params=["embedded", "redis"])
def settings(request, tmp_path):
    url = f"{request.getfixturevalue('redis_url')}/{next(_databases)}" if request.param == "redis" else ""
    return Settings(_env_file=None, data_dir=tmp_path, broker_url=url)


def send(settings, *contents):
    """Bytes, past all that Celery would say of them."""
    url = settings.broker_url.get_secret_value()
    if url:
        redis.Redis.from_url(url).lpush("jobs", *contents)
        return
    folder = settings.broker_dir / "jobs"
    folder.mkdir(parents=True)
    for number, content in enumerate(contents):
        (folder / f"{number:020d}-1.msg").write_bytes(content)


def message(body=b"[[], {}, {}]", **headers):
    """A message as Celery writes it, but for these headers."""
    name = str(uuid.uuid4())
    delivered = {"exchange": "", "routing_key": "jobs"}
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"lang": "py", "task": "work", "id": name, **headers},
            "properties": {"delivery_tag": name, "body_encoding": "base64", "delivery_info": delivered},
        }
    ).encode()


DEEP = b"[" * 100_000

NONSENSE = {
    "deep": DEEP,
    "deep and whole": DEEP[:2000] + b"]" * 2000,
    "a deep body": message(DEEP),
    "a body that is no JSON": message(b"xx"),
    "a body that is no list": message(b'{"a": 1}'),
    "unknown arguments": message(b'[[1, 2], {"a": 1}, {}]'),
    "no headers": message().replace(b'"headers"', b'"none"'),
    "an id that is none": message(id=None),
    "an id that is a list": message(id=[1]),
    "a task that is a list": message(task=[]),
    "an unknown task without an id": message(task="rm").replace(b'"id"', b'"di"'),
    "a time limit that is a number": message(timelimit=5),
    "a time limit that is a word": message(timelimit="x"),
    "an end that is a word": message(expires="x"),
    "an end that never comes": message(expires=1e300),
    "a start that is a list": message(eta=[1]),
    "retries that are a word": message(retries="x"),
}


def test_a_worker_reads_on_whatever_lies_in_its_queue(settings, tmp_path):
    """It is given one message at a time: one that it never got done with would be its last."""
    send(settings, *(one for nonsense in NONSENSE.values() for one in (nonsense, message(task="admit"))))
    file = tmp_path / "admitted"
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SHADOWFT_DATA_DIR": str(settings.data_dir),
        "SHADOWFT_BROKER_URL": settings.broker_url.get_secret_value(),
    }
    command = [sys.executable, "-m", "tests.core.toy_worker", str(file)]
    with (tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log, preexec_fn=die_with_parent())

    def admitted():
        return file.read_text().count("\n") if file.exists() else 0

    with ended(worker, signal.SIGKILL):
        try:
            wait_until(lambda: worker.poll() is not None or admitted() == len(NONSENSE), seconds=30)
        except pytest.fail.Exception:
            pytest.fail(f"deaf after {list(NONSENSE)[admitted()]}: {(tmp_path / 'log').read_text()[-3000:]}")
        assert worker.poll() is None, f"died of {list(NONSENSE)[admitted()]}: {(tmp_path / 'log').read_text()[-3000:]}"


def test_a_queue_that_nobody_reads_does_not_grow_for_ever(settings, monkeypatch):
    monkeypatch.setattr(messages, "MAX_WAITING", 5)
    with connection_to(settings) as connection:
        channel = connection.default_channel
        for _ in range(20):
            channel.basic_publish(channel.prepare_message(""), "", "jobs")
        assert channel.queue_purge("jobs") == 5


def test_a_broker_that_takes_messages_is_told_from_one_that_is_away_or_refuses_them(settings, tmp_path):
    assert takes_messages(settings)
    url = settings.broker_url.get_secret_value()
    if url:
        away = settings.model_copy(update={"broker_url": type(settings.broker_url)(f"redis://127.0.0.1:{free_port()}")})
        assert not takes_messages(away)
        client = redis.Redis.from_url(url)
        client.set("readiness", "no list")
        assert not takes_messages(settings)
        client.delete("readiness")
    else:
        (settings.broker_dir / "readiness").rmdir()
        (settings.broker_dir / "readiness").write_text("no folder")
        assert not takes_messages(settings)
        (settings.broker_dir / "readiness").unlink()
    assert takes_messages(settings)
