"""Some hundred jobs on several workers while something dies every few seconds: `make soak MINUTES=10`.

For each of the four settings (SQLite or PostgreSQL, embedded broker or Redis) a service is started whose jobs are toys.
Jobs are submitted over HTTP all the time; every few seconds a worker is killed or frozen or told to go, the API is
killed, the broker is emptied, killed or frozen, PostgreSQL crashes, a child is killed. Then the checker looks. Each
setting prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import select

from core.models import Job
from tests.faults.checker import check
from tests.faults.faults import (
    TERMINAL,
    Part,
    PostgresServer,
    RedisServer,
    Service,
    freeze_outside_of_writing,
    run_faulty,
)

WORKERS = ("jobs", "jobs-2", "jobs-3")
#: From one fault to the next.
FAULT_SECONDS = (2.0, 6.0)
#: A frozen worker sleeps past its lease, so that another one has its job when it wakes.
FROZEN_SECONDS = 6.0


class Soak:
    def __init__(self, service: Service, postgres: PostgresServer | None, redis: RedisServer | None, seed: int) -> None:
        self.service, self.postgres, self.redis = service, postgres, redis
        self.random = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.refused = 0
        self.slowest_recovery = 0.0
        self.over = threading.Event()
        self.lock = threading.Lock()

    # --- load -----------------------------------------------------------------------------------------------------

    def submit_until_over(self) -> None:
        number = 0
        while not self.over.wait(self.random.uniform(0.1, 0.8)):
            number += 1
            steps = self.random.choice((3, 10, 30))
            self.submit_until_heard(f"job {number}", steps)

    def submit_until_heard(self, key: str, steps: int) -> None:
        """As a client does that wants its job: again with the same key until there is an answer."""
        while True:
            try:
                self.service.submit(key=key, steps=steps, seconds=0.05)
                return
            except (httpx.TransportError, httpx.HTTPStatusError):
                self.refused += 1
                time.sleep(0.3)

    # --- faults ---------------------------------------------------------------------------------------------------

    def faulty_until_over(self) -> None:
        acts = [
            self.kill_worker,
            self.freeze_worker,
            self.drain_worker,
            self.kill_api,
            self.kill_child,
            self.kill_light,
        ]
        acts += [self.lose_messages]
        acts += [self.kill_redis, self.freeze_redis] if self.redis else []
        acts += [self.crash_postgres] if self.postgres else []
        while not self.over.wait(self.random.uniform(*FAULT_SECONDS)):
            act = self.random.choice(acts)
            self.faults[act.__name__] += 1
            began = time.monotonic()
            act()
            self.wait_for_progress()
            self.slowest_recovery = max(self.slowest_recovery, time.monotonic() - began)

    def wait_for_progress(self) -> None:
        """Until a toy makes a step again, where there is any work."""
        known = len(self.service.diary())
        end = time.monotonic() + 60
        while time.monotonic() < end and len(self.service.diary()) == known:
            if self.over.is_set() or not self.live():
                return
            time.sleep(0.05)

    def live(self) -> list[str]:
        with self.service.database.reading() as session:
            return list(session.scalars(select(Job.id).where(Job.status.not_in(TERMINAL))))

    def worker(self) -> Part:
        return self.service.parts[self.random.choice(WORKERS)]

    def again(self, part: Part) -> None:
        self.service.start(part.name)

    def kill_worker(self) -> None:
        part = self.worker()
        part.kill()
        self.again(part)

    def freeze_worker(self) -> None:
        part = self.worker()
        freeze_outside_of_writing(part, self.service.settings)
        time.sleep(FROZEN_SECONDS)
        part.signal(signal.SIGCONT)

    def drain_worker(self) -> None:
        part = self.worker()
        part.stop(60)
        self.again(part)

    def kill_light(self) -> None:
        part = self.service.parts["light"]
        part.kill()
        self.again(part)

    def kill_api(self) -> None:
        part = self.service.parts["api"]
        part.kill()
        self.again(part)

    def kill_child(self) -> None:
        """As the kernel does for want of memory; the fourth time that it meets the same job, it fails."""
        children = self.service.children()
        with suppress(Exception):
            self.random.choice(children).kill()

    def lose_messages(self) -> None:
        if self.redis:
            self.redis.client().flushall()
        else:
            shutil.rmtree(self.service.settings.broker_dir, ignore_errors=True)

    def kill_redis(self) -> None:
        assert self.redis is not None
        self.redis.stop()
        time.sleep(1)
        self.redis.start()

    def freeze_redis(self) -> None:
        assert self.redis is not None
        with self.redis.frozen():
            time.sleep(4)

    def crash_postgres(self) -> None:
        assert self.postgres is not None
        self.postgres.crash()
        time.sleep(0.5)
        self.postgres.start()

    # --- the whole ------------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> dict[str, Any]:
        self.service.start("api", "light", *WORKERS)
        threads = [threading.Thread(target=act) for act in (self.submit_until_over, self.faulty_until_over)]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        self.over.set()
        for thread in threads:
            thread.join()
        began = time.monotonic()
        self.service.wait(self.service.accepted, seconds=300)
        drained = time.monotonic() - began
        problems = ""
        try:
            check(self.service)
        except AssertionError as error:
            problems = str(error)[:2000]
        return self.figures(drained, problems)

    def figures(self, drained: float, problems: str) -> dict[str, Any]:
        with self.service.database.reading() as session:
            rows = session.execute(select(Job.id, Job.status, Job.attempt)).all()
        ended = Counter(row.status for row in rows)
        return {
            "submitted": len(self.service.accepted),
            "succeeded": ended["succeeded"],
            "failed": ended["failed"],
            "lost": len(set(self.service.accepted) - {row.id for row in rows}),
            "doubled": len(rows) - len(set(self.service.accepted)),
            "attempts": sum(row.attempt for row in rows),
            "faults": sum(self.faults.values()),
            "faults_by_kind": dict(self.faults),
            "tries_of_clients_refused": self.refused,
            "slowest_recovery_s": round(self.slowest_recovery, 1),
            "queue_drained_s": round(drained, 1),
            "checker": problems or "clean",
        }


def soak(database: str, broker: str, seconds: float, seed: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="shadowft-soak-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        postgres = PostgresServer() if database == "postgresql" else None
        redis = RedisServer() if broker == "redis" else None
        urls = {}
        if postgres:
            stack.callback(postgres.close)
            postgres.start()
            urls["database_url"] = postgres.url_at(postgres.port)
        if redis:
            stack.callback(redis.close)
            redis.start()
            urls["broker_url"] = redis.url_at(redis.port)
        patient = {"save_seconds": "0.5", "max_lost_workers": "100", "max_infra_retries": "100"}
        service = stack.enter_context(run_faulty(folder / "data", **urls, **patient))
        found = Soak(service, postgres, redis, seed).run(seconds)
    return {"soak": f"{database}, {broker}", "seconds": seconds, "seed": seed, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="in all, over the four settings")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2)))
    parser.add_argument("--only", help="one setting, as `sqlite,embedded`")
    asked = parser.parse_args()
    settings = [(database, broker) for database in ("sqlite", "postgresql") for broker in ("embedded", "redis")]
    settings = [tuple(asked.only.split(","))] if asked.only else settings
    clean = True
    for database, broker in settings:
        line = soak(database, broker, asked.minutes * 60 / len(settings), asked.seed)
        print(json.dumps(line), flush=True)  # noqa: T201
        clean &= line["checker"] == "clean" and not line["lost"] and not line["doubled"]
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
