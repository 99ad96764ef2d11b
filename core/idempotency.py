"""One job for one intent: what was answered to requests that create something, so that a repeated one gets it again.

The answer is written in the transaction that creates the thing: either both exist or none does. Requests of the same
intent wait for each other, so the second finds the first one's answer. Two ways to be the same intent:

- the same `Idempotency-Key` of one team on one route, for a day;
- a retry (the client says so) of the same body without a key, within 21 minutes of the request that it repeats.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import ColumnElement, and_, delete, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from core.db import db_now
from core.errors import InFlight, InvalidInput
from core.models import IdempotencyKey

#: An answer is kept for so long.
KEPT = timedelta(hours=24)
#: The SDK tries three times, waits ten minutes for each answer and up to eight seconds before the next try.
RETRY_WINDOW = timedelta(minutes=21)
#: How long a request waits for another one of the same intent. PostgreSQL's; SQLite's writers wait for all others.
WAIT_SECONDS = 2
#: Rows that one sweep forgets.
SWEEP_LIMIT = 1000

#: PostgreSQL's code for a lock that was not free in time.
_LOCK_NOT_AVAILABLE = "55P03"


@dataclass(frozen=True)
class Intent:
    """What a client means by a request that creates something."""

    team_id: str
    #: `POST /v1/grafts`
    route: str
    body_sha256: str
    #: The client's `Idempotency-Key`.
    key: str | None
    #: Whether the client says that it sends this request again.
    is_retry: bool


def earlier_answer(session: Session, intent: Intent) -> str | None:
    """The JSON that was answered to this intent before; None: it is new. Until the commit it belongs to this session.

    Raises InvalidInput where the key was used for another body, InFlight where somebody else holds it for too long.
    """
    _wait_for_turn(session, intent)
    if intent.key is not None:
        return _answer_of_key(session, intent)
    return _answer_of_retry(session, intent) if intent.is_retry else None


def remember(session: Session, intent: Intent, answer: str) -> None:
    """Keep the JSON that is about to be answered, in the transaction that makes it true."""
    session.add(
        IdempotencyKey(
            team_id=intent.team_id,
            route=intent.route,
            key=intent.key,
            body_sha256=intent.body_sha256,
            answer=answer,
        )
    )


def forget_old(session: Session) -> None:
    """For the sweep: drop answers past their day. A worker that sweeps at the same time takes other rows."""
    old = select(IdempotencyKey.id).where(IdempotencyKey.created_at <= db_now(-KEPT.total_seconds()))
    taken = old.limit(SWEEP_LIMIT).with_for_update(skip_locked=True)
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.id.in_(taken)))


def _wait_for_turn(session: Session, intent: Intent) -> None:
    """On SQLite a writing transaction is alone anyway; on PostgreSQL a lock on the intent lasts until the commit."""
    if session.get_bind().dialect.name != "postgresql":
        return
    name = "\n".join([intent.team_id, intent.route, intent.key or intent.body_sha256])
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
    session.execute(text(f"SET LOCAL lock_timeout = '{WAIT_SECONDS}s'"))
    try:
        session.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": number})
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
            raise
        raise InFlight("The same request is being answered just now; ask again in a moment.") from error
    session.execute(text("SET LOCAL lock_timeout TO DEFAULT"))


def _of_route(intent: Intent) -> ColumnElement[bool]:
    return and_(IdempotencyKey.team_id == intent.team_id, IdempotencyKey.route == intent.route)


def _answer_of_key(session: Session, intent: Intent) -> str | None:
    row = session.scalar(select(IdempotencyKey).where(_of_route(intent), IdempotencyKey.key == intent.key))
    if row is None:
        return None
    if row.body_sha256 != intent.body_sha256:
        raise InvalidInput(
            f"The Idempotency-Key {intent.key!r} was used for another body; a new request needs a new key.",
            code="idempotency_key_reused",
            param="Idempotency-Key",
        )
    return row.answer


def _answer_of_retry(session: Session, intent: Intent) -> str | None:
    """Of several equal requests the newest is the one whose answer was lost: the others' clients have gone on."""
    same = (
        _of_route(intent),
        IdempotencyKey.key.is_(None),
        IdempotencyKey.body_sha256 == intent.body_sha256,
        IdempotencyKey.created_at > db_now(-RETRY_WINDOW.total_seconds()),
    )
    row = session.scalar(select(IdempotencyKey).where(*same).order_by(IdempotencyKey.id.desc()).limit(1))
    return row.answer if row else None
