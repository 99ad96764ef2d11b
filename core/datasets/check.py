"""Everything that is wrong or odd about a training file, in one pass and in words for its owner."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec

from core.datasets.container import RawRow, Table, decode, open_table
from core.datasets.conversation import Conversation
from core.datasets.formats import Format, Row, parse
from core.datasets.problem import Problem, Refused, Unit

#: Bytes read, bytes in all.
OnProgress = Callable[[int, int], None]

MAX_ERRORS_SHOWN = 20
#: Of each kind, so that a frequent one does not hide a rare one.
MAX_WARNINGS_SHOWN = 3
#: Doubles are looked for among this many different rows: memory stays bounded for a file of any length.
MAX_ROWS_REMEMBERED = 1_000_000

_PROGRESS_BYTES = 4 * 2**20
_PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}")

_FORMAT_NAMES: dict[str, str] = {
    "chat": "chat",
    "prompt_completion": "prompt and completion",
    "alpaca": "Alpaca",
    "sharegpt": "ShareGPT",
    "mixed": "mixed",
}
_REMEDIES = {
    "duplicate": "Remove doubles unless they are meant to weigh more",
    "placeholder": "Put the real value in; the model learns the braces as they stand",
    "assistant_first": "Start with the user's turn; many chat templates refuse anything else",
    "same_role_twice": "Join the two turns into one; many chat templates refuse them",
    "ends_without_answer": "Remove the last turn, or add its answer; nothing is learned from it",
    "empty_turn": "Fill it in if that was not meant",
    "ignored_field": "Nothing to do if that is meant; only the text of a turn is trained on",
    "mixed_formats": "Nothing to do if that is meant",
}


class LongestRow(msgspec.Struct, frozen=True):
    #: The line of JSONL, or the place in an array.
    number: int
    characters: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found. Its JSON form is `as_dict()`; `summary` is the file's `status_details`."""

    ok: bool
    summary: str
    format: Format | Literal["mixed"] | None
    #: Good rows of each format.
    formats: dict[Format, int]
    rows: int
    bad_rows: int
    #: Of the contents of all good rows, and of those turns that count in the loss.
    characters: int
    trained_characters: int
    longest_row: LongestRow | None
    #: Rows for each kind of problem; a row is counted under its first one.
    errors: dict[str, int]
    first_errors: list[Problem]
    #: Rows for each kind of doubt; a row can have several.
    warnings: dict[str, int]
    first_warnings: list[Problem]

    def as_dict(self) -> dict[str, object]:
        built: dict[str, object] = msgspec.to_builtins(self)
        return built


def _silent(_read: int, _total: int) -> None:
    """Tell nobody."""


def check_file(path: Path, *, on_progress: OnProgress = _silent) -> Report:
    """Read all of `path`. Whatever its bytes are, the answer is a Report."""
    tally = _Tally()
    try:
        _check_rows(open_table(path), tally, on_progress)
    except Refused as refusal:
        tally.refuse(refusal.at("file", None))
    return tally.report()


def _check_rows(table: Table, tally: _Tally, on_progress: OnProgress) -> None:
    told = 0
    for raw in table.rows:
        tally.check(raw, table.unit)
        if raw.bytes_read - told >= _PROGRESS_BYTES:
            told = raw.bytes_read
            on_progress(told, table.bytes_total)
    on_progress(table.bytes_total, table.bytes_total)


