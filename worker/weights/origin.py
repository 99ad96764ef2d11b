"""What `shadow.json` says of where a model comes from."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.checkpoints import TensorInfo
from worker.weights.files import MANIFEST_FILE, sha256_of

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Origin:
    """A repository, a run, a folder's name; never a machine's path."""

    name: str
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    #: By role: instruct, base, tuned, adapter, delta. A role without a name gets its folder's.
    names: Mapping[str, Origin] = field(default_factory=dict)
    pair: str | None = None
    #: Also where the folders lie, seen from the output: for `verify` on the same machine.
    keep_paths: bool = False

    def describe(
        self, role: str, folder: Path, tensors: Mapping[str, TensorInfo], out: Path, *, hashed: bool
    ) -> dict[str, Any]:
        origin = self.names.get(role) or Origin(folder.resolve().name)
        path = {"path": os.path.relpath(folder.resolve(), out.resolve())} if self.keep_paths else {}
        files = sorted({info.file for info in tensors.values()})
        return {
            "name": origin.name,
            "revision": origin.revision,
            **path,
            "files": {file: describe_file(folder / file, hashed=hashed) for file in files},
        }


def describe_file(path: Path, *, hashed: bool) -> dict[str, Any]:
    """Size, the header's hash, and the whole file's where it is on record or (`hashed`) asked for."""
    recorded = _recorded(path)
    return {
        "bytes": path.stat().st_size,
        "header_sha256": hashlib.sha256(_header(path)).hexdigest(),
        "sha256": sha256_of(path) if hashed and recorded is None else recorded,
    }


def fingerprint(path: Path) -> list[Any]:
    """What changes when the file does, without reading it: enough to know that a draft's sources are the same."""
    status = path.stat()
    return [
        path.name,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        hashlib.sha256(_header(path)).hexdigest(),
    ]


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = file.read(_LENGTH_BYTES)
        return length + file.read(int.from_bytes(length, "little"))


def _recorded(path: Path) -> str | None:
    """A hash taken when the file came here: the Hub's cache names its blobs so, and our folders have a manifest."""
    blob = path.resolve().name
    if path.is_symlink() and _SHA256.fullmatch(blob):
        return blob
    manifest = path.with_name(MANIFEST_FILE)
    if not manifest.exists():
        return None
    try:
        record = json.loads(manifest.read_bytes())["files"][path.name]
        return str(record["sha256"]) if record["bytes"] == path.stat().st_size else None
    except (ValueError, LookupError, TypeError):  # somebody else's file of that name
        return None
