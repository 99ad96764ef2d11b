"""What must hold after any fault, read from the database, the storage and the processes that are left."""

from __future__ import annotations

import hashlib
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from sqlalchemy import func, select

from core.models import Artifact, File, Job, JobEvent, ResumePoint
from core.storage import LocalStorage
from tests.faults.faults import TERMINAL, Service, read_json
from tests.faults.toy_step import chain
from worker.workspace import job_of

STATES = {*TERMINAL, "validating_files", "queued", "running", "paused"}
#: Sweeps remove what is left within so long.
LEFTOVERS_SECONDS = 30.0
#: The last event of a job, by its end.
LAST_WORDS = {
    "succeeded": "The job has successfully completed",
    "failed": "The job failed: ",
    "cancelled": "The job has been cancelled",
}


def check(service: Service) -> None:
    """Fails with everything that does not hold. What a sweep removes may be there for a few sweeps more."""
    wrong = [*_jobs(service), *_attempts(service)]
    assert not wrong, wrong
    end = time.monotonic() + LEFTOVERS_SECONDS
    while left := list(_leftovers(service)):
        assert time.monotonic() < end, left
        time.sleep(0.5)


def _jobs(service: Service) -> Iterator[str]:
    with service.database.reading() as session:
        rows = {job.id: job for job in session.scalars(select(Job))}
        events = defaultdict(list)
        for event in session.scalars(select(JobEvent).order_by(JobEvent.job_id, JobEvent.seq)):
            events[event.job_id].append(event)
        artifacts = defaultdict(list)
        for artifact in session.scalars(select(Artifact)):
            artifacts[artifact.job_id].append(artifact)
    yield from (f"{job_id} was accepted and is missing" for job_id in service.accepted if job_id not in rows)
    for job_id, job in rows.items():
        if job_id not in service.accepted:
            yield f"{job_id} is there and nobody was told of it"
        if job.status not in STATES:
            yield f"{job_id} is {job.status}"
        yield from _story(job, events[job_id])
        yield from _result(service, job, artifacts[job_id])


def _story(job: Job, events: list[JobEvent]) -> Iterator[str]:
    if [event.seq for event in events] != list(range(1, job.event_count + 1)):
        yield f"{job.id} has events {[event.seq for event in events]}, of {job.event_count}"
    ends = [event.message for event in events if event.message.startswith(tuple(LAST_WORDS.values()))]
    expected = [LAST_WORDS[job.status]] if job.status in TERMINAL else []
    if len(ends) != len(expected) or any(not end.startswith(word) for end, word in zip(ends, expected, strict=True)):
        yield f"{job.id} is {job.status} and its events end it so: {ends}"
    started = [event.message for event in events if " started" in event.message]
    numbers = [int(found[1]) if (found := re.search(r"attempt (\d+)", text)) else 1 for text in started]
    if numbers != list(range(1, job.attempt + 1)):
        yield f"{job.id} is at attempt {job.attempt} and began {numbers}"


def _result(service: Service, job: Job, artifacts: list[Artifact]) -> Iterator[str]:
    if job.status != "succeeded":
        if artifacts:
            yield f"{job.id} is {job.status} and has published {[one.path for one in artifacts]}"
        return
    if not artifacts:
        yield f"{job.id} has succeeded and published nothing"
    if {one.storage_key.split("/")[2] for one in artifacts} != {f"a{job.attempt}"}:
        yield f"{job.id} of attempt {job.attempt} published {[one.storage_key for one in artifacts]}"
    storage = LocalStorage(service.settings.storage_dir)
    for one in artifacts:
        content = storage.path(one.storage_key).read_bytes()
        if hashlib.sha256(content).hexdigest() != one.sha256:
            yield f"{one.storage_key} has other bytes than were published"
    result = read_json(storage.path(f"jobs/{job.id}/a{job.attempt}/result.json"))
    if result["digest"] != chain(job.id, result["steps"]):
        yield f"{job.id} came to another result than it does undisturbed"


def _attempts(service: Service) -> Iterator[str]:
    """At most one attempt at a time, by what the children wrote down themselves."""
    spans: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    for entry in service.diary():
        first, _ = spans[entry.job].get(entry.attempt, (entry.moment, 0.0))
        spans[entry.job][entry.attempt] = (first, entry.moment)
    for job_id, attempts in spans.items():
        ordered = [attempts[number] for number in sorted(attempts)]
        for (_, end), (begin, _) in pairwise(ordered):
            if begin <= end:
                yield f"{job_id}: an attempt began at {begin} while the one before it worked until {end}"


def _leftovers(service: Service) -> Iterator[str]:
    with service.database.reading() as session:
        live = set(session.scalars(select(Job.id).where(Job.status.not_in(TERMINAL))))
        named = {*session.scalars(select(Artifact.storage_key)), *session.scalars(select(File.storage_key))}
        points = tuple(f"{prefix}/" for prefix in session.scalars(select(ResumePoint.prefix)))
        overdue = session.scalar(
            select(func.count()).select_from(Job).where(Job.status == "running", Job.lease_until.is_(None))
        )
    if overdue:
        yield f"{overdue} jobs run without a lease"
    for process in service.children():
        workspace = process.cmdline()[-2].rpartition("/")[2] if len(process.cmdline()) > 2 else "?"
        if job_of(workspace) not in live:
            yield f"the child {process.pid} of {workspace} still runs"
    work = service.settings.work_dir
    for folder in work.iterdir() if work.is_dir() else ():
        if job_of(folder.name) not in live and not folder.name.startswith("check-"):
            yield f"the workspace {folder.name} is left"
    for path in service.settings.storage_dir.rglob("*"):
        key = path.relative_to(service.settings.storage_dir).as_posix()
        job_id = key.split("/")[1] if key.startswith("jobs/") and "/" in key[5:] else None
        if path.is_file() and job_id not in live and key not in named and not key.startswith(points):
            yield f"the object {key} is named by no row"
