"""The broker in a folder: a message is delivered once, in order, and a torn one harms nobody."""

from __future__ import annotations

import json
import resource
import threading
from collections import Counter
from queue import Empty

import pytest
from kombu import Connection

import core.celery_app  # noqa: F401 - it makes the transport known to kombu
from core import embedded_broker


@pytest.fixture
def connect(tmp_path):
    """A connection of its own, as each process has one."""
    opened = []

    def make():
        opened.append(Connection("embedded://", transport_options={"folder": str(tmp_path)}))
        return opened[-1]

    yield make
    for connection in opened:
        connection.close()


def put(connection, *bodies, queue="jobs"):
    with connection.SimpleQueue(queue, no_ack=True) as simple:
        for body in bodies:
            simple.put(body)


def take(connection, queue="jobs"):
    with connection.SimpleQueue(queue, no_ack=True) as simple:
        return simple.get(block=False).payload


def take_all(connection, queue="jobs"):
    with connection.SimpleQueue(queue, no_ack=True) as simple:
        while True:
            try:
                yield simple.get(block=False).payload
            except Empty:
                return


def test_messages_arrive_in_order_and_once(connect):
    put(connect(), *range(20))
    assert list(take_all(connect())) == list(range(20))
    assert list(take_all(connect())) == []


def test_queues_do_not_mix(connect):
    put(connect(), "train", queue="jobs")
    put(connect(), "check", queue="light")
    assert list(take_all(connect(), "light")) == ["check"]
    assert list(take_all(connect(), "jobs")) == ["train"]


def test_messages_wait_for_a_process_that_starts_later(connect):
    first = connect()
    put(first, "wait")
    first.close()
    assert take(connect()) == "wait"


def test_takers_at_once_never_get_the_same_message(connect):
    put(connect(), *range(100))
    got: list[int] = []

    def work():
        got.extend(take_all(connect()))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(got) == Counter(range(100))


NONSENSE = {
    "empty": b"",
    "torn": b'{"body": "e30=", "prop',
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "a word": b'"x"',
    "no body": json.dumps({"properties": {}}).encode(),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_message_that_is_none_is_dropped_and_the_next_one_arrives(connect, tmp_path, name):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "00000000000000000000-1.msg").write_bytes(NONSENSE[name])
    put(connect(), "good")
    assert list(take_all(connect())) == ["good"]
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_message_for_which_there_is_no_room_leaves_nothing(connect, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            put(connect(), "long")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "jobs").iterdir()) == []


def test_what_a_dead_writer_left_is_removed_and_what_is_being_written_is_not(connect, tmp_path, monkeypatch):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / ".writing").write_bytes(b"{")
    assert list(take_all(connect())) == []
    assert (tmp_path / "jobs" / ".writing").exists()
    monkeypatch.setattr(embedded_broker, "UNFINISHED_SECONDS", 0)
    assert list(take_all(connect())) == []
    assert not (tmp_path / "jobs" / ".writing").exists()


def test_a_queue_can_be_counted_and_purged(connect):
    put(connect(), 1, 2, 3)
    with connect().SimpleQueue("jobs") as simple:
        assert simple.qsize() == 3
        assert simple.clear() == 3
        assert simple.qsize() == 0
