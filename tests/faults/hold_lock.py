"""A process that stops in the middle of a write: `python -m tests.faults.hold_lock JOB SECONDS`.

It has changed the job's row, has not committed, and holds what its database gives it for that: on SQLite the one write
lock, on PostgreSQL the row.
"""

from __future__ import annotations

import os
import signal
import sys

from sqlalchemy import update

from core import db
from core.config import get_settings
from core.models import Job

if __name__ == "__main__":
    db.IDLE_IN_TRANSACTION_SECONDS = int(sys.argv[2])
    database = db.open_database(get_settings())
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == sys.argv[1]).values(trained_tokens=13))
        print("holds", flush=True)  # noqa: T201
        os.kill(os.getpid(), signal.SIGSTOP)
        session.commit()
        print("committed", flush=True)  # noqa: T201
