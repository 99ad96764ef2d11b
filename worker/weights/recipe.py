"""Makes any stretch of an output file: read, add, round, measure. Threads share it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from core.checkpoints import DTYPE_BYTES
from core.errors import InvalidInput
from worker.weights import tensors
from worker.weights.arithmetic import NotFinite, add, add_carefully, change_squares, convert
from worker.weights.delta import BoundDelta, TensorChange
from worker.weights.figures import Sums, Tally
from worker.weights.kernels import Array
from worker.weights.layout import Piece, Shard
from worker.weights.tensors import DTYPES, F32, Reader, Scratch


@dataclass(frozen=True)
class Recipe:
    instruct: Reader
    bound: BoundDelta
    scale: float
    measure: bool
    tally: Tally

    def fill(self, shard: Shard, start: int, end: int, view: memoryview, scratch: Scratch) -> None:
        """Put the bytes `start` to `end` of the shard into `view`. InvalidInput: a sum is not finite."""
        if start < len(shard.header):
            head = shard.header[start:end]
            view[: len(head)] = head
        stretches = list(shard.stretches(start, end))
        for piece, first, last in stretches:
            self._announce(piece, first, last)
        for piece, first, last in stretches:
            place = piece.start + (first - piece.first) * piece.item - start
            self._fill(piece, first, last, view[place : place + (last - first) * piece.item], scratch)

    def _announce(self, piece: Piece, first: int, last: int) -> None:
        self.instruct.announce(piece.info, first, last)
        change = self._change(piece)
        if change is not None:
            change.announce(first, last)

    def _change(self, piece: Piece) -> TensorChange | None:
        if piece.fate in ("graft", "difference"):
            return self.bound.grafted[piece.info.name]
        return self.bound.discarded[piece.info.name] if piece.discarded else None

    def _fill(self, piece: Piece, first: int, last: int, view: memoryview, scratch: Scratch) -> None:
        if piece.fate == "copy":
            item = DTYPE_BYTES[piece.info.dtype]
            self.instruct.bytes_into(view, piece.info.file, piece.info.start + first * item)
        change = self._change(piece)
        grain = change.grain if change is not None else tensors.CHUNK_ELEMENTS
        for begin, stop in _chunks(first, last, grain):
            part = view[(begin - first) * piece.item : (stop - first) * piece.item]
            if piece.fate == "convert":
                self._convert(piece, begin, stop, part, scratch)
            if piece.fate == "difference" and change is not None:
                self._subtract(piece, change, begin, stop, part, scratch)
            elif piece.fate == "graft" and change is not None:
                self._graft(piece, change, begin, stop, part, scratch)
            elif piece.discarded and change is not None and self.measure:
                self._measure_discarded(piece, change, begin, stop, scratch)

    def _convert(self, piece: Piece, first: int, last: int, view: memoryview, scratch: Scratch) -> None:
        values = self.instruct.values(piece.info, first, last, scratch.kept)
        if not convert(values, np.frombuffer(view, DTYPES[piece.dtype]), scratch.out):
            raise InvalidInput(
                f"{piece.info.name} of instruct holds numbers that are too large for the output's {piece.dtype}",
                code="not_finite",
                param="output_dtype",
                hint="Keep Instruct's dtype (auto), or ask for float32.",
            )

    def _graft(
        self, piece: Piece, delta: TensorChange, first: int, last: int, view: memoryview, scratch: Scratch
    ) -> None:
        out = np.frombuffer(view, DTYPES[piece.dtype])
        change = delta.read(first, last, self.scale, scratch, careful=False)
        total = delta.total(first, last, scratch) if self.scale == 1 else None
        kept = self.instruct.values(piece.info, first, last, scratch.kept)
        sums = add(kept, change, out, scratch.out, total=total, measure=self.measure)
        if sums is None:
            change = delta.read(first, last, self.scale, scratch, careful=True)
            kept = self.instruct.elements(piece.info, first, last, scratch.kept.stored)
            with _named(piece):
                sums = add_carefully(kept, change, out, total=total, measure=self.measure)
        self.tally.add(piece.info.name, sums)

    def _measure_discarded(self, piece: Piece, delta: TensorChange, first: int, last: int, scratch: Scratch) -> None:
        _, squares = self._unscaled(delta, first, last, scratch)
        self.tally.add_discarded(piece.info.name, squares if math.isfinite(squares) else math.inf)

    def _subtract(
        self, piece: Piece, delta: TensorChange, first: int, last: int, view: memoryview, scratch: Scratch
    ) -> None:
        """The delta itself."""
        decrement, squares = self._unscaled(delta, first, last, scratch)
        if not math.isfinite(squares):
            with _named(piece):
                raise NotFinite
        self.tally.add(piece.info.name, Sums(update=squares))
        out = np.frombuffer(view, F32)
        np.subtract(F32.type(0), decrement, out=out)  # where nothing changed +0.0

    def _unscaled(self, delta: TensorChange, first: int, last: int, scratch: Scratch) -> tuple[Array, float]:
        """The decrement at scale 1, and the sum of its squares, which may be no finite number."""
        change = delta.read(first, last, 1.0, scratch, careful=False)
        squares = change_squares(change)
        if not math.isfinite(squares):
            change = delta.read(first, last, 1.0, scratch, careful=True)
            squares = change_squares(change)
        return change.decrement, squares


def _chunks(first: int, last: int, grain: int) -> Iterator[tuple[int, int]]:
    """Cuts at multiples of `grain`, counted from the tensor's first element."""
    while first < last:
        stop = min(last, (first // grain + 1) * grain)
        yield first, stop
        first = stop


@contextmanager
def _named(piece: Piece) -> Iterator[None]:
    try:
        yield
    except NotFinite:
        raise InvalidInput(
            f"The graft of {piece.info.name} is not a finite number everywhere: its delta, Instruct's weights or "
            "their sum overflowed",
            code="not_finite",
            hint="Train with a smaller learning rate, or graft with a smaller scale.",
        ) from None
