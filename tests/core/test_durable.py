"""What has to reach the disk before a mark says so."""

from __future__ import annotations

import os

from core.durable import sync_tree


def test_every_file_and_folder_below_reaches_the_disk(tmp_path, monkeypatch):
    (tmp_path / "adapter" / "deep").mkdir(parents=True)
    for name in ("result", "adapter/weights", "adapter/deep/more"):
        (tmp_path / name).write_bytes(b"x")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    sync_tree(tmp_path)
    assert sorted(synced) == sorted(path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*")))
