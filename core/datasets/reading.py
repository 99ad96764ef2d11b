"""The rows of a training file, for the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from core.datasets.container import decode, open_table
from core.datasets.conversation import Conversation
from core.datasets.formats import parse
from core.datasets.problem import Refused, Unit


def read_rows(path: Path) -> Iterator[Conversation]:
    """Each row in the file's order. Raises InvalidDataset at the first bad row, and for a file without any."""
    unit: Unit = "file"
    number: int | None = None
    try:
        table = open_table(path)
        for row in table.rows:
            unit, number = table.unit, row.number
            yield parse(decode(row)).conversation
    except Refused as refusal:
        raise refusal.at(unit, number).as_error() from None
