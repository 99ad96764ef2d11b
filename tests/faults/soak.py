"""Some hundred jobs on several workers while something dies every few seconds: `make soak MINUTES=10`.

For each of the four settings (SQLite or PostgreSQL, embedded broker or Redis) a service is started whose jobs are toys.
Jobs are submitted over HTTP all the time; every few seconds something befalls the service, each kind of fault before
one of them comes again. Then the checker looks. Each setting prints one line of JSON; the exit status is 0 where all of
them are clean: nothing lost or doubled, no job that ended otherwise than its owner or a fault explains, no kind of
fault left out, no thread of this program dead.
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
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update

from core.celery_app import NUDGE_TIMEOUT_SECONDS
from core.models import Job
from tests.faults.checker import check
from tests.faults.faults import (
    TERMINAL,
    Part,
    PostgresServer,
    Proxy,
    RedisServer,
    Service,
    fill,
    freeze_outside_of_writing,
    run_faulty,
    small_disk,
)
from tests.servers import wait_until

WORKERS = ("jobs", "jobs-2", "jobs-3")
#: From one fault to the next.
FAULT_SECONDS = (1.0, 4.0)
#: A frozen worker sleeps past its lease, so that another one has its job when it wakes.
FROZEN_SECONDS = 6.0
#: A frozen Redis is mute for longer than a nudge waits for it.
REDIS_SECONDS = 2 * NUDGE_TIMEOUT_SECONDS
#: A line swallows, and a disk is full, for several beats, sweeps and saved states.
FAULT_LASTS_SECONDS = 2.0
#: Room for all that the jobs of one setting keep, and little more.
DISK = "256m"
#: What a job may fail of here: of children that were killed, as the kernel does for want of memory.
EXPECTED = {"step_killed"}


class Soak:
    def __init__(
        self,
        service: Service,
        postgres: PostgresServer | None,
        redis: RedisServer | None,
        lines: list[Proxy],
        disk: Path | None,
        seed: int,
    ) -> None:
        self.service, self.postgres, self.redis, self.lines, self.disk = service, postgres, redis, lines, disk
        self.random = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.refused = 0
        #: Jobs whose owner had them wait or end.
        self.paused: set[str] = set()
        self.cancelled: set[str] = set()
        self.over = threading.Event()
        #: What must not have happened.
        self.trouble: list[str] = []

    # --- load -----------------------------------------------------------------------------------------------------

    def submit_until_over(self) -> None:
        number = 0
        while not self.over.wait(self.random.uniform(0.1, 0.8)):
            number += 1
            steps = self.random.choice((3, 10, 30))
            self.until_heard(
                lambda key=f"job {number}", steps=steps: self.service.submit(key=key, steps=steps, seconds=0.05)
            )  # type: ignore[misc]

    def until_heard(self, ask: Callable[[], Any]) -> Any:
        """As a client does that wants an answer: again until there is one."""
        while True:
            try:
                return ask()
            except httpx.TransportError:
                self.refused += 1
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in (503, 507):
                    raise
                self.refused += 1
            time.sleep(0.3)

    def post(self, job_id: str, verb: str) -> dict[str, Any] | None:
        """None where the job's state forbids it."""

        def ask() -> dict[str, Any] | None:
            with self.service.http as http:
                answer = http.post(f"/v1/fine_tuning/jobs/{job_id}/{verb}")
            if answer.status_code == 409:
                return None
            found: dict[str, Any] = answer.raise_for_status().json()
            return found

        return self.until_heard(ask)

    # --- faults ---------------------------------------------------------------------------------------------------

    @property
    def acts(self) -> list[Callable[[], None]]:
        acts = [self.kill_worker, self.freeze_worker, self.drain_worker, self.kill_light, self.kill_api]
        acts += [self.kill_api_at_a_commit, self.kill_child, self.lose_messages]
        acts += [self.pause_a_job, self.cancel_a_job, self.run_a_job_again]
        acts += [self.kill_redis, self.freeze_redis] if self.redis else []
        acts += [self.crash_postgres] if self.postgres else []
        acts += [self.cut_lines, self.swallow] if self.lines else []
        return acts + ([self.fill_the_disk] if self.disk else [])

    def in_turn(self) -> Iterator[Callable[[], None]]:
        while True:
            yield from self.random.sample(self.acts, len(self.acts))

    def be_faulty(self, seconds: float) -> None:
        """On a slow machine longer, until each kind of fault has come once."""
        began = time.monotonic()
        for act in self.in_turn():
            if self.over.wait(self.random.uniform(*FAULT_SECONDS)):
                return
            passed = time.monotonic() - began
            if passed > seconds and (not self.left_out() or passed > 3 * seconds):
                return
            act()
            self.faults[act.__name__] += 1

    def worker(self) -> Part:
        return self.service.parts[self.random.choice(WORKERS)]

    def some_job(self, *states: str) -> str | None:
        with self.service.database.reading() as session:
            found = list(session.scalars(select(Job.id).where(Job.status.in_(states)).order_by(Job.id)))
        return self.random.choice(found) if found else None

    def kill_worker(self) -> None:
        part = self.worker()
        part.kill()
        self.service.start(part.name)

    def freeze_worker(self) -> None:
        part = self.worker()
        freeze_outside_of_writing(part, self.service.settings)
        time.sleep(FROZEN_SECONDS)
        part.signal(signal.SIGCONT)

    def drain_worker(self) -> None:
        part = self.worker()
        part.stop(60)
        self.service.start(part.name)

    def kill_light(self) -> None:
        self.service.parts["light"].kill()
        self.service.start("light")

    def kill_api(self) -> None:
        self.service.parts["api"].kill()
        self.service.start("api")

    def kill_api_at_a_commit(self) -> None:
        """Of the next job that is submitted, where another one is."""
        order, api = self.service.data_dir / "die-at-commit", self.service.parts["api"]
        order.write_text(self.random.choice(("before", "after")))
        wait_until(lambda: self.over.is_set() or not api.is_alive(), seconds=60)
        order.unlink(missing_ok=True)
        time.sleep(0.5)  # it may just be about to
        if not api.is_alive():
            self.service.start("api")

    def kill_child(self) -> None:
        """As the kernel does for want of memory; the fourth time that it meets the same job, it fails."""
        children = self.service.children()
        with suppress(IndexError, OSError):
            os.kill(self.random.choice(children).pid, signal.SIGKILL)

    def lose_messages(self) -> None:
        if self.redis:
            self.redis.client().flushall()
        else:
            shutil.rmtree(self.service.settings.broker_dir, ignore_errors=True)

    def pause_a_job(self) -> None:
        job_id = self.some_job("running", "queued")
        if job_id is not None and self.post(job_id, "pause"):
            self.paused.add(job_id)
            time.sleep(self.random.uniform(0, 3))
            self.post(job_id, "resume")

    def cancel_a_job(self) -> None:
        job_id = self.some_job("running", "queued", "validating_files")
        if job_id is not None and self.post(job_id, "cancel"):
            self.cancelled.add(job_id)

    def run_a_job_again(self) -> None:
        job_id = self.some_job("failed", "cancelled")
        again = self.post(job_id, "retry") if job_id else None
        if again:
            self.service.accepted.append(again["id"])
            self.paused.add(again["id"])  # it may go on from another's state

    def kill_redis(self) -> None:
        assert self.redis is not None
        self.redis.stop()
        time.sleep(1)
        self.redis.start()

    def freeze_redis(self) -> None:
        assert self.redis is not None
        with self.redis.frozen():
            time.sleep(REDIS_SECONDS)

    def crash_postgres(self) -> None:
        assert self.postgres is not None
        self.postgres.crash()
        time.sleep(0.5)
        self.postgres.start()

    def cut_lines(self) -> None:
        for line in self.lines:
            line.cut()

    def swallow(self) -> None:
        line = self.random.choice(self.lines)
        with line.swallowing():
            time.sleep(FAULT_LASTS_SECONDS)

    def fill_the_disk(self) -> None:
        """On SQLite the database's, too."""
        assert self.disk is not None
        ballast = fill(self.disk)
        time.sleep(FAULT_LASTS_SECONDS)
        ballast.unlink()

    # --- the whole ------------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> dict[str, Any]:
        self.service.start("api", "light", *WORKERS)
        submitter = threading.Thread(target=self.guarded, args=(self.submit_until_over,))
        submitter.start()
        # Not in a thread of its own: what it starts dies with the thread that started it.
        self.guarded(lambda: self.be_faulty(seconds))
        self.over.set()
        submitter.join()
        began = time.monotonic()
        self.guarded(self.wait_for_all)
        drained = time.monotonic() - began
        self.guarded(lambda: check(self.service))
        self.judge()
        return self.figures(drained)

    def guarded(self, act: Callable[[], None]) -> None:
        """What it raises is the soak's trouble, and its end."""
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - a failed wait is none of Exception's kind
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.trouble.append(f"{type(error).__name__} at {where.name}:{where.lineno}: {str(error)[:2000]}")
            self.over.set()

    def wait_for_all(self) -> None:
        """What waits for another try has it at once."""

        def all_have_ended() -> bool:
            with self.service.database.writing() as session:
                session.execute(update(Job).where(Job.status == "queued").values(not_before=None))
                session.commit()
            return set(self.service.statuses(self.service.accepted)) <= TERMINAL

        wait_until(all_have_ended, seconds=300, every=0.5)

    def judge(self) -> None:
        with self.service.database.reading() as session:
            rows = {row.id: row for row in session.execute(select(Job.id, Job.status, Job.error))}
        failed = {job_id: row.error["code"] for job_id, row in rows.items() if row.status == "failed"}
        strange = {job_id: code for job_id, code in failed.items() if code not in EXPECTED}
        cancelled = {job_id for job_id, row in rows.items() if row.status == "cancelled"}
        verdicts = {
            f"failed of what nobody did: {strange}": strange,
            f"cancelled by nobody: {cancelled - self.cancelled}": cancelled - self.cancelled,
            f"cancelled and ended otherwise: {self.cancelled - cancelled}": self.cancelled - cancelled,
            f"faults that never came: {self.left_out()}": self.left_out(),
            "not even half of the jobs succeeded": 2 * (len(rows) - len(failed) - len(cancelled)) < len(rows),
        }
        self.trouble += [sentence for sentence, is_so in verdicts.items() if is_so]

    def left_out(self) -> set[str]:
        return {act.__name__ for act in self.acts} - set(self.faults)

    def recoveries(self) -> list[float]:
        """Of each attempt that another one followed: from its last step to the first one of that other."""
        moments: dict[tuple[str, int], list[float]] = {}
        for entry in self.service.diary():
            if entry.job not in self.paused:
                moments.setdefault((entry.job, entry.attempt), []).append(entry.moment)
        pairs = pairwise(sorted(moments))
        return [moments[after][0] - moments[before][-1] for before, after in pairs if before[0] == after[0]]

    def figures(self, drained: float) -> dict[str, Any]:
        with self.service.database.reading() as session:
            rows = session.execute(select(Job.id, Job.status, Job.attempt, Job.error)).all()
        ended, took = Counter(row.status for row in rows), self.recoveries()
        return {
            "submitted": len(self.service.accepted),
            **{status: ended[status] for status in ("succeeded", "failed", "cancelled")},
            "failed_of": dict(Counter(row.error["code"] for row in rows if row.status == "failed")),
            "lost": len(set(self.service.accepted) - {row.id for row in rows}),
            "doubled": len(rows) - len(set(self.service.accepted)),
            "attempts": sum(row.attempt for row in rows),
            "faults": sum(self.faults.values()),
            "faults_by_kind": dict(self.faults),
            # Only who may mount a disk can fill one up.
            "faults_not_possible_here": [] if self.disk else ["fill_the_disk"],
            "tries_of_clients_refused": self.refused,
            "recoveries": len(took),
            "median_recovery_s": round(median(took or [0]), 1),
            "slowest_recovery_s": round(max(took, default=0), 1),
            "queue_drained_s": round(drained, 1),
            "trouble": self.trouble or "none",
        }


def soak(database: str, broker: str, seconds: float, seed: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="shadowft-soak-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        disk = None
        with suppress(
            pytest.skip.Exception
        ):  # then nothing fills up, and `faults_not_possible_here` of the printed line says so
            disk = stack.enter_context(small_disk(folder / "disk", DISK))
        postgres = PostgresServer() if database == "postgresql" else None
        redis = RedisServer() if broker == "redis" else None
        urls, lines = {}, []
        for name, server in (("database_url", postgres), ("broker_url", redis)):
            if server:
                stack.callback(server.close)
                server.start()
                lines.append(stack.enter_context(closing(Proxy(server.port))))
                urls[name] = server.url_at(lines[-1].port)
        service = stack.enter_context(run_faulty((disk or folder) / "data", **urls, save_seconds="0.5"))
        found = Soak(service, postgres, redis, lines, disk, seed).run(seconds)
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
        clean &= line["trouble"] == "none"
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
