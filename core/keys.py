"""Teams and their API keys.

A key reads `sft_ID_SECRET_CHECK`: the prefix and the checksum let secret scanners recognise it, the id finds its row,
and 256 random bits make a plain hash the right way to keep it. It is shown once.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from core.config import Settings
from core.db import Database, db_now, lock_for_setup
from core.errors import AuthenticationFailed, Conflict, InvalidInput, NotFound
from core.ids import new_id
from core.models import ApiKey, Team

DEFAULT_TEAM = "default"
_PREFIX = "sft"
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")


@dataclass(frozen=True)
class Caller:
    """Who sends a request."""

    key_id: str
    team_id: str
    team_name: str
    is_admin: bool


def hold_team(session: Session, team_id: str) -> None:
    """Be alone with the team until the commit; rows that only name it can be written meanwhile.

    What gets its id under this is committed in the order of the ids, so that who reads on behind the last misses none.
    """
    session.execute(select(Team.id).where(Team.id == team_id).with_for_update(key_share=True))


def create_team(session: Session, name: str) -> Team:
    """Raises InvalidInput for a name that a model's id could not carry, Conflict for one that is taken."""
    if not 1 <= len(name) <= 32 or not _NAME_CHARACTERS.issuperset(name):
        raise InvalidInput(
            f"The team name {name!r} is not usable: take 1 to 32 of the characters a-z, 0-9, '-', '_' and '.'.",
            param="name",
        )
    if session.scalar(select(Team.id).where(Team.name == name)):
        raise Conflict(f"There is already a team named {name!r}.", code="team_exists", param="name")
    team = Team(id=new_id("team-"), name=name)
    session.add(team)
    session.flush()
    return team


def find_team(session: Session, name: str) -> Team:
    team = session.scalar(select(Team).where(Team.name == name))
    if team is None:
        raise NotFound(f"There is no team named {name!r}; create it with: shadowft teams create {name}", param="team")
    return team


def create_key(session: Session, team: Team, *, name: str, is_admin: bool) -> tuple[ApiKey, str]:
    """The row and the key's text, which exists nowhere else."""
    identity, secret = secrets.token_hex(8), secrets.token_hex(32)
    key = ApiKey(id=f"key_{identity}", team_id=team.id, name=name, secret_sha256=_hash(secret), is_admin=is_admin)
    session.add(key)
    body = f"{_PREFIX}_{identity}_{secret}"
    return key, f"{body}_{_checksum(body)}"


def revoke_key(session: Session, key_id: str) -> None:
    changed = session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
        .values(revoked_at=db_now())
        .returning(ApiKey.id)
    ).first()
    if changed is None:
        raise NotFound(f"There is no live key {key_id}; `shadowft keys list` shows them.", param="id")


def revoked_of(session: Session, key_ids: Collection[str]) -> frozenset[str]:
    """Those of the keys that have been revoked."""
    revoked = select(ApiKey.id).where(ApiKey.id.in_(key_ids), ApiKey.revoked_at.is_not(None))
    return frozenset(session.scalars(revoked))


def authenticate(session: Session, text: str) -> Caller:
    """Whose key `text` is. Raises AuthenticationFailed, in the same words whatever is wrong with it."""
    identity, secret = _split(text)
    row = session.execute(
        select(ApiKey, Team).join(Team, ApiKey.team_id == Team.id).where(ApiKey.id == f"key_{identity}")
    ).first()
    # A miss compares too, so that its time does not tell which ids exist.
    known = row.ApiKey.secret_sha256 if row else _hash("")
    if not hmac.compare_digest(known, _hash(secret)) or row is None or row.ApiKey.revoked_at is not None:
        raise wrong_key()
    return Caller(key_id=row.ApiKey.id, team_id=row.Team.id, team_name=row.Team.name, is_admin=row.ApiKey.is_admin)


def wrong_key() -> AuthenticationFailed:
    return AuthenticationFailed(
        "The API key is not valid. Send `Authorization: Bearer KEY`; the first start of the service wrote an admin "
        "key to admin.key in its data folder, and `shadowft keys create` makes others."
    )


def ensure_admin_key(database: Database, settings: Settings) -> Path | None:
    """On the first start: the default team and an admin key, written with mode 0600. None where both exist."""
    with database.writing() as session:
        lock_for_setup(session.connection())
        if session.scalar(select(Team.id).limit(1)):
            return None
        team = create_team(session, DEFAULT_TEAM)
        _, text = create_key(session, team, name="first admin", is_admin=True)
        _write_secret(settings.admin_key_file, text)
        session.commit()
    return settings.admin_key_file


def _write_secret(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text + "\n")
    temporary.rename(path)


def _split(text: str) -> tuple[str, str]:
    parts = text.split("_")
    if len(parts) != 4 or parts[0] != _PREFIX or _checksum("_".join(parts[:3])) != parts[3]:
        raise wrong_key()
    return parts[1], parts[2]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
