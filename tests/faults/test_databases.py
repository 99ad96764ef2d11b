"""A database that dies, is slow, is mute, is full of connections, or whose lock somebody took into a deep sleep."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import select

from core.models import Job
from tests.faults.checker import check
from tests.faults.faults import INTERVALS, ROOT, Proxy, can_write, run_faulty
from tests.servers import HOST, die_with_parent, wait_until

#: They share their services.
pytestmark = pytest.mark.xdist_group("faults")

#: No request that cannot be answered just now waits for longer.
FAST_SECONDS = 10.0
#: Requests at once: more than the API has connections, and less than it has threads.
MANY = 25


# --- PostgreSQL that dies ---------------------------------------------------------------------------------------------


def test_a_database_that_dies_in_the_middle_of_a_job_and_comes_back_in_time_costs_nothing(on_servers):
    """F31: shorter than a lease. Meanwhile the API says that it cannot, and no half job comes of it."""
    service, postgres = on_servers.service, on_servers.postgres
    service.submit()
    (job_id,) = service.submit(steps=40, seconds=0.1)
    service.wait_for_step(job_id, 3)
    began = time.monotonic()
    postgres.crash()
    assert service.try_to_submit() == 503
    postgres.start()
    in_time = time.monotonic() - began < float(INTERVALS["LEASE_SECONDS"]) / 2
    service.wait([job_id])
    wait_until(lambda: service.try_to_submit() == 200)
    service.wait(service.accepted)
    check(service)
    assert service.statuses([job_id]) == ["succeeded"]
    job = service.job(job_id)
    assert (job.lost_count, job.infra_retries) == (0, 0)
    assert job.attempt == 1 or not in_time  # a crowded machine may not be done before the lease is


@pytest.mark.slow
def test_a_database_that_is_away_for_longer_than_a_lease_costs_an_attempt_and_no_more(on_servers):
    """F31: nobody can renew a lease, so the child ends itself, and the job goes on elsewhere afterwards."""
    service, postgres = on_servers.service, on_servers.postgres
    (job_id,) = service.submit(steps=80, seconds=0.1)
    service.wait_for_step(job_id, 3)
    postgres.crash()
    time.sleep(service.settings.lease_seconds + 3)
    assert service.children() == []
    postgres.start()
    service.wait([job_id])
    check(service)
    assert service.statuses([job_id]) == ["succeeded"]
    assert service.job(job_id).attempt == 2


@pytest.mark.slow
def test_a_database_that_dies_every_few_seconds_loses_no_job(on_servers):
    """F32, for a minute."""
    service, postgres = on_servers.service, on_servers.postgres
    service.start("jobs-2")
    service.submit()
    ended = threading.Event()

    def go_on_submitting():
        while not ended.wait(1):
            service.try_to_submit()

    submitting = threading.Thread(target=go_on_submitting)
    submitting.start()
    for _ in range(8):
        time.sleep(6)
        postgres.crash()
        time.sleep(0.5)
        postgres.start()
    ended.set()
    submitting.join()
    service.wait(service.accepted, seconds=180)
    check_but_unheard(service)


def check_but_unheard(service):
    """A commit whose answer was lost made a job that nobody was told of: that is what idempotency keys are for."""
    with service.database.reading() as session:
        service.accepted = list(session.scalars(select(Job.id)))
    service.wait(service.accepted)
    check(service)


@pytest.mark.slow
def test_a_slow_database_costs_no_lease(on_servers, tmp_path):
    """F33: every word to it takes two seconds, and the training writes figures all the time."""
    on_servers.postgres.execute("CREATE DATABASE slow")
    line = Proxy(on_servers.postgres.port)
    url = on_servers.postgres.url_at(line.port).removesuffix("postgres") + "slow"
    patient = {"lease_seconds": "60", "beat_seconds": "10", "sweep_seconds": "3", "save_seconds": "10"}
    with closing(line), run_faulty(tmp_path / "data", database_url=url, **patient) as service:
        service.start("api", "light", "jobs")
        (job_id,) = service.submit(steps=300, seconds=0.2)
        service.wait_for_step(job_id)
        line.delay = 2.0
        time.sleep(1.5 * float(patient["lease_seconds"]))  # one that nobody renewed meanwhile would have ended
        line.delay = 0.0
        service.wait([job_id], seconds=90)
        check(service)
        assert (service.job(job_id).attempt, service.statuses([job_id])) == (1, ["succeeded"])


@pytest.mark.slow
def test_a_line_to_the_database_that_swallows_everything_is_found_dead(on_servers):
    """Half-open: no error, no answer. What was sent is given up after fifteen seconds, and the job goes on."""
    service = on_servers.service
    (job_id,) = service.submit(steps=100, seconds=0.1)
    service.wait_for_step(job_id, 3)
    with on_servers.to_postgres.swallowing():
        time.sleep(5)
    on_servers.to_postgres.cut()
    service.wait([job_id], seconds=120)
    check_but_unheard(service)
    assert service.statuses([job_id]) == ["succeeded"]


@pytest.mark.slow
def test_connections_that_are_all_taken_make_requests_fail_fast_and_no_job_fail(on_servers):
    """F34: those of the server."""
    service, postgres = on_servers.service, on_servers.postgres
    (job_id,) = service.submit(steps=40, seconds=0.1)
    service.wait_for_step(job_id)
    taken = []
    try:
        with suppress(psycopg.OperationalError):
            while True:
                taken.append(psycopg.connect(host=HOST, port=postgres.port, user="postgres", dbname="postgres"))
        began = time.monotonic()
        assert service.try_to_submit() in {200, 503}
        assert time.monotonic() - began < FAST_SECONDS
        service.wait([job_id])
    finally:
        for connection in taken:
            connection.close()
    check(service)
    assert service.job(job_id).attempt == 1


@pytest.mark.slow
def test_requests_beyond_the_apis_connections_are_refused_fast_while_the_others_wait(on_servers):
    """F34: those of the API. Somebody holds a table that no worker reads, so that whoever asks for it waits with his
    connection."""
    service, postgres = on_servers.service, on_servers.postgres
    (job_id,) = service.submit(steps=200, seconds=0.1)
    service.wait_for_step(job_id)

    def ask(_):
        with service.http as http:
            began = time.monotonic()
            return http.get("/v1/pairs").status_code, time.monotonic() - began

    holder = psycopg.connect(host=HOST, port=postgres.port, user="postgres", dbname="postgres")
    with closing(holder), ThreadPoolExecutor(MANY) as pool:
        holder.execute("LOCK TABLE pair IN ACCESS EXCLUSIVE MODE")
        asked = [pool.submit(ask, number) for number in range(MANY)]
        refused = [one.result() for one in wait(asked, timeout=FAST_SECONDS).done]
        holder.rollback()
        heard = [one.result() for one in asked if one.result() not in refused]
    assert {status for status, _ in refused} == {503}
    assert {status for status, _ in heard} == {200}
    service.wait([job_id])
    check(service)
    assert service.job(job_id).attempt == 1


# --- clocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("clock", ["+1h", "-1h"])
def test_processes_whose_clocks_are_an_hour_from_the_databases_lose_no_lease_and_take_none(on_servers, clock):
    """F37: leases are compared by the database's clock alone."""
    service, postgres = on_servers.service, on_servers.postgres
    service.submit()
    service.start("jobs-2")
    service.wait(service.accepted)
    postgres.crash()
    postgres.start(clock=clock)
    try:
        wait_until(lambda: service.try_to_submit() == 200)
        ids = service.submit(4, steps=30, seconds=0.1)
        service.wait(ids)
        check(service)
        assert set(service.statuses(ids)) == {"succeeded"}
        assert {service.job(job_id).attempt for job_id in ids} == {1}
    finally:
        postgres.crash()
        postgres.start()


