"""How commands print: tables for people, lines for a pipe, JSON for programs. Rich is imported where it draws."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

#: Of a line in a pipe: a program that reads it wants it whole.
NEVER_FOLDED = 100_000

_COLOURS = {
    "ok": "green",
    "note": "dim",
    "warn": "yellow",
    "refuse": "red",
    "error": "red",
    "unchecked": "magenta",
    "uploaded": "cyan",
    "processed": "green",
    "running": "cyan",
    "pausing": "yellow",
    "paused": "yellow",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
}


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def say(words: str) -> None:
    """To whoever watches, beside the result: on stderr."""
    typer.echo(printable(words), err=True)


def printable(words: str) -> str:
    """On one line and without control characters: a file may be named by anyone."""
    return "".join(letter if letter.isprintable() else " " for letter in words)


def console() -> Console:
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else NEVER_FOLDED)


def draw(*parts: RenderableType) -> None:
    """On stdout; a pipe gets no blanks at the ends of lines."""
    out = console()
    if sys.stdout.isatty():
        out.print(*parts)
        return
    with out.capture() as drawn:
        out.print(*parts)
    typer.echo("\n".join(line.rstrip() for line in drawn.get().splitlines()))


def table(*columns: str) -> Table:
    """With lines around the cells on a terminal, and without any in a pipe."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.HEAVY_HEAD if sys.stdout.isatty() else None)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def grid() -> Table:
    from rich.table import Table

    return Table.grid(padding=(0, 2))


def facts(known: dict[str, str | None]) -> Table:
    """A label and a value on each line; what has no value is left out."""
    made = grid()
    for label, value in known.items():
        if value:
            made.add_row(label, plain(value))
    return made


def findings(found: Sequence[dict[str, Any]]) -> Table:
    """What a check found: its weight, its code, and in words what to do."""
    made = grid()
    for finding in found:
        words = f"{finding['message']} {finding['remedy']}".strip()
        made.add_row("", coloured(finding["level"]), plain(finding["code"]), plain(words))
    return made


def plain(words: object) -> Text:
    """Not to be taken for markup: a folder may be called `[red]`."""
    from rich.text import Text

    return Text("" if words is None else printable(str(words)))


def coloured(word: str) -> Text:
    from rich.text import Text

    return Text(printable(word), style=_COLOURS.get(word, ""))


def moment(seconds: int | None) -> str:
    """Unix seconds in local time; empty for none."""
    return f"{datetime.fromtimestamp(seconds).astimezone():%F %T}" if seconds is not None else ""


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def counted(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
