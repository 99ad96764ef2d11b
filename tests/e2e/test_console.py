"""The console's whole way with real workers: check, create and watch, on a terminal and in a pipe, download."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.console import on_a_terminal
from tests.e2e.conftest import Tiny, artifacts

pytestmark = pytest.mark.xdist_group("e2e-main")

OPTIONS = ("--model", "tiny", "--learning-rate", "1e-2", "--rank", "4", "--scales", "0.5")
VARIANTS = ("untouched instruct", "tuned base", "grafted instruct x 0.5", "grafted instruct x 1 (published)")


@pytest.fixture
def console(shadowft, monkeypatch, embedded, tmp_path):
    """`shadowft …` as the admin of the service with real workers, in an empty folder."""
    monkeypatch.setenv("SHADOWFT_URL", embedded.url)
    monkeypatch.setenv("SHADOWFT_API_KEY", embedded.client.api_key)
    monkeypatch.chdir(tmp_path)
    return shadowft


@pytest.mark.slow
def test_a_job_is_estimated_created_watched_and_downloaded(console, embedded, tiny: Tiny):
    uploaded = console("files", "upload", tiny.rows, "--wait")
    assert uploaded.status == 0, uploaded.err

    estimated = console("jobs", "estimate", *OPTIONS, "--training-file", tiny.rows)
    assert estimated.status == 0, estimated.err
    for word in ("tiny ok", "on cpu", "fits"):
        assert word in estimated.out

    with on_a_terminal("jobs", "create", *OPTIONS, "--training-file", tiny.rows, "--watch") as terminal:
        assert terminal.wait() == 0, terminal.shown
    for word in ("Fine-tuning job started", *VARIANTS, "is made."):
        assert word in terminal.shown

    job = embedded.client.fine_tuning.jobs.list(limit=1).data[0]
    watched = console("jobs", "watch", job.id)
    assert (watched.status, "\x1b" in watched.out) == (0, False)
    lines = [" ".join(line.split()) for line in watched.out.splitlines()]
    assert any("Step 1/" in line for line in lines)
    assert len([line for line in lines if line.startswith(VARIANTS)]) == len(VARIANTS)
    assert f"{job.fine_tuned_model} is made." in lines
    assert sum(line.endswith("The job has successfully completed") for line in lines) == 1

    saved = console("jobs", "download", job.id)
    assert saved.status == 0, saved.err
    listed = {one["path"]: one["bytes"] for one in artifacts(embedded, job.id)}
    found = {str(path.relative_to(job.id)): path.stat().st_size for path in Path(job.id).rglob("*") if path.is_file()}
    assert found == listed

    (checkpoint,) = embedded.client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert checkpoint.id in console("jobs", "checkpoints", job.id).out


def test_a_file_that_cannot_be_trained_on_is_known_when_the_upload_waits(console):
    Path("bad.jsonl").write_text("no json\n")
    done = console("files", "upload", "bad.jsonl", "--wait")
    assert done.status == 1
    file_id = done.out.strip()
    report = console("files", "report", file_id)
    assert "line 1" in report.out
    here = json.loads(console("files", "check", "bad.jsonl", "--format", "json").out)
    assert json.loads(console("files", "report", file_id, "--format", "json").out) == here
