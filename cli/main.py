"""The commands. Each imports what it needs when it needs it, so that `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.files import files
from cli.graft import graft
from cli.http import sentence
from cli.jobs import jobs
from cli.keys import keys, teams
from cli.pairs import pairs
from core.errors import ShadowError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Shadow-FT as a self-service.")
app.command()(graft)
app.add_typer(keys, name="keys")
app.add_typer(teams, name="teams")
app.add_typer(pairs, name="pairs")
app.add_typer(files, name="files")
app.add_typer(jobs, name="jobs")


@app.command()
def serve() -> None:
    """Run the whole service on this machine: API, a worker for jobs, a worker for light work."""
    from cli.serve import serve as run

    raise typer.Exit(run())


@app.command()
def api() -> None:
    """Run the API alone."""
    from cli.serve import run_api

    run_api()


@app.command()
def worker(
    queue: Annotated[Literal["jobs", "light"], typer.Option(help="Hours of GPU time, or seconds of a CPU.")] = "jobs",
) -> None:
    """Run one worker."""
    from worker.tasks import main as run

    run(queue)


@app.command(hidden=True)
def api_health() -> None:
    """For a container's health check: whether the API of this host can serve."""
    import httpx

    from core.config import get_settings

    try:
        answer = httpx.get(f"http://127.0.0.1:{get_settings().port}/readyz", timeout=4, trust_env=False)
    except httpx.TransportError:
        raise typer.Exit(1) from None
    raise typer.Exit(0 if answer.status_code == 200 else 1)


@app.command(hidden=True)
def worker_health() -> None:
    """For a container's health check: whether a worker of this host has told the database lately that it lives."""
    import socket

    from sqlalchemy import select

    from core.config import get_settings
    from core.db import db_now, open_database
    from core.models import Worker

    settings = get_settings()
    lives = Worker.beat_at > db_now(-settings.lease_seconds)
    with open_database(settings).reading() as session:
        found = session.scalar(select(Worker.id).where(Worker.host == socket.gethostname(), lives).limit(1))
    raise typer.Exit(0 if found else 1)


@app.command()
def migrate() -> None:
    """Bring the database to this version's schema; on an empty one, make the first admin key too."""
    from core.config import get_settings
    from core.db import open_database
    from core.keys import ensure_admin_key
    from core.schema import current
    from core.schema import migrate as run

    settings = get_settings()
    database = open_database(settings)
    run(database)
    key_file = ensure_admin_key(database, settings)
    typer.echo(f"The database is at schema {current(database)}.")
    if key_file:
        typer.echo(f"The admin key is in {key_file}.")


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="Train on this file instead of the demo's own data.")] = None,
    pair: Annotated[str | None, typer.Option(help="Tune this pair instead of the demo's own.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the demo keeps its pair, data and results.")] = Path("demo-data"),
) -> None:
    """Run the main job from end to end and show what came of it."""
    from demo.story import run

    raise typer.Exit(run(folder.absolute(), data=data, pair=pair))


@app.command()
def version() -> None:
    """Print the version."""
    from core.version import VERSION

    typer.echo(VERSION)


def main() -> None:
    """`shadowft`: an error of ours is a sentence and exit status 1, not a traceback."""
    try:
        app()
    except ShadowError as error:
        typer.echo(f"shadowft: {sentence(error)}", err=True)
        sys.exit(1)
