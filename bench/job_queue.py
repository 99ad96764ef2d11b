"""How soon a job starts, how many a database hands out, and how soon a killed worker's job goes on.

The yardstick is a bare Celery task on the same Redis in the same run: no database, nothing durable, a worker of one
thread. Ours is the service's own worker, with a step that trains nothing. Prints JSON lines:

    queue-start     from the commit of a queued job to the first line of its step, a process of its own behind the walls
                    that this machine offers, whose imports come after that line; on SQLite with the embedded broker and
                    on PostgreSQL with Redis; beside it, from the sending of a bare task to its first line
    queue-claims    jobs that 8 threads claim and end in a second, two transactions on disk for each, and how many were
                    claimed twice; beside it, the bare tasks that a worker does in a second of those that wait for it,
                    of which nothing is kept
    queue-recovery  from the SIGKILL of a worker to the first line of the next attempt's step, with the intervals of a
                    test and, once, with the defaults. A bare task whose worker is killed is lost where it was
                    acknowledged early, which is Celery's default, and otherwise comes back after Redis's visibility
                    timeout, an hour by default

    python bench/job_queue.py
    python bench/job_queue.py --starts 3 --jobs 100 --recoveries 1 --quick    # does the bench itself work?
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from shutil import rmtree
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from celery import Celery  # noqa: E402
from sqlalchemy import select  # noqa: E402

from core import jobs  # noqa: E402
from core.celery_app import make_celery  # noqa: E402
from core.config import Settings  # noqa: E402
from core.db import Database  # noqa: E402
from core.errors import Cause  # noqa: E402
from core.models import Job, Team  # noqa: E402
from tests.core.test_jobs import make_spec  # noqa: E402
from tests.faults.faults import PostgresServer, RedisServer, Service, run_faulty  # noqa: E402
from tests.servers import die_with_parent, wait_until  # noqa: E402

CLAIMERS = 8
OVER = Cause(code="over", message="It was a bench.")
#: Fewer than core/messages.py lets wait, whose transport the sender in this process has too.
TASKS = 900
#: Of recoveries that are measured more than once.
SHORT = {"lease_seconds": "4", "beat_seconds": "0.4", "sweep_seconds": "0.5"}
DEFAULTS = {name: str(Settings.model_fields[name].default) for name in SHORT}

BARE = """
import sys, time
from celery import Celery

app = Celery("bare", broker=sys.argv[1])
app.conf.update(task_ignore_result=True, worker_enable_remote_control=False, worker_prefetch_multiplier=1)

@app.task(name="note")
def note(path):
    now = time.monotonic()
    with open(path, "a") as file:
        file.write(f"{now}\\n")

@app.task(name="nothing")
def nothing():
    pass

app.worker_main(["worker", "--pool=threads", "--concurrency=1", "--queues=bare", "--without-gossip",
                 "--without-mingle", "--without-heartbeat", "--loglevel=error"])
