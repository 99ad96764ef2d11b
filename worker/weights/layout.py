"""Where each byte of the output lies and what it is made of, before any byte is made.

The output keeps Instruct's shards, names and order; with `output_dtype` "auto" also its headers, byte for byte.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from core.checkpoints import DTYPE_BYTES, Checkpoint, TensorInfo
from worker.weights.delta import BoundDelta
from worker.weights.tensors import DTYPES, LENGTH_BYTES, Reader, make_header

OutputDtype = Literal["auto", "bfloat16", "float32"]
Fate = Literal["copy", "convert", "graft", "difference"]

#: The format's words for the dtypes that can be asked for.
_STORED = {"bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Piece:
    """A run of elements of one tensor with one fate."""

    info: TensorInfo
    fate: Fate
    #: Elements of the flattened tensor.
    first: int
    last: int
    #: Bytes of the output file.
    start: int
    end: int
    #: The format's word.
    dtype: str
    #: The delta of these elements is left out, and measured.
    discarded: bool = False

    @property
    def item(self) -> int:
        return DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Shard:
    file: str
    header: bytes
    #: Every tensor's name in the order of the bytes; one without elements has no piece.
    tensors: tuple[str, ...]
    #: In the order of their bytes, without gaps, from the header to the end.
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return self.pieces[-1].end if self.pieces else len(self.header)

    def blocks(self, size: int) -> list[tuple[int, int]]:
        """The file cut into blocks of at most `size` bytes; no cut goes through an element."""
        cuts = [0, *(self._cut(place) for place in range(size, self.bytes, size)), self.bytes]
        return [(start, end) for start, end in itertools.pairwise(cuts) if start < end]

    def stretches(self, start: int, end: int) -> Iterator[tuple[Piece, int, int]]:
        """Each piece with its first and last element between two bytes of the file, which cut no element."""
        for piece in self.pieces[self._at(start) : self._at(end - 1) + 1]:
            first = piece.first + (max(start, piece.start) - piece.start) // piece.item
            last = piece.first + (min(end, piece.end) - piece.start) // piece.item
            if first < last:
                yield piece, first, last

    def _cut(self, place: int) -> int:
        piece = self.pieces[self._at(place)]
        return place - max(0, place - piece.start) % piece.item

    def _at(self, place: int) -> int:
        """The number of the piece that holds a byte; of the first for the header's."""
        return max(0, bisect_right(self._starts, place) - 1)

    @cached_property
    def _starts(self) -> list[int]:
        return [piece.start for piece in self.pieces]


def plan_shards(
    checkpoint: Checkpoint, reader: Reader, bound: BoundDelta, *, scale: float, output_dtype: OutputDtype
) -> list[Shard]:
    """One shard for each of Instruct's, in their order."""
    return [
        _shard(file, infos, reader, bound, scale=scale, output_dtype=output_dtype)
        for file, infos in _files(checkpoint).items()
    ]


def plan_difference(checkpoint: Checkpoint, bound: BoundDelta, stem: str) -> list[Shard]:
    """The delta itself as float32: every tensor that the delta knows, in base's shards under the name `stem`."""
    files = [
        (file, [info for info in infos if info.name in bound.grafted]) for file, infos in _files(checkpoint).items()
    ]
    files = [(file, infos) for file, infos in files if infos]
    shards = []
    for number, (_, infos) in enumerate(files, start=1):
        file = f"{stem}.safetensors" if len(files) == 1 else f"{stem}-{number:05}-of-{len(files):05}.safetensors"
        header = make_header([(info, "F32") for info in infos], {"format": "pt"})
        pieces = _pieces([(info, "F32", [("difference", 0, info.elements, False)]) for info in infos], len(header))
        shards.append(Shard(file, header, tuple(info.name for info in infos), pieces))
    return shards


def _files(checkpoint: Checkpoint) -> dict[str, list[TensorInfo]]:
    """Each file's tensors in the order of their bytes."""
    files: dict[str, list[TensorInfo]] = {}
    for info in checkpoint.tensors.values():
        files.setdefault(info.file, []).append(info)
    return {file: sorted(infos, key=lambda info: (info.start, info.end)) for file, infos in files.items()}


def _shard(
    file: str,
    infos: list[TensorInfo],
    reader: Reader,
    bound: BoundDelta,
    *,
    scale: float,
    output_dtype: OutputDtype,
) -> Shard:
    dtypes = [_output(info, output_dtype) for info in infos]
    original = _header(reader, file, infos)
    if dtypes == [info.dtype for info in infos]:
        header = original
    else:
        metadata = json.loads(original[LENGTH_BYTES:]).get("__metadata__", {})
        header = make_header(list(zip(infos, dtypes, strict=True)), metadata)
    runs = [(info, dtype, _fates(info, dtype, bound, scale)) for info, dtype in zip(infos, dtypes, strict=True)]
    return Shard(file, header, tuple(info.name for info in infos), _pieces(runs, len(header)))


def _header(reader: Reader, file: str, infos: list[TensorInfo]) -> bytes:
    header = bytearray(infos[0].start)
    reader.bytes_into(memoryview(header), file, 0)
    return bytes(header)


def _output(info: TensorInfo, output_dtype: OutputDtype) -> str:
    return info.dtype if output_dtype == "auto" or info.dtype not in DTYPES else _STORED[output_dtype]


def _fates(info: TensorInfo, dtype: str, bound: BoundDelta, scale: float) -> list[tuple[Fate, int, int, bool]]:
    """Fate, first and last element, and whether a delta is left out, of each run of the tensor's elements."""
    kept: Fate = "copy" if dtype == info.dtype else "convert"
    if scale == 0 or (info.name not in bound.grafted and info.name not in bound.discarded):
        return [(kept, 0, info.elements, False)]
    columns = info.elements // info.shape[0] if info.shape and info.shape[0] else 0
    common = bound.common_rows[info.name] * columns if info.name in bound.common_rows else info.elements
    is_grafted = info.name in bound.grafted
    return [("graft" if is_grafted else kept, 0, common, not is_grafted), (kept, common, info.elements, False)]


def _pieces(runs: list[tuple[TensorInfo, str, list[tuple[Fate, int, int, bool]]]], position: int) -> tuple[Piece, ...]:
    pieces = []
    for info, dtype, fates in runs:
        for fate, first, last, discarded in fates:
            if first == last:
                continue
            end = position + (last - first) * DTYPE_BYTES[dtype]
            pieces.append(Piece(info, fate, first, last, position, end, dtype, discarded))
            position = end
    return tuple(pieces)
