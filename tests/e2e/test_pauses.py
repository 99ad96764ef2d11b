"""Pause, resume, drain and retry of a real training, over HTTP and with the processes of a whole service."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from tests.e2e.conftest import Ready, artifacts, download, follow, has_ended, messages, prepare, roots, submit
from tests.e2e.test_life import processes
from tests.servers import run_service, wait_until

pytestmark = pytest.mark.xdist_group("e2e-main")

#: Enough steps to be met in the middle.
ROWS_AT_ONCE = {"n_epochs": 6, "batch_size": 2}
SHADOW = {"tuning": {"rank": 2, "learning_rate": 1e-3}, "evaluation": {"max_rows": 4}}


def at_step(ready: Ready, job_id: str, step: int) -> Any:
    return follow(
        ready, job_id, lambda found: found.phase == "training" and (found.progress or {}).get("step", 0) >= step
    )


def act(ready: Ready, job_id: str, verb: str) -> dict[str, Any]:
    return ready.client.post(f"/fine_tuning/jobs/{job_id}/{verb}", cast_to=dict[str, Any])


def steps_of(contents: dict[str, bytes]) -> list[int]:
    return [json.loads(line)["step"] for line in contents["metrics.jsonl"].splitlines()]


def resume_files(ready: Ready, job_id: str) -> list[str]:
    folder = ready.data_dir / "storage" / "jobs" / job_id / "resume"
    return [path.name for path in folder.rglob("*") if path.is_file()]


def test_a_paused_training_frees_its_worker_and_goes_on_to_the_same_result(embedded: Ready, tmp_path):
    job = submit(embedded, SHADOW, hyperparameters=ROWS_AT_ONCE, seed=1)
    at_step(embedded, job.id, 3)

    asked = act(embedded, job.id, "pause")
    assert asked["status"] == "pausing"
    paused = follow(embedded, job.id, lambda found: found.status == "paused")
    assert not processes(embedded, "worker.steps.train")
    assert paused.error is None
    assert "manifest.json" in resume_files(embedded, job.id)
    whole = submit(embedded, SHADOW, hyperparameters=ROWS_AT_ONCE, seed=1)  # the lane is free
    follow(embedded, whole.id, has_ended)

    assert act(embedded, job.id, "resume")["status"] == "queued"
    ended = follow(embedded, job.id, has_ended)

    assert (ended.status, ended.attempt) == ("succeeded", 2)
    mine, other = (download(embedded, each, tmp_path / each) for each in (job.id, whole.id))
    assert steps_of(mine) == steps_of(other)
    assert mine["metrics.jsonl"] == other["metrics.jsonl"]
    assert mine["model/model.safetensors"] == other["model/model.safetensors"]
    wait_until(lambda: not resume_files(embedded, job.id))  # nobody goes on from there any more


@pytest.mark.slow
def test_a_stopped_service_saves_the_training_and_its_next_start_goes_on(tiny, tmp_path):
    env = roots(tiny)
    with run_service(env, tmp_path) as first:
        own = prepare(first, tiny)
        job = submit(own, SHADOW, hyperparameters=ROWS_AT_ONCE)
        reached = at_step(own, job.id, 3).progress["step"]
        own.process.send_signal(signal.SIGTERM)
        own.process.wait(60)
    with run_service(env, tmp_path) as second:
        again = prepare(second, tiny)
        ended = follow(again, job.id, has_ended)
        assert (ended.status, ended.attempt) == ("succeeded", 2)
        (saved,) = [message for message in messages(again, job.id) if message.startswith("Saved the training's state")]
        assert int(saved.rpartition(" ")[2]) >= reached
        assert artifacts(again, job.id)