"""


class Bare:
    """A bare Celery worker, and the way to send it something."""

    def __init__(self, url: str, folder: Path) -> None:
        self.notes = folder / "notes"
        self.notes.touch()
        self.app = Celery("bare-sender", broker=url, set_as_current=False)
        self.process = subprocess.Popen(
            [sys.executable, "-c", BARE, url],
            preexec_fn=die_with_parent(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def send(self, name: str, *arguments: str) -> None:
        self.app.send_task(name, args=arguments, queue="bare", ignore_result=True)

    def start_seconds(self) -> float:
        """From the sending of a task to its first line."""
        known = len(self.notes.read_text().splitlines())
        began = time.monotonic()
        self.send("note", str(self.notes))
        wait_until(lambda: len(self.notes.read_text().splitlines()) > known, every=0.001)
        return float(self.notes.read_text().splitlines()[-1]) - began

    def tasks_per_second(self, number: int) -> float:
        """Of tasks that were all sent before it may take the first."""
        known = len(self.notes.read_text().splitlines())
        self.process.send_signal(signal.SIGSTOP)
        for _ in range(number):
            self.send("nothing")
        self.send("note", str(self.notes))
        began = time.monotonic()
        self.process.send_signal(signal.SIGCONT)
        wait_until(lambda: len(self.notes.read_text().splitlines()) > known, seconds=120, every=0.001)
        return (number + 1) / (float(self.notes.read_text().splitlines()[-1]) - began)


# --- jobs without models ----------------------------------------------------------------------------------------------


def queue_jobs(database: Database, number: int, **labels: str) -> list[str]:
    """So many queued jobs, in one transaction."""
    with database.writing() as session:
        team_id = session.scalars(select(Team.id).limit(1)).one()
        ids = []
        for _ in range(number):
            request = {"pair": {"name": "tiny"}, "hyperparameters": {}, "shadow": {"evaluation": {"probes": {}}}}
            job = Job(team_id=team_id, kind="fine_tune", model="tiny", training_file_id="file-1", seed=1,
                      request=request, labels=labels)  # fmt: skip
            ids.append(jobs.create(session, job).id)
            jobs.admit(session, ids[-1], make_spec(ids[-1]), memory_bytes=0)
        session.commit()
    return ids


def start_seconds(service: Service, nudge: Callable[[], None]) -> float:
    """From the commit to the first line of the step."""
    (job_id,) = queue_jobs(service.database, 1, steps="1", seconds="0")
    began = time.monotonic()
    nudge()
    service.wait([job_id])
    return first_line(service, job_id, 1) - began


def first_line(service: Service, job_id: str, attempt: int) -> float:
    return float((service.data_dir / "toys" / "starts" / f"{job_id}-{attempt}").read_text())


def claims(database: Database, number: int) -> dict[str, Any]:
    ids = queue_jobs(database, number)
    claimed: list[str] = []

    def claim_all(worker: int) -> None:
        while True:
            with database.writing() as session:
                claim = jobs.claim_next(session, worker_id=f"w{worker}", lane_memory_bytes=1, lease_seconds=600)
                session.commit()
            if claim is None:
                return
            claimed.append(claim.job_id)
            with database.writing() as session:
                jobs.fail(session, claim, OVER)
                session.commit()

    threads = [threading.Thread(target=claim_all, args=(number,)) for number in range(CLAIMERS)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    twice = sum(count - 1 for count in Counter(claimed).values())
    assert set(ids) <= set(claimed)
    return {"claims_per_s": round(len(claimed) / took), "claimed_twice": twice}


def recovery_seconds(service: Service) -> float:
    (job_id,) = queue_jobs(service.database, 1, steps="1000", seconds="0.05")
    service.wait_for_step(job_id, 3)
    killed = time.monotonic()
    service.parts["jobs"].kill()
    service.start("jobs")
    wait_until(lambda: (service.data_dir / "toys" / "starts" / f"{job_id}-2").exists(), seconds=150, every=0.01)
    took = first_line(service, job_id, 2) - killed
    with service.database.writing() as session:
        jobs.request_cancel(session, job_id)
        session.commit()
    service.wait([job_id])
    return took


# --- the benches ------------------------------------------------------------------------------------------------------


def told(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median_ms": round(statistics.median(ordered) * 1000, 1),
        "p95_ms": round(ordered[max(0, round(len(ordered) * 0.95) - 1)] * 1000, 1),
    }


def say(bench: str, **figures: Any) -> None:
    print(json.dumps({"bench": bench, **figures}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--recoveries", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="without the recovery that takes a minute or more")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="shadowft-bench-"))
    with ExitStack() as stack:
        stack.callback(rmtree, folder, ignore_errors=True)
        postgres, redis = PostgresServer(), RedisServer()
        stack.callback(postgres.close)
        stack.callback(redis.close)
        postgres.start()
        redis.start()
        bare = Bare(f"{redis.url_at(redis.port)[:-1]}1", folder)
        stack.callback(bare.process.kill)
        bare.start_seconds()
        with run_faulty(folder / "files", sandbox="auto") as service:
            bench_starts(service, "sqlite, embedded", bare, asked.starts)
        urls = {"database_url": postgres.url_at(postgres.port), "broker_url": redis.url_at(redis.port)}
        with run_faulty(folder / "servers", **urls, **SHORT, sandbox="auto") as service:
            bench_starts(service, "postgresql, redis", bare, asked.starts)
            bench_recovery(service, asked.recoveries, SHORT)
        if not asked.quick:
            with run_faulty(folder / "defaults", **DEFAULTS, sandbox="auto") as service:
                service.start("jobs")
                bench_recovery(service, 1, DEFAULTS)
        bench_claims(folder, postgres, bare, asked.jobs)


def nudger(service: Service) -> Callable[[], None]:
    """As the API nudges, whose settings this process has not."""
    app = make_celery(service.settings)
    return lambda: app.send_task("work", queue="jobs", retry=False, ignore_result=True)


def bench_starts(service: Service, place: str, bare: Bare, number: int) -> None:
    nudge = nudger(service)
    service.start("jobs")
    start_seconds(service, nudge)
    ours, theirs = [], []
    for _ in range(number):
        ours.append(start_seconds(service, nudge))
        theirs.append(bare.start_seconds())
    ratio = round(statistics.median(ours) / statistics.median(theirs), 1)
    say("queue-start", on=place, starts=number, ours=told(ours), bare_celery_task=told(theirs), ratio=ratio)


def bench_recovery(service: Service, number: int, settings: dict[str, str]) -> None:
    took = [recovery_seconds(service) for _ in range(number)]
    say(
        "queue-recovery",
        recoveries=number,
        seconds=[round(one, 2) for one in took],
        settings={name: float(value) for name, value in settings.items()},
        bare_celery_task="lost",
    )


def bench_claims(folder: Path, postgres: PostgresServer, bare: Bare, number: int) -> None:
    rate = bare.tasks_per_second(min(number, TASKS))
    for name in ("sqlite", "postgresql"):
        url = postgres.url_at(postgres.port) if name == "postgresql" else ""
        if url:
            postgres.execute("DROP SCHEMA public CASCADE")
            postgres.execute("CREATE SCHEMA public")
        with run_faulty(folder / name, database_url=url) as service:
            found = claims(service.database, number)
        say(
            "queue-claims",
            database=name,
            jobs=number,
            threads=CLAIMERS,
            **found,
            bare_celery_tasks_per_s=round(rate),
            ratio=round(found["claims_per_s"] / rate, 4),
        )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
