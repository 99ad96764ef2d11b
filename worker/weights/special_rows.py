"""Rows of the vocabulary that a pretraining never touched, and what a tuning began with in their place.

In some base models, Llama 3's above all, the marks of the chat format have rows in embedding and head that nothing has
trained. LoRA cannot train them, and full tuning would spend its first steps on them; so the tuning of such a base
begins with Instruct's rows for the marks that its texts use. Those rows are part of the start that the change is
measured from. They are kept beside what was tuned, in `start_rows.safetensors`: one float32 tensor for each row, named
TENSOR/ROW, where TENSOR is the start checkpoint's own name.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from core.checkpoints import Checkpoint, TensorInfo, read_checkpoint, read_tensors
from core.errors import InvalidInput
from core.graft_plan import embedding, head, is_tied, is_vocabulary
from worker.weights.files import write_bytes
from worker.weights.kernels import Array
from worker.weights.tensors import DTYPES, F32, Buffer, Reader, make_header, widened

START_ROWS_FILE = "start_rows.safetensors"

Role = Literal["embedding", "head"]

#: By tensor of the start checkpoint, then by the row's number: (C,) float32.
StartRows = Mapping[str, Mapping[int, Array]]

#: A row is untrained below this share of the typical norm. Weight decay takes rows that no text uses to 1e-20 and less,
#: and rarely used ones stay above a twentieth (the norm of a row as a sign: Land and Bartolo, arXiv 2405.05417).
NEAR_ZERO = 0.01
#: Rows from which the typical norm is taken, evenly spread.
_SAMPLED_ROWS = 256
#: How many rows before and behind are compared: marks stand together, the reserved ones behind those in use.
_NEIGHBOURS = 8


def untrained_rows(folder: Path, token_ids: Sequence[int]) -> dict[str, list[int]]:
    """Which of the tokens' rows were never trained, by tensor: the embedding, and a head of its own. Reads few rows.

    A row counts as untrained where its norm is next to nothing against the typical row's, or where it is equal to
    another one to the last bit: what no text ever used has had the same gradient as its like and no other. Rows that
    still hold random numbers of their own cannot be told from trained ones. Tokens that the model lacks are not named.

    InvalidInput: there is no such model, or it is damaged.
    """
    with _tables(folder) as tables:
        found = {table.info.name: table.untrained(token_ids) for table in tables.values()}
    return {name: rows for name, rows in found.items() if rows}


def rows_for_untrained(base: Path, instruct: Path, token_ids: Sequence[int]) -> StartRows:
    """Instruct's rows for those of `token_ids` that base has never trained and Instruct has. The two are of one
    lineage, and base knows the tokens."""
    found: dict[str, dict[int, Array]] = {}
    with _tables(base) as ours, _tables(instruct) as theirs:
        for role, table in ours.items():
            lent = set(table.untrained(token_ids)).difference(theirs[role].untrained(token_ids))
            rows = {row: widened(theirs[role].row(row)) for row in sorted(lent)}
            found |= dict.fromkeys(table.names, rows) if rows else {}
    return found


# --- kept beside what was tuned ---------------------------------------------------------------------------------------


def save_start_rows(folder: Path, rows: StartRows) -> None:
    """Nothing is written where there are none."""
    if not rows:
        return
    flat = {f"{name}/{row}": values for name, some in rows.items() for row, values in some.items()}
    infos = [TensorInfo(name, "F32", values.shape, START_ROWS_FILE, 0, values.nbytes) for name, values in flat.items()]
    header = make_header([(info, info.dtype) for info in infos], {})
    write_bytes(folder / START_ROWS_FILE, header + b"".join(values.astype(F32).tobytes() for values in flat.values()))


def read_start_rows(folder: Path) -> StartRows:
    """Empty where the tuning began with the start checkpoint as it is. InvalidInput: the file is damaged."""
    if not (folder / START_ROWS_FILE).exists():
        return {}
    reader = Reader(folder)
    try:
        found: dict[str, dict[int, Array]] = defaultdict(dict)
        for info in read_tensors(folder, START_ROWS_FILE).values():
            name, _, row = info.name.rpartition("/")
            if not name or not row.isdecimal() or not row.isascii() or info.dtype != "F32" or len(info.shape) != 1:
                raise _odd(folder, info.name)
            found[name][int(row)] = reader.tensor(info)
    finally:
        reader.close()
    return dict(found)


def require_fitting_rows(rows: StartRows, start: Checkpoint, folder: Path) -> None:
    """InvalidInput: the rows that lie in `folder` are not rows of the start checkpoint."""
    for name, some in rows.items():
        shape = start.tensors[name].shape if name in start.tensors else ()
        for row, values in some.items():
            if len(shape) != 2 or row >= shape[0] or len(values) != shape[1]:
                raise _odd(folder, f"{name}/{row}")


def require_rows_of_a_vocabulary(rows: StartRows, relative: Checkpoint, folder: Path) -> None:
    """InvalidInput: the rows that lie in `folder` can be none of a start checkpoint that is not at hand, and of whose
    lineage `relative` is: it may call its tensors otherwise, and have fewer rows."""
    table = embedding(relative) or head(relative)
    columns = relative.tensors[table].shape[1:] if table is not None else ()
    for name, some in rows.items():
        for row, values in some.items():
            if not is_vocabulary(name) or not name.endswith(".weight") or values.shape != columns:
                raise _odd(folder, f"{name}/{row}")


def row_numbers(rows: StartRows) -> dict[str, list[int]]:
    """As it is told: by tensor, in order."""
    return {name: sorted(rows[name]) for name in sorted(rows)}


def _odd(folder: Path, name: str) -> InvalidInput:
    return InvalidInput(
        f"{folder.name}/{START_ROWS_FILE} holds {name}, which is no row of the model that the tuning began with",
        code="damaged_checkpoint",
        hint="Name the base model that was tuned, or copy the tuned model again, whole.",
    )


# --- reading single rows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """An embedding or a head: (rows, columns)."""

    reader: Reader
    info: TensorInfo
    #: Under which it is stored; a tied head may be stored beside its embedding.
    names: tuple[str, ...]

    def untrained(self, token_ids: Sequence[int]) -> list[int]:
        asked = sorted({token for token in token_ids if 0 <= token < self.info.shape[0]})
        near = {place for token in asked for place in range(token - _NEIGHBOURS, token + _NEIGHBOURS + 1)}
        bits = {place: self._bits(place) for place in near if 0 <= place < self.info.shape[0]}
        count = Counter(bits.values())
        least = NEAR_ZERO * self._typical_norm() if asked else 0.0
        return [token for token in asked if count[bits[token]] > 1 or self._norm(token) <= least]

    def row(self, number: int) -> Array:
        """(columns,) as stored."""
        columns = self.info.shape[1]
        return self.reader.elements(self.info, number * columns, (number + 1) * columns, Buffer())

    def _bits(self, number: int) -> bytes:
        return self.row(number).tobytes()

    def _norm(self, number: int) -> float:
        return float(np.linalg.norm(widened(self.row(number)).astype(np.float64)))

    def _typical_norm(self) -> float:
        rows = self.info.shape[0]
        norms = [self._norm(number) for number in range(0, rows, -(-rows // _SAMPLED_ROWS))]
        return sorted(norms)[len(norms) // 2]


@contextmanager
def _tables(folder: Path) -> Iterator[dict[Role, _Table]]:
    """What the model has of the two as a table of its own, in a dtype that is read here."""
    checkpoint = read_checkpoint(folder)
    reader = Reader(folder)
    tables = {role: _Table(reader, checkpoint.tensors[names[0]], names) for role, names in _roles(checkpoint)}
    try:
        yield {role: table for role, table in tables.items() if table.info.dtype in DTYPES}
    finally:
        reader.close()


def _roles(checkpoint: Checkpoint) -> Iterator[tuple[Role, tuple[str, ...]]]:
    """Each table with the names that it is stored under."""
    first, last = embedding(checkpoint), head(checkpoint)
    tables: dict[Role, tuple[str | None, ...]] = {"embedding": (first,), "head": (last,)}
    if is_tied(checkpoint):
        tables = {"embedding": (first, last)}
    for role, names in tables.items():
        stored = tuple(name for name in names if name is not None)
        if stored:
            yield role, stored
