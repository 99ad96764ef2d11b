"""manifest.json: what a resume point holds, written last. A folder without one that agrees is no resume point.

A point is a flat folder: its names come back from storage and stand in no path but its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from core.durable import sync_files
from core.errors import ShadowError, StepFailed
from core.storage import COPY_BYTES
from worker.left_files import open_left
from worker.workspace import write_durably

MANIFEST_FILE = "manifest.json"

#: A file of a point. The worker makes paths and keys of names that a step wrote down.
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)

#: Of what the files hold. Raised where a point of before can not be gone on from any more.
FORMAT = 1


class PointRefused(ShadowError):
    """A resume point that is damaged, that belongs to another training, or that this version cannot load."""

    default_code = "resume_point_refused"
    retryable = True

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            hint="The training goes on from an older state, or from its beginning. If states are refused again and "
            "again, the operator looks after the disks of the worker and the storage.",
        )


class FileDigest(msgspec.Struct, frozen=True):
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    #: Optimizer steps done.
    step: int
    #: `JobSpec.training_sha256` of the training that made the point.
    spec: str
    files: dict[str, FileDigest]
    format: int = FORMAT

    def __post_init__(self) -> None:
        if strange := [name for name in self.files if not _NAME.fullmatch(name)]:
            raise ValueError(f"{strange[0]!r} is no name of a file of a point")

    @property
    def total_bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


def seal(folder: Path, *, step: int, spec: str) -> Manifest:
    """Make every file of `folder` durable and leave the manifest beside them."""
    files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    sync_files(folder)
    manifest = Manifest(step=step, spec=spec, files=files)
    write_durably(folder / MANIFEST_FILE, msgspec.json.encode(manifest))
    return manifest


def verify(folder: Path, *, spec: str, check: Callable[[], None] = lambda: None) -> Manifest:
    """The manifest of `folder`, once every byte agrees with it; `check` is asked meanwhile.

    Raises PointRefused where the point will never do, and OSError where it cannot be read just now.
    """
    manifest = read_manifest(folder)
    if manifest.format != FORMAT:
        raise PointRefused(
            f"The resume point of step {manifest.step} is written in format {manifest.format}; this version reads "
            f"{FORMAT}."
        )
    if manifest.spec != spec:
        raise PointRefused(f"The resume point of step {manifest.step} was made by a training with another spec.")
    found = {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    if strange := found ^ manifest.files.keys():
        raise PointRefused(f"The resume point of step {manifest.step} and its manifest differ in {min(strange)}.")
    for name, listed in manifest.files.items():
        if _digest(folder / name, check) != listed:
            raise PointRefused(f"The file {name} of the resume point of step {manifest.step} is damaged.")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Raises PointRefused and OSError as `verify` does: a storage that is away for a moment loses no point, and only
    what is missing where its surroundings are there is lost."""
    try:
        with _open(folder / MANIFEST_FILE) as file:
            return msgspec.json.decode(file.read(), type=Manifest)
    except FileNotFoundError as error:
        if not folder.resolve().parent.is_dir():
            raise
        raise PointRefused("A resume point has no manifest.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PointRefused("A resume point has no manifest that can be read.") from error


def _digest(path: Path, check: Callable[[], None] = lambda: None) -> FileDigest:
    digest = hashlib.sha256()
    with _open(path) as file:
        while piece := file.read(COPY_BYTES):
            digest.update(piece)
            check()
        return FileDigest(bytes=file.tell(), sha256=digest.hexdigest())


def _open(path: Path) -> BinaryIO:
    try:
        return open_left(path, below=path.parent)
    except StepFailed as error:
        raise PointRefused(error.message) from error
