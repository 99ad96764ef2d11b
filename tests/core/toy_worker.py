"""A Celery worker of `jobs` that can do one thing: `python -m tests.core.toy_worker FILE` adds a line to the file."""

from __future__ import annotations

import sys
from pathlib import Path

from core.celery_app import celery

file = Path(sys.argv[1])


@celery.task(name="admit")
def admit() -> None:
    with file.open("a") as lines:
        lines.write("admitted\n")


@celery.task(name="work")
def work() -> None:
    """What messages that are none ask for."""


if __name__ == "__main__":
    options = ["--pool=threads", "--concurrency=1", "--queues=jobs"]
    celery.worker_main(["worker", *options, "--without-gossip", "--without-mingle", "--without-heartbeat"])
