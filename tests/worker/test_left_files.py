"""What a worker opens of a step's folder is a plain file in that folder, or is not opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from core.errors import StepFailed
from worker import left_files
from worker.left_files import open_left, read_left


@pytest.fixture
def folder(tmp_path):
    """A step's folder beside a secret."""
    made = tmp_path / "job" / "train"
    made.mkdir(parents=True)
    (made / "result.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "key").write_text("secret")
    return made


def link(folder):
    (folder / "key").symlink_to(folder.parents[1] / "elsewhere" / "key")
    return folder / "key"


def link_in_the_way(folder):
    (folder / "adapter").symlink_to(folder.parents[1] / "elsewhere")
    return folder / "adapter" / "key"


def way_out(folder):
    return folder / ".." / ".." / "elsewhere" / "key"


def pipe(folder):
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


@pytest.mark.parametrize("strange", [link, link_in_the_way, way_out, pipe, Path.resolve])
def test_what_is_no_plain_file_of_the_step_is_not_opened(folder, strange):
    with pytest.raises(StepFailed, match="The job left") as caught:
        open_left(strange(folder), below=folder.parent)
    assert "hint" in caught.value.cause.as_dict()


def test_a_file_of_the_step_is_read_also_where_it_has_a_second_name_and_the_folders_above_are_links(folder, tmp_path):
    (folder / "again").hardlink_to(folder / "result.json")
    (tmp_path / "work").symlink_to(folder.parent)
    assert read_left(tmp_path / "work" / "train" / "again", below=tmp_path / "work") == b"{}"


def test_a_file_that_is_longer_than_any_of_ours_does_not_fill_the_memory(folder, monkeypatch):
    monkeypatch.setattr(left_files, "MAX_READ_BYTES", 1)
    with pytest.raises(StepFailed, match=r"train/result\.json, which is longer than 1 bytes"):
        read_left(folder / "result.json", below=folder.parent)


def test_a_file_that_is_missing_is_said_to_be(folder):
    with pytest.raises(FileNotFoundError):
        read_left(folder / "report.json", below=folder.parent)
