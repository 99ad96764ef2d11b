"""How many checks of pairs there may be, and for how long they are kept.

A completed one is also the verdict that later admissions of the same pair start from; once it is forgotten, the next of
them looks again. No verb commits.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, delete, func, or_, select
from sqlalchemy.orm import Session

from core.db import db_now
from core.errors import QuotaExceeded
from core.models import PairCheck

#: Checks of one team that wait for a worker or run; each takes the one light worker a minute or more.
MAX_WAITING = 20
#: Ended checks are kept for thirty days, and of one team these many at most.
KEPT_SECONDS = 30 * 24 * 3600
KEPT_OF_A_TEAM = 1000


def require_room(session: Session, team_id: str) -> None:
    """Raise QuotaExceeded where as many of the team's checks wait as may. Some more come in where several ask at once,
    which harms nobody."""
    waiting = session.scalar(
        select(func.count()).where(PairCheck.team_id == team_id, PairCheck.status.in_(("queued", "running")))
    )
    if waiting is not None and waiting >= MAX_WAITING:
        raise QuotaExceeded(
            f"{waiting} pair checks of your team wait for a worker, and {MAX_WAITING} may.",
            code="too_many_pair_checks",
            hint="Wait until some are done. If none gets done, no worker of the queue 'light' is running.",
        )


def forget_old(session: Session) -> int:
    """Delete ended checks that are too old or too many; how many."""
    age_rank = func.row_number().over(partition_by=PairCheck.team_id, order_by=PairCheck.id.desc())
    ended = select(PairCheck.id, age_rank.label("age_rank")).where(_has_ended()).subquery()
    surplus = select(ended.c.id).where(ended.c.age_rank > KEPT_OF_A_TEAM)
    old = or_(PairCheck.finished_at <= db_now(-KEPT_SECONDS), PairCheck.id.in_(surplus))
    gone = delete(PairCheck).where(_has_ended(), old).returning(PairCheck.id)
    return len(session.scalars(gone.execution_options(synchronize_session=False)).all())


def _has_ended() -> ColumnElement[bool]:
    return PairCheck.status.in_(("completed", "failed"))
