"""What a rename needs to survive a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def sync_tree(folder: Path) -> None:
    """Make all that lies below `folder` durable, names included."""
    for below, _, names in os.walk(folder):
        for name in names:
            _sync(Path(below) / name)
        sync_folder(Path(below))


def sync_files(folder: Path) -> None:
    """Make every file directly in `folder`, and their names, durable."""
    for path in folder.iterdir():
        _sync(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable: the file's own sync does not cover its name."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