# --- locks ------------------------------------------------------------------------------------------------------------


@contextmanager
def frozen_in_a_write(service, job_id, *, limit_seconds):
    """A process that sleeps in the middle of changing the job's row."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.hold_lock", job_id, str(limit_seconds)],
        cwd=ROOT,
        env=service.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent(signal.SIGKILL),
    )
    assert process.stdout.readline() == b"holds\n"
    wait_until(lambda: process_state(process.pid) == "T")
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def process_state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.slow
def test_a_process_frozen_in_a_write_on_postgresql_loses_its_locks_and_its_write(on_servers):
    """Its session is ended, so that the row is free for others; when it wakes, its commit fails."""
    service = on_servers.service
    (job_id,) = service.submit(steps=1000, seconds=0.1)
    service.wait_for_step(job_id)
    with frozen_in_a_write(service, job_id, limit_seconds=1) as process:
        before = service.job(job_id).version
        wait_until(lambda: service.job(job_id).version > before)  # others write to the row again
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == b""
        assert process.wait(20) != 0
    with service.http as http:
        http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
    service.wait([job_id])
    check(service)
    assert service.job(job_id).trained_tokens != 13


@pytest.mark.slow
def test_a_process_frozen_in_a_write_on_sqlite_holds_up_writers_until_it_is_ended_and_no_reader(on_files):
    """Nobody can take SQLite's lock from a living process: writes are refused in time, and reads are answered."""
    service = on_files.service
    (done,) = service.submit(steps=1)
    service.wait([done])
    with frozen_in_a_write(service, done, limit_seconds=1):
        assert not can_write(service.settings.data_dir / "shadowft.db")
        began = time.monotonic()
        assert service.try_to_submit() == 503
        assert time.monotonic() - began < 25
        with service.http as http:
            assert http.get(f"/v1/fine_tuning/jobs/{done}").status_code == 200
    wait_until(lambda: service.try_to_submit() == 200)
    service.wait(service.accepted)
    check(service)
    assert service.job(done).trained_tokens == 1


@pytest.mark.slow
def test_a_write_lock_that_is_held_for_long_delays_jobs_and_halves_none(on_files):
    """F35."""
    service = on_files.service
    (job_id,) = service.submit(steps=60, seconds=0.1)
    service.wait_for_step(job_id)
    with closing(sqlite3.connect(service.settings.data_dir / "shadowft.db", isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        assert service.try_to_submit() == 503
        time.sleep(15)
        connection.execute("ROLLBACK")
    service.wait([job_id])
    check(service)
    assert service.statuses([job_id]) == ["succeeded"]
