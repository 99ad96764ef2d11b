"""What can be wrong with a training file, and how it is said: where, what was found, what to do."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from core.errors import InvalidDataset

Unit = Literal["file", "line", "row"]

_SHOWN_CHARACTERS = 40
_SHOWN_KEYS = 6


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One finding. `unit` and `number` (from 1) say where: a line of JSONL, a row of an array, or the whole file."""

    code: str
    message: str
    remedy: str
    #: The field at fault, such as `messages[1].role`; empty when it is the row as a whole.
    path: str
    unit: Unit
    number: int | None

    @property
    def located(self) -> str:
        """The message with its place, without the remedy."""
        place = [f"{self.unit} {self.number}"] if self.number is not None else []
        place += [self.path] if self.path else []
        return f"{', '.join(place)}: {self.message}" if place else self.message

    @property
    def sentence(self) -> str:
        return f"{self.located}. {self.remedy}"

    def as_error(self) -> InvalidDataset:
        return InvalidDataset(f"The training file cannot be used: {self.located}.", hint=self.remedy)


class Refused(Exception):
    """A row, or the file, that cannot be used; whoever knows the place adds it."""

    def __init__(self, code: str, message: str, remedy: str, *, path: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy
        self.path = path

    def under(self, prefix: str) -> Refused:
        """The same, seen from one level up."""
        path = f"{prefix}.{self.path}" if self.path else prefix
        return Refused(self.code, self.message, self.remedy, path=path)

    def at(self, unit: Unit, number: int | None) -> Problem:
        return Problem(
            code=self.code, message=self.message, remedy=self.remedy, path=self.path, unit=unit, number=number
        )


def shown(value: Any) -> str:
    """A value of a row in few words: its owner recognises it, and a hostile one cannot flood or break a report."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return shown_text(value)
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"an object with {shown_keys(value)}" if value else "an empty object"
        case _:
            return f"the number {value}"


def shown_text(text: str) -> str:
    """`repr` escapes control characters: some databases cannot store a NUL."""
    return repr(text) if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]!r}…"


def shown_keys(row: dict[str, Any]) -> str:
    names = ", ".join(shown_text(key) for key in list(row)[:_SHOWN_KEYS])
    return f"the keys {names}" + (", …" if len(row) > _SHOWN_KEYS else "")
