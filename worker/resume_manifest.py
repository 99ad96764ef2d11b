"""manifest.json: what a resume point holds, written last. A folder without one that agrees is no resume point.

A point is a flat folder: its names come back from storage and stand in no path but its own.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from core.durable import sync_files
from core.errors import ShadowError
from worker.workspace import write_durably

MANIFEST_FILE = "manifest.json"


class PointRefused(ShadowError):
    """A resume point that is damaged, or that belongs to another training."""

    default_code = "resume_point_refused"
    retryable = True


class FileDigest(msgspec.Struct, frozen=True):
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    #: Optimizer steps done.
    step: int
    #: `JobSpec.training_sha256` of the training that made the point.
    spec: str
    files: dict[str, FileDigest]

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


def verify(folder: Path, *, spec: str) -> Manifest:
    """The manifest of `folder`, once every byte agrees with it. Raises PointRefused."""
    manifest = read_manifest(folder)
    if manifest.spec != spec:
        raise PointRefused(f"The resume point of step {manifest.step} was made by a training with another spec.")
    found = {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    if strange := found ^ manifest.files.keys():
        raise PointRefused(f"The resume point of step {manifest.step} and its manifest differ in {min(strange)}.")
    for name, listed in manifest.files.items():
        if _digest(folder / name) != listed:
            raise PointRefused(f"The file {name} of the resume point of step {manifest.step} is damaged.")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    try:
        return msgspec.json.decode((folder / MANIFEST_FILE).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PointRefused("A resume point has no manifest that can be read.") from error


def _digest(path: Path) -> FileDigest:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileDigest(bytes=file.tell(), sha256=digest.hexdigest())
