"""The API, which a test can have die at a commit: the file `die-at-commit` in the data folder says when.

`before`: as the transaction that makes a job is about to be committed. `after`: once it is, and before anybody hears.
"""

from __future__ import annotations

import os
import signal

from sqlalchemy import event
from sqlalchemy.orm import Session

from cli.serve import run_api
from core.config import get_settings
from core.models import Job


@event.listens_for(Session, "before_flush")
def _remember(session: Session, *_: object) -> None:
    if any(isinstance(one, Job) for one in session.new):
        session.info["job"] = True


@event.listens_for(Session, "before_commit")
def _before(session: Session) -> None:
    _die(session, "before")


@event.listens_for(Session, "after_commit")
def _after(session: Session) -> None:
    if not session.in_nested_transaction():  # a savepoint is no commit
        _die(session, "after")


def _die(session: Session, when: str) -> None:
    order = get_settings().data_dir / "die-at-commit"
    if session.info.get("job") and order.exists() and order.read_text() == when:
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run_api()
