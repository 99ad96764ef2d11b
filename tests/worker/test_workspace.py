"""Whose a job's folder is: that of the newest attempt that runs on this machine, and nobody else's."""

from __future__ import annotations

import pytest

from core.storage import LocalStorage
from worker import sandbox
from worker.sandbox import Walls
from worker.workspace import open_workspace, remove_workspaces, write_durably

JOB = "ftjob-a1"


@pytest.fixture
def enter(tmp_path):
    """`enter(attempt)`: its workspace."""
    return lambda attempt: open_workspace(tmp_path, JOB, attempt)


def finish(workspace, step):
    (workspace.begin(step) / "result.json").write_text("{}")
    write_durably(workspace.done(step), b"{}")


def folders(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_an_attempt_goes_on_in_the_folder_of_the_one_before_it(enter, tmp_path):
    finish(enter(1), "train")
    for attempt in (2, 9, 10):
        assert enter(attempt).done("train").exists()
        assert folders(tmp_path) == [f"{JOB}-a{attempt}"]


def test_an_attempt_that_comes_too_late_takes_nothing_from_a_newer_one(enter):
    finish(enter(1), "train")
    newer, late = enter(3), enter(2)
    assert (newer.done("train").exists(), late.done("train").exists()) == (True, False)
    assert enter(4).done("train").exists()


def test_other_jobs_keep_their_folders(enter, tmp_path):
    for other in ("ftjob-a", "ftjob-a12"):
        finish(open_workspace(tmp_path, other, 1), "train")
    assert list(enter(2).root.iterdir()) == []
    remove_workspaces(tmp_path, JOB)
    assert folders(tmp_path) == ["ftjob-a-a1", "ftjob-a12-a1"]


#: What a worker may be about to do with its workspace at the moment in which it is frozen.
WRITES = {
    "begin a step": lambda late, storage: late.begin("train"),
    "begin a step that is resumed": lambda late, storage: late.begin("graft"),
    "fetch an input": lambda late, storage: storage.fetch("rows", late.training),
    "fetch a saved state": lambda late, storage: storage.fetch("jobs/1/resume/a1/step-4", late.resume_from),
    "write a file": lambda late, storage: write_durably(late.spec_file, b"{}"),
    "start a child": lambda late, storage: sandbox.command(
        ["true"], walls=Walls(), workspace=late.root, folder=late.step("train"), device="cpu"
    ),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
def test_whatever_an_attempt_does_that_wakes_too_late_leads_nowhere(enter, tmp_path, write):
    late = enter(1)
    finish(late, "train")
    enter(2)
    with pytest.raises(FileNotFoundError):
        WRITES[write](late, LocalStorage(tmp_path / "storage"))
    assert folders(tmp_path) == [f"{JOB}-a2"]
    assert enter(3).done("train").exists()
