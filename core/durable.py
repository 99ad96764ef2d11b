"""What a rename needs to survive a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def sync_files(folder: Path) -> None:
    """Make every file directly in `folder`, and their names, durable."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable: the file's own sync does not cover its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
