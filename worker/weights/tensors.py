"""Rows of stored tensors. Every tensor is seen as a matrix (R, C): C is its last axis, R all others together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from core.checkpoints import TensorInfo
from core.errors import InvalidInput

#: The dtypes that can be grafted; `core.graft_plan` refuses all others.
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

#: Elements worked on at once. A few float32 copies of a chunk should fit the processor's second-level cache.
CHUNK_ELEMENTS = 256 * 1024


def matrix_shape(info: TensorInfo) -> tuple[int, int]:
    """(R, C). A vector is a column, so that it can be cut anywhere."""
    if len(info.shape) < 2:
        return info.elements, 1
    return math.prod(info.shape[:-1]), info.shape[-1]


def row_chunks(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """First row and row after the last of each chunk; none for a tensor without elements."""
    if info.elements == 0:
        return
    rows, columns = matrix_shape(info)
    step = max(1, CHUNK_ELEMENTS // columns)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def read_rows(folder: Path, info: TensorInfo, first: int, last: int) -> Tensor:
    """Rows `first` to `last` in the stored dtype, in memory of their own. InvalidInput: the file has been cut since."""
    columns = matrix_shape(info)[1]
    dtype = TORCH_DTYPES[info.dtype]
    buffer = bytearray((last - first) * columns * dtype.itemsize)
    with (folder / info.file).open("rb") as file:
        file.seek(info.start + first * columns * dtype.itemsize)
        if file.readinto(buffer) != len(buffer):
            raise InvalidInput(f"{folder.name}/{info.file} ends inside {info.name}", code="damaged_checkpoint")
    return torch.frombuffer(buffer, dtype=dtype).view(last - first, columns)  # (R', C)


def read_tensor(folder: Path, info: TensorInfo) -> Tensor:
    """The whole tensor in its own shape; for small ones."""
    return read_rows(folder, info, 0, matrix_shape(info)[0]).view(info.shape)
