"""`shadowft keys` and `shadowft teams`: straight to the database, for whoever may read it.

The database's libraries are imported by the commands that use them: they cost every other command a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

keys = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")
teams = typer.Typer(no_args_is_help=True, help="Make, limit and list teams.")


@contextmanager
def _session() -> Iterator[Session]:
    from core.config import get_settings
    from core.db import open_database
    from core.schema import prepare

    settings = get_settings()
    prepare(settings)
    database = open_database(settings)
    with database.writing() as session:
        yield session
        session.commit()


@keys.command("create")
def create(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    team: Annotated[str | None, typer.Option(help="The team whose files and jobs it opens.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It may also register pairs.")] = False,
) -> None:
    """Make a key and print it. It is shown once."""
    from core.keys import DEFAULT_TEAM, create_key, find_team

    with _session() as session:
        _, text = create_key(session, find_team(session, team or DEFAULT_TEAM), name=name, is_admin=admin)
    typer.echo(text)


@keys.command("list")
def list_keys() -> None:
    """List all keys, without their secrets."""
    from rich.console import Console
    from rich.table import Table
    from sqlalchemy import select

    from core.models import ApiKey, Team

    table = Table("id", "team", "name", "admin", "created", "revoked")
    with _session() as session:
        for key, team in session.execute(select(ApiKey, Team.name).join(Team).order_by(ApiKey.created_at)):
            revoked = f"{key.revoked_at:%F %T}" if key.revoked_at else ""
            table.add_row(key.id, team, key.name, "yes" if key.is_admin else "", f"{key.created_at:%F %T}", revoked)
    Console().print(table)


@keys.command("revoke")
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """End a key. Every process refuses it within five seconds."""
    from core.keys import revoke_key

    with _session() as session:
        revoke_key(session, key_id)
    typer.echo(f"{key_id} is revoked.")


@teams.command("create")
def create_a_team(name: str) -> None:
    """Make a team."""
    from core.keys import create_team

    with _session() as session:
        team = create_team(session, name)
    typer.echo(team.id)


@teams.command("limit")
def limit_a_team(
    name: str,
    max_job_seconds: Annotated[
        int,
        typer.Argument(
            min=0,
            metavar="SECONDS",
            help="How long each of its jobs may run, all attempts together; 0 for no limit.",
        ),
    ],
) -> None:
    """Limit how long a team's jobs may run. Counts for a running job from its next attempt on."""
    from core.keys import find_team

    with _session() as session:
        find_team(session, name).max_job_seconds = max_job_seconds or None
    typer.echo(f"Jobs of {name} may run {f'{max_job_seconds:,} s' if max_job_seconds else 'as long as they take'}.")


@teams.command("list")
def list_teams() -> None:
    """List all teams."""
    from rich.console import Console
    from rich.table import Table
    from sqlalchemy import select

    from core.models import Team

    table = Table("id", "name", "job seconds", "created")
    with _session() as session:
        for team in session.scalars(select(Team).order_by(Team.created_at)):
            limit = "" if team.max_job_seconds is None else f"{team.max_job_seconds:,}"
            table.add_row(team.id, team.name, limit, f"{team.created_at:%F %T}")
    Console().print(table)
