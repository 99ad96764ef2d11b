"""The broker only shortens the wait: it may be away, empty, mute, full or mad, and nothing is lost or doubled."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from contextlib import ExitStack

import pytest
import redis

from tests.faults.checker import check
from tests.servers import wait_until

#: They share their services.
pytestmark = pytest.mark.xdist_group("faults")

#: Answers to a request that hands a nudge to a broker which does not answer.
AT_ONCE_SECONDS = 2.0
#: Within so long of a broker's return whatever waits has begun.
BACK_SECONDS = 30.0


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


def lose_all_messages(field):
    if field.redis:
        field.redis.client().flushall()
    else:
        shutil.rmtree(field.service.settings.broker_dir)


def test_jobs_whose_messages_are_all_lost_begin_at_the_next_sweep(field):
    """F06: nobody is told of what is queued, and nobody was about to look."""
    service = field.service
    service.parts["jobs"].stop()
    ids = service.submit(5, steps=1)
    service.wait(ids, status="queued")
    service.parts["light"].stop()
    lose_all_messages(field)
    service.start("light", "jobs")
    service.wait(ids)
    check(service)
    assert set(starts(service, ids).values()) == {1}


@pytest.mark.slow
def test_two_hundred_jobs_whose_messages_are_lost_again_and_again_all_end(on_servers):
    """F06, while they are worked on."""
    service = on_servers.service
    service.start("jobs-2")
    ids = service.submit(200, steps=1, seconds=0)
    while set(service.statuses(ids)) & {"validating_files", "queued"}:
        on_servers.redis.client().flushall()
        time.sleep(1)
    service.wait(ids)
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
def test_a_redis_that_is_frozen_past_every_timeout_delays_queued_jobs_alone(on_servers):
    """F08: for longer than any connection waits. A job runs on, requests stay fast; what waits begins soon after."""
    service, before = on_servers.service, pids(on_servers.service)
    (running,) = service.submit(steps=100, seconds=0.1)
    service.wait_for_step(running)
    with on_servers.redis.frozen():
        took, end = [], time.monotonic() + 45
        while time.monotonic() < end:
            began = time.monotonic()
            service.submit(steps=1)
            took.append(time.monotonic() - began)
            time.sleep(2)
        service.wait([running], seconds=1)
    service.wait(service.accepted[-len(took) :], seconds=BACK_SECONDS + 2 * len(took))
    check(service)
    assert sorted(took)[-2] < AT_ONCE_SECONDS  # one may meet the machine at something else
    assert pids(service) == before
    assert service.job(running).attempt == 1


@pytest.mark.slow
def test_a_line_to_redis_that_swallows_everything_is_found_dead(on_servers):
    """F09: within a minute, and jobs wait no longer for it."""
    service = on_servers.service
    with on_servers.to_redis.swallowing():
        ids = service.submit(2, steps=1)
        time.sleep(10)
    service.wait(ids, seconds=60)
    again = service.submit(2, steps=1)
    service.wait(again, seconds=BACK_SECONDS)
    check(service)


def full(client):
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", "1")


def without_replicas(client):
    client.config_set("min-replicas-to-write", "1")


def unable_to_save(client):
    """Its folder is not its own, so that its snapshots fail, and it takes no writes until one works."""
    client.config_set("save", "3600 1")
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")


def as_it_was(client):
    client.config_set("maxmemory", "0")
    client.config_set("min-replicas-to-write", "0")
    client.config_set("save", "")


@pytest.mark.slow
@pytest.mark.parametrize("refusing", [full, without_replicas, unable_to_save])
def test_a_redis_that_refuses_every_write_ends_no_worker_and_loses_no_job(on_servers, refusing):
    """F11: OOM, NOREPLICAS, MISCONF."""
    service, client = on_servers.service, on_servers.redis.client()
    before = pids(service)
    (running,) = service.submit(steps=60, seconds=0.1)
    service.wait_for_step(running)
    try:
        refusing(client)
        with pytest.raises(redis.ResponseError):
            client.set("a", "b")
        ids = service.submit(3, steps=1)
        service.wait([running])  # its worker asks for a message again
        time.sleep(3)
    finally:
        as_it_was(client)
    service.wait(ids, seconds=BACK_SECONDS)
    check(service)
    assert pids(service) == before
    assert set(starts(service, [running, *ids]).values()) == {1}


@pytest.mark.slow
def test_a_nudge_that_comes_fifty_times_starts_a_job_once(on_servers):
    """F12: doubled and in any order, to three workers that wake at once, while each word to the database takes so long
    that they all look before one of them has written."""
    service, client = on_servers.service, on_servers.redis.client()
    message = catch(service, client)
    service.start("jobs-2", "jobs-3")
    try:
        with ExitStack() as asleep:
            for name in ("jobs", "jobs-2", "jobs-3"):
                asleep.enter_context(service.parts[name].frozen())
            ids = service.submit(6, steps=3, seconds=0.05)
            service.wait(ids, status="queued")
            client.lpush("jobs", *[message] * 50)
            on_servers.to_postgres.delay = 0.25
        wait_until(lambda: set(starts(service, ids).values()) != {0})
        time.sleep(1)
    finally:
        on_servers.to_postgres.delay = 0.0
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


def celery_message(**headers):
    """One that Celery may have written, but for these headers."""
    known = {"task": "work", "id": "x", "lang": "py", "argsrepr": "()", "kwargsrepr": "{}", "origin": "x"}
    return json.dumps(
        {
            "body": "W1tdLCB7fSwge31d",
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {**known, **headers},
            "properties": {
                "delivery_tag": "z",
                "body_encoding": "base64",
                "delivery_info": {"exchange": "", "routing_key": "jobs"},
                "delivery_mode": 2,
                "priority": 0,
            },
        }
    ).encode()


NONSENSE = {
    "empty": b"",
    "torn": b'{"body": "W1tdLC',
    "not UTF-8": b"\xff\xfe",
    "a number": b"5",
    "a list": b"[]",
    "no properties": json.dumps({"body": "e30="}).encode(),
    "strange properties": json.dumps({"body": "e30=", "properties": 5}).encode(),
    "no delivery tag": json.dumps({"body": "e30=", "properties": {}, "headers": {}}).encode(),
    "nested without end": b"[" * 2000,
    "an unknown task": celery_message(task="rm"),
    "a time limit that is a number": celery_message(timelimit=5),
    "a time limit that is a word": celery_message(timelimit="x"),
    "an end of time": celery_message(expires=1e300),
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
    wait_until(lambda: not list((service.settings.broker_dir / "jobs").glob("0*0?-1.msg")))


@pytest.mark.slow
def test_workers_that_start_while_redis_is_away_do_what_waits_and_what_others_left(on_servers):
    """Nothing waits for a broker: the sweeps find it all, and whoever is idle takes it."""
    service = on_servers.service
    (left,) = service.submit(steps=20, seconds=0.1)
    service.wait_for_step(left)
    on_servers.redis.stop()
    for name in ("jobs", "light"):
        service.parts[name].kill()
        service.parts[name].start()
    waiting = service.submit(2)
    service.wait([left, *waiting])
    (cancelled,) = service.submit(steps=1000, seconds=0.1)
    service.wait_for_step(cancelled)
    with service.http as http:
        http.post(f"/v1/fine_tuning/jobs/{cancelled}/cancel").raise_for_status()
    service.wait([cancelled], status="cancelled")
    (drained,) = service.submit(steps=30, seconds=0.1)
    service.wait_for_step(drained)
    service.parts["jobs"].stop()
    service.parts["jobs"].start()
    service.wait([drained])
    on_servers.redis.start()
    service.wait(service.submit())
    check(service)
    assert service.job(drained).lost_count == 0


@pytest.mark.slow
def test_a_broker_folder_that_is_none_ends_no_worker_and_delays_jobs_by_a_sweep(on_files):
    service, before = on_files.service, pids(on_files.service)
    folders = [service.settings.broker_dir / queue for queue in ("jobs", "light")]
    for folder in folders:
        shutil.rmtree(folder)
        folder.write_text("no folder")
    service.wait(service.submit(2))
    for folder in folders:
        folder.unlink()
    service.wait(service.submit())
    check(service)
    assert pids(service) == before
