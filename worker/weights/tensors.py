"""Elements of stored tensors, read by position into memory that is used over and over.

Reading into reused buffers and not through a memory map keeps the process small, and allocating for every chunk would
cost more than a third of the time (measured; see bench/graft.py). numpy has no bfloat16: its bits lie in uint16.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from core.checkpoints import DTYPE_BYTES, TensorInfo
from core.errors import InvalidInput, Unavailable
from worker.weights import kernels
from worker.weights.kernels import Array

Dtype = np.dtype[Any]
BF16: Dtype = np.dtype(np.uint16)
F16: Dtype = np.dtype(np.float16)
F32: Dtype = np.dtype(np.float32)
#: The dtypes that can be grafted, as they are held here; `core.graft_plan` refuses all others.
DTYPES = {"F32": F32, "F16": F16, "BF16": BF16}

#: Of the length that a safetensors file begins with.
LENGTH_BYTES = 8

#: Elements worked on at once: large enough that calling costs little, small enough for the caches.
CHUNK_ELEMENTS = 128 * 1024
#: Views kept of one buffer: chunks have one size but for the last of each tensor and block.
_VIEWS = 256


class Reader:
    """The safetensors files of one folder. Threads share it: it reads by position and keeps no cursor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def elements(self, info: TensorInfo, first: int, last: int, buffer: Buffer) -> Array:
        """Elements `first` to `last` of the flattened tensor, as they are stored, lying in `buffer`."""
        dtype = DTYPES[info.dtype]
        values, view = buffer.view(dtype, last - first)
        self.bytes_into(view, info.file, info.start + first * dtype.itemsize)
        return values

    def values(self, info: TensorInfo, first: int, last: int, slot: Slot) -> Array:
        """The same elements as the kernels take them, lying in `slot`: float16 becomes float32."""
        found = self.elements(info, first, last, slot.stored)
        if found.dtype != F16:
            return found
        wide = slot.wide.floats(last - first)
        with np.errstate(invalid="ignore"):
            np.copyto(wide, found)
        return wide

    def tensor(self, info: TensorInfo) -> Array:
        """The whole tensor as float32 in its own shape; for small ones."""
        return widened(self.elements(info, 0, info.elements, Buffer())).reshape(info.shape)

    def bytes_into(self, view: memoryview, file: str, start: int) -> None:
        """Fill `view` with the file's bytes from `start`. InvalidInput: the file has been cut since it was planned."""
        descriptor = self._descriptors.get(file) or self._open(file)
        try:
            done = os.preadv(descriptor, [view], start)
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], start + done)
                if count == 0:
                    raise self._cut(file, start + done)
                done += count
        except OSError as error:
            raise self._unreadable(file, error) from error

    def announce(self, info: TensorInfo, first: int, last: int) -> None:
        """Tell the system which elements are read next, so that a cold disk works ahead."""
        descriptor = self._descriptors.get(info.file) or self._open(info.file)
        item = info.nbytes // info.elements
        os.posix_fadvise(descriptor, info.start + first * item, (last - first) * item, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = os.open(self.folder / file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise self._unreadable(file, error) from error
            return self._descriptors[file]

    def _cut(self, file: str, place: int) -> InvalidInput:
        return InvalidInput(
            f"{self.folder.name}/{file} ends at byte {place}, in the middle of its weights",
            code="damaged_checkpoint",
            hint="Copy or download the file again.",
        )

    def _unreadable(self, file: str, error: OSError) -> Unavailable:
        return Unavailable(
            f"{self.folder.name}/{file} cannot be read ({error.strerror or error})",
            code="source_unreadable",
            hint="Look at the file's mode and at its disk.",
        )


class Buffer:
    """Memory that grows to the largest request and is then used again, and so are the views of it."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._views: dict[tuple[Dtype, int], tuple[Array, memoryview]] = {}

    def view(self, dtype: Dtype, count: int) -> tuple[Array, memoryview]:
        """(count,) of `dtype`, and its bytes; what they hold is left over from the last use."""
        found = self._views.get((dtype, count))
        return found if found is not None else self._new_view(dtype, count)

    def floats(self, count: int) -> Array:
        """(count,) float32."""
        return self.view(F32, count)[0]

    def _new_view(self, dtype: Dtype, count: int) -> tuple[Array, memoryview]:
        size = count * dtype.itemsize
        if len(self._memory) < size:
            self._memory = np.empty(size, np.uint8)
            self._views.clear()
        if len(self._views) >= _VIEWS:
            self._views.clear()
        part = self._memory[:size]
        self._views[dtype, count] = part.view(dtype), part.data
        return self._views[dtype, count]


class Slot:
    """The place of one operand: as it was read, and in float32 where the kernels do not take that."""

    def __init__(self) -> None:
        self.stored, self.wide = Buffer(), Buffer()


class Scratch:
    """What one thread computes in: small enough to stay in the processor's second-level cache."""

    def __init__(self) -> None:
        self.kept, self.base, self.tuned, self.total = Slot(), Slot(), Slot(), Slot()
        #: The change in float32, and the output where it cannot be made in its place.
        self.change, self.out = Buffer(), Buffer()


def make_header(tensors: list[tuple[TensorInfo, str]], metadata: dict[str, str]) -> bytes:
    """A safetensors header, padded to a multiple of 8 as the format asks
    (https://huggingface.co/docs/safetensors/index#format)."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for info, dtype in tensors:
        end = position + info.elements * DTYPE_BYTES[dtype]
        entries[info.name] = {"dtype": dtype, "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def widened(values: Array) -> Array:
    """Stored values in float32, which holds each of them; new memory, unless they are float32 already."""
    if values.dtype == BF16:
        wide = np.empty(len(values), F32)
        kernels.store(values, wide)
        return wide
    with np.errstate(invalid="ignore"):
        return values.astype(F32, copy=False)


def rounded(values: Array, dtype: Dtype) -> Array:
    """(n,) float32 values as they are stored in `dtype`."""
    if dtype == BF16:
        stored = np.empty(len(values), BF16)
        kernels.store(values, stored)
        return stored
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype, copy=False)
