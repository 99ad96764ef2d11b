"""What `shadow.json` says of where a model comes from."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.checkpoints import ADAPTER_CONFIG_FILE, CONFIG_FILE
from core.fingerprint import header_sha256, sampled_sha256
from worker.weights.files import sha256_of
from worker.weights.special_rows import START_ROWS_FILE

_SHA256 = re.compile(r"[0-9a-f]{64}")


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

    def describe(self, role: str, folder: Path, weights: list[str], out: Path, *, hashed: bool) -> dict[str, Any]:
        """`weights` are the names of the safetensors files that are read."""
        origin = self.names.get(role) or Origin(folder.resolve().name)
        path = {"path": os.path.relpath(folder.resolve(), out.resolve())} if self.keep_paths else {}
        configs = {file: describe_config(folder / file) for file in config_files(folder)}
        return {
            "name": origin.name,
            "revision": origin.revision,
            **path,
            "files": configs | {file: describe_weights(folder / file, hashed=hashed) for file in weights},
        }


def config_files(folder: Path) -> list[str]:
    """What says how the weights are to be read, and from where a tuning began."""
    return [file for file in (CONFIG_FILE, ADAPTER_CONFIG_FILE, START_ROWS_FILE) if (folder / file).is_file()]


def describe_weights(path: Path, *, hashed: bool) -> dict[str, Any]:
    """Size, hashes of header and samples, and that of the whole file where its name in the Hub's cache is one, or where
    it is asked for (`hashed`).

    Not from a manifest beside it: that says what lay there once, and no time of a file says that it still does. Whoever
    copies or moves a file chooses its mtime, and a copied folder has new ctimes in any order.
    """
    return {
        "bytes": path.stat().st_size,
        "header_sha256": header_sha256(path),
        "sampled_sha256": sampled_sha256(path),
        "sha256": _blob_sha256(path) or (sha256_of(path) if hashed else None),
    }


def describe_config(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def fingerprint(path: Path) -> list[Any]:
    """What changes when the file does, without reading it. Not ctime, which another link to the file changes too."""
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns, status.st_ino]


def _blob_sha256(path: Path) -> str | None:
    """The Hub's cache names its blobs by the hash that was checked when they came."""
    blob = path.resolve().name
    return blob if path.is_symlink() and _SHA256.fullmatch(blob) else None
