"""The broker only shortens the wait: it may be away, empty, mute, full or mad, and nothing is lost or doubled."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter

import pytest

from tests.faults.checker import check
from tests.servers import wait_until

#: They share their services.
pytestmark = pytest.mark.xdist_group("faults")

#: Answers to a request that hands a nudge to a broker which does not answer.
AT_ONCE_SECONDS = 2.0


def pids(service):
    return {name: part.pid for name, part in service.parts.items() if part.is_alive()}


def starts(service, ids):
    """How often each job was begun."""
    return Counter({job_id: service.job(job_id).attempt for job_id in ids})


def test_jobs_submitted_while_redis_is_away_run_once_it_is_back(on_servers):
    """F05, F07: killed with all that it held, in the middle of a job; the job goes on."""
    service, before = on_servers.service, pids(on_servers.service)
    (running,) = service.submit(steps=40, seconds=0.1)
    service.wait_for_step(running)
    on_servers.redis.stop()

    waiting = service.submit(3)

    service.wait([running])
    on_servers.redis.start()
    service.wait(waiting)
    check(service)
    assert pids(service) == before
    assert set(starts(service, [running, *waiting]).values()) == {1}


@pytest.mark.slow
def test_a_flushed_redis_loses_no_job(on_servers):
    """F06."""
    service = on_servers.service
    ids = service.submit(20, steps=2)
    on_servers.redis.client().flushall()
    service.wait(ids, seconds=120)
    check(service)
    assert set(service.statuses(ids)) == {"succeeded"}
    assert set(starts(service, ids).values()) == {1}


def test_a_frozen_redis_makes_no_request_slow(on_servers):
    """F08."""
    service = on_servers.service
    service.submit()  # the connection stands
    with on_servers.redis.frozen():
        took = []
        for _ in range(5):
            began = time.monotonic()
            service.submit()
            took.append(time.monotonic() - began)
    service.wait(service.accepted)
    check(service)
    assert max(took) < AT_ONCE_SECONDS


@pytest.mark.slow
def test_a_line_to_redis_that_swallows_everything_is_found_dead(on_servers):
    """F09."""
    service = on_servers.service
    with on_servers.to_redis.swallowing():
        ids = service.submit(2)
        time.sleep(10)
    service.wait(ids, seconds=120)
    again = service.submit(2)
    service.wait(again, seconds=90)
    check(service)


@pytest.mark.slow
def test_a_full_redis_loses_no_job(on_servers):
    """F11: it refuses every write."""
    service, client = on_servers.service, on_servers.redis.client()
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", "1")
    ids = service.submit(3)
    time.sleep(1)
    client.config_set("maxmemory", "0")
    service.wait(ids)
    check(service)


@pytest.mark.slow
def test_a_nudge_that_comes_fifty_times_starts_a_job_once(on_servers):
    """F12: messages of `work` are doubled and in any order."""
    service, client = on_servers.service, on_servers.redis.client()
    message = catch(service, client)
    ids = service.submit(3, steps=10, seconds=0.05)
    client.lpush("jobs", *[message] * 50)
    service.wait(ids)
    check(service)
    assert set(starts(service, ids).values()) == {1}


def catch(service, client):
    """A message as Celery writes it: sent where nobody listens."""
    service.parts["jobs"].stop()
    service.submit(steps=1)
    message = wait_until(lambda: client.lindex("jobs", 0), seconds=30)
    service.start("jobs")
    return message


NONSENSE = {
    "empty": b"",
    "torn": b'{"body": "W1tdLC',
    "not UTF-8": b"\xff\xfe",
    "a number": b"5",
    "a list": b"[]",
    "no properties": json.dumps({"body": "e30="}).encode(),
    "strange properties": json.dumps({"body": "e30=", "properties": 5}).encode(),
    "no delivery tag": json.dumps({"body": "e30=", "properties": {}, "headers": {}}).encode(),
    "an unknown task": json.dumps(
        {
            "body": "W1tdLCB7fSwge31d",
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"task": "rm", "id": "x", "lang": "py"},
            "properties": {"delivery_tag": "x", "body_encoding": "base64", "delivery_info": {}},
        }
    ).encode(),
    "a pickle": json.dumps(
        {
            "body": "gASVAAA=",
            "content-type": "application/x-python-serialize",
            "content-encoding": "binary",
            "headers": {"task": "work", "id": "y"},
            "properties": {"delivery_tag": "y", "body_encoding": "base64", "delivery_info": {}},
        }
    ).encode(),
}


def test_messages_that_are_none_kill_no_worker_of_redis(on_servers):
    """F13, during a job."""
    service, before = on_servers.service, pids(on_servers.service)
    (running,) = service.submit(steps=30, seconds=0.1)
    service.wait_for_step(running)
    for content in NONSENSE.values():
        on_servers.redis.client().lpush("jobs", content)
        on_servers.redis.client().lpush("light", content)
    after = service.submit(2)
    service.wait([running, *after])
    check(service)
    assert pids(service) == before
    assert service.job(running).attempt == 1
    wait_until(lambda: set(on_servers.redis.client().lrange("jobs", 0, -1)).isdisjoint(NONSENSE.values()))


def test_messages_that_are_none_kill_no_worker_of_the_embedded_broker(on_files):
    """F13, during a job."""
    service, before = on_files.service, pids(on_files.service)
    (running,) = service.submit(steps=30, seconds=0.1)
    service.wait_for_step(running)
    for queue in ("jobs", "light"):
        for number, content in enumerate(NONSENSE.values()):
            (service.settings.broker_dir / queue / f"{number:020d}-1.msg").write_bytes(content)
    after = service.submit(2)
    service.wait([running, *after])
    check(service)
    assert pids(service) == before
    assert service.job(running).attempt == 1
    assert not list((service.settings.broker_dir / "jobs").glob("0*0?-1.msg"))


@pytest.mark.slow
def test_a_broker_folder_that_is_emptied_or_taken_away_loses_no_job(on_files):
    """F05, F06 of the embedded broker."""
    service = on_files.service
    ids = service.submit(5, steps=2)
    shutil.rmtree(service.settings.broker_dir)
    ids += service.submit(2)
    service.wait(ids)
    check(service)
    assert set(starts(service, ids).values()) == {1}
