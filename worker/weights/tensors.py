"""Elements of stored tensors, read by position into memory that is used over and over.

Reading into reused buffers and not through a memory map keeps the process small, and allocating for every chunk would
cost more than a third of the time (measured; see bench/graft.py).
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch
from torch import Tensor

from core.checkpoints import TensorInfo
from core.errors import InvalidInput, Unavailable

#: The dtypes that can be grafted; `core.graft_plan` refuses all others.
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

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

    def elements(self, info: TensorInfo, first: int, last: int, buffer: Buffer) -> Tensor:
        """Elements `first` to `last` of the flattened tensor, in the stored dtype, lying in `buffer`."""
        dtype = TORCH_DTYPES[info.dtype]
        values, view = buffer.view(dtype, last - first)
        self.bytes_into(view, info.file, info.start + first * dtype.itemsize)
        return values

    def tensor(self, info: TensorInfo) -> Tensor:
        """The whole tensor as float32 in its own shape; for small ones."""
        return self.elements(info, 0, info.elements, Buffer()).to(torch.float32).view(info.shape)

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
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._views: dict[tuple[torch.dtype, int], tuple[Tensor, memoryview]] = {}

    def view(self, dtype: torch.dtype, count: int) -> tuple[Tensor, memoryview]:
        """(count,) of `dtype`, and its bytes; what they hold is left over from the last use."""
        found = self._views.get((dtype, count))
        return found if found is not None else self._new_view(dtype, count)

    def floats(self, count: int) -> Tensor:
        """(count,) float32."""
        return self.view(torch.float32, count)[0]

    def _new_view(self, dtype: torch.dtype, count: int) -> tuple[Tensor, memoryview]:
        size = count * dtype.itemsize
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
            self._views.clear()
        if len(self._views) >= _VIEWS:
            self._views.clear()
        part = self._memory[:size]
        self._views[dtype, count] = part.view(dtype), part.numpy().data
        return self._views[dtype, count]


class Scratch:
    """What one thread computes in: small enough to stay in the processor's second-level cache."""

    def __init__(self) -> None:
        #: Values as they were read, for the moment of their conversion.
        self.raw, self.total = Buffer(), Buffer()
        #: Values in float32.
        self.kept32, self.change32, self.base32 = Buffer(), Buffer(), Buffer()