class _Tally:
    """Counts what goes by."""

    def __init__(self) -> None:
        self.rows = 0
        self.bad_rows = 0
        self.formats: Counter[Format] = Counter()
        self.characters = 0
        self.trained_characters = 0
        self.longest_row: LongestRow | None = None
        self.errors: Counter[str] = Counter()
        self.first_errors: list[Problem] = []
        self.warnings: Counter[str] = Counter()
        self.first_warnings: list[Problem] = []
        self.seen: dict[int, int] = {}

    def check(self, raw: RawRow, unit: Unit) -> None:
        self.rows += 1
        try:
            row = parse(decode(raw))
        except Refused as refusal:
            self.bad_rows += 1
            self.refuse(refusal.at(unit, raw.number))
        else:
            self.accept(row, unit, raw.number)

    def refuse(self, problem: Problem) -> None:
        self.errors[problem.code] += 1
        if len(self.first_errors) < MAX_ERRORS_SHOWN:
            self.first_errors.append(problem)

    def accept(self, row: Row, unit: Unit, number: int) -> None:
        characters = row.conversation.characters
        self.formats[row.format] += 1
        self.characters += characters
        self.trained_characters += row.conversation.trained_characters
        if self.longest_row is None or characters > self.longest_row.characters:
            self.longest_row = LongestRow(number, characters)
        for code, message in _doubts(row):
            self.warn(code, message, unit, number)
        self.look_for_double(row.conversation, unit, number)

    def warn(self, code: str, message: str, unit: Unit, number: int | None) -> None:
        self.warnings[code] += 1
        if self.warnings[code] <= MAX_WARNINGS_SHOWN:
            remedy = _REMEDIES[code]
            self.first_warnings.append(
                Problem(code=code, message=message, remedy=remedy, path="", unit=unit, number=number)
            )

    def look_for_double(self, conversation: Conversation, unit: Unit, number: int) -> None:
        """By hash: with 64 salted bits, two different rows among a million meet once in 37 million files."""
        key = hash(conversation)
        if key in self.seen:
            self.warn("duplicate", f"the same as {unit} {self.seen[key]}", unit, number)
        elif len(self.seen) < MAX_ROWS_REMEMBERED:
            self.seen[key] = number

    def report(self) -> Report:
        if len(self.formats) > 1:
            self.warn("mixed_formats", f"rows of several formats: {', '.join(self.formats)}", "file", None)
        return Report(
            ok=not self.errors,
            summary=self.summary(),
            format=self.format(),
            formats=dict(self.formats),
            rows=self.rows,
            bad_rows=self.bad_rows,
            characters=self.characters,
            trained_characters=self.trained_characters,
            longest_row=self.longest_row,
            errors=dict(self.errors),
            first_errors=self.first_errors,
            warnings=dict(self.warnings),
            first_warnings=self.first_warnings,
        )

    def format(self) -> Format | Literal["mixed"] | None:
        return "mixed" if len(self.formats) > 1 else next(iter(self.formats), None)

    def summary(self) -> str:
        if not self.errors:
            return self.praise()
        first = self.first_errors[0].sentence
        if not self.bad_rows:
            return f"The file cannot be trained on: {first}."
        return f"{self.bad_rows:,} of {_counted(self.rows, 'row')} cannot be trained on; the first is {first}."

    def praise(self) -> str:
        rows = f"{_counted(self.rows, 'row')} in {_FORMAT_NAMES[self.format() or 'mixed']} format"
        found = ", ".join(f"{code} ({count:,})" for code, count in self.warnings.items())
        return f"{rows}, {self.characters:,} characters" + (f"; warnings: {found}." if found else ".")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _doubts(row: Row) -> Iterator[tuple[str, str]]:
    """What is odd about a good row: a code, each at most once, and a message."""
    messages = row.conversation.messages
    if row.ignored:
        yield "ignored_field", f"not trained on: {', '.join(repr(name[:40]) for name in sorted(row.ignored)[:6])}"
    if any(_is_blank(message.content) for message in messages):
        yield "empty_turn", "a turn is empty"
    if found := _placeholder(row.conversation):
        yield "placeholder", f"{found[:40]} looks like a placeholder that was not filled in"
    yield from _odd_order([message.role for message in messages if message.role != "system"])


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _placeholder(conversation: Conversation) -> str | None:
    for message in conversation.messages:
        if "{{" in message.content and (match := _PLACEHOLDER.search(message.content)):
            return match.group()
    return None


def _odd_order(roles: list[str]) -> Iterator[tuple[str, str]]:
    if roles[0] == "assistant":
        yield "assistant_first", "the assistant speaks first"
    if roles[-1] == "user":
        yield "ends_without_answer", "the last turn is the user's"
    for role, after in pairwise(roles):
        if role == after:
            yield "same_role_twice", f"two {role} turns in a row"
            return
