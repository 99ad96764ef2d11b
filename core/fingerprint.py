"""What tells one state of a model from another without reading its weights whole."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from core.checkpoints import Checkpoint, is_small_file
from core.errors import Unavailable

if TYPE_CHECKING:
    from core.job_spec import ModelSource

_LENGTH_BYTES = 8
_SAMPLES, _SAMPLE_BYTES = 64, 64 * 1024


def model_fingerprint(source: ModelSource, checkpoint: Checkpoint) -> str:
    """Of a pinned Hub model its commit; of a local folder a hash of its small files, and of its weight files' state on
    disk, headers and sampled weights.

    Unavailable: a file of the folder cannot be read, although its header could a moment ago.
    """
    if source.kind == "hub":
        return f"{source.location}@{source.revision}"
    try:
        return _folder_fingerprint(Path(source.location), checkpoint)
    except OSError as error:
        raise Unavailable(
            f"{source.location} changed while it was read ({error.strerror or error}).",
            code="storage_unavailable",
            hint="Try again once the folder stays as it is.",
        ) from error


def content_sha256(folder: Path, checkpoint: Checkpoint) -> str:
    """Of a folder's small files, and of its weight files' headers and sampled weights: a copy elsewhere has it, too."""
    small = (path for path in folder.iterdir() if is_small_file(path.name) and path.is_file())
    taken = hashlib.sha256()
    for path in sorted(small):
        taken.update(f"{path.name} {_sha256(path)}\n".encode())
    for file in sorted(checkpoint.files):
        taken.update(f"{file} {header_sha256(folder / file)} {sampled_sha256(folder / file)}\n".encode())
    return taken.hexdigest()


def _folder_fingerprint(folder: Path, checkpoint: Checkpoint) -> str:
    taken = hashlib.sha256(content_sha256(folder, checkpoint).encode())
    for file in sorted(checkpoint.files):
        taken.update(f"{_state(folder / file)}\n".encode())
    return taken.hexdigest()


def _state(path: Path) -> str:
    """What changes with the file even where no sample does, such as when a few wrong weights are mended."""
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_sha256(path: Path) -> str:
    """Of the size and of 64 pieces of 64 KiB, evenly spread; of a smaller file, of all.

    Enough to tell two checkpoints apart, in which training has moved every weight, without reading them.
    """
    size = path.stat().st_size
    taken = hashlib.sha256(size.to_bytes(_LENGTH_BYTES, "little"))
    step = max(_SAMPLE_BYTES, size // _SAMPLES)
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            taken.update(file.read(_SAMPLE_BYTES))
    return taken.hexdigest()


def header_sha256(path: Path) -> str:
    """Of a safetensors file's header; of a file that is none, of as much as its first bytes would ask for."""
    with path.open("rb") as file:
        length = file.read(_LENGTH_BYTES)
        asked = min(int.from_bytes(length, "little"), path.stat().st_size)
        return hashlib.sha256(length + file.read(asked)).hexdigest()
