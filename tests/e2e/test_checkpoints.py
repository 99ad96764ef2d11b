"""The ends of epochs: kept, listed, and made into models on demand; and what the job's time says about the next one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import EPOCHS, TUNING, Ready, Tiny, download, graft, messages
from tests.servers import PLAIN

pytestmark = pytest.mark.xdist_group("e2e-main")

Q = "model.layers.0.self_attn.q_proj"


def listed(ready: Ready, job: Any) -> list[Any]:
    return list(ready.client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))


def test_the_last_epochs_are_listed_newest_first_with_what_was_measured(shadow_job):
    ready, job = shadow_job
    assert job.status == "succeeded", job.error
    found = listed(ready, job)
    steps = [checkpoint.step_number for checkpoint in found]
    per_epoch = steps[0] // EPOCHS
    assert steps[:3] == [epoch * per_epoch for epoch in (5, 4, 3)]
    assert len(steps) in {3, 4}  # the best one may be among them
    for checkpoint in found:
        assert checkpoint.fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-{checkpoint.step_number}"
        assert checkpoint.metrics.train_loss > 0
        assert checkpoint.metrics.full_valid_loss > 0
    assert found == listed(ready, job)


def test_checkpoints_are_told_of_before_the_new_model(shadow_job):
    ready, job = shadow_job
    steps = [checkpoint.step_number for checkpoint in listed(ready, job)][::-1]
    said = messages(ready, job.id)
    created = [f"Checkpoint created at step {step}" for step in steps]
    assert said[-2 - len(steps) : -2] == created
    assert said[-2].startswith("New fine-tuned model created: ")


def test_a_checkpoints_name_is_made_into_a_model(shadow_job, tiny: Tiny, tmp_path: Path):
    ready, job = shadow_job
    first = listed(ready, job)[-1]
    made = graft(ready, first.fine_tuned_model_checkpoint, evaluation={"compare": False})
    assert made["status"] == "succeeded", made["error"]

    download(ready, made["id"], tmp_path / "graft")
    download(ready, job.id, tmp_path / "job")
    adapter = load_file(tmp_path / f"job/checkpoints/step-{first.step_number}/adapter_model.safetensors")
    out, instruct = (
        load_file(path) for path in (tmp_path / "graft/model/model.safetensors", tiny.instruct / "model.safetensors")
    )
    b, a = (adapter[f"base_model.model.{Q}.lora_{part}.weight"] for part in "BA")
    assert torch.allclose(out[f"{Q}.weight"], instruct[f"{Q}.weight"] + 2.0 * (b @ a), atol=1e-7)
    last = load_file(tmp_path / "job/adapter/adapter_model.safetensors")
    assert not torch.equal(last[f"base_model.model.{Q}.lora_B.weight"], b)


def test_the_last_checkpoint_is_the_published_model(shadow_job, tmp_path: Path):
    ready, job = shadow_job
    made = graft(ready, listed(ready, job)[0].id, evaluation={"compare": False})
    of_job, of_graft = (download(ready, each, tmp_path / each) for each in (job.id, made["id"]))
    assert of_job["model/model.safetensors"] == of_graft["model/model.safetensors"]


@pytest.mark.slow
def test_an_estimate_knows_the_tokens_and_the_time_of_the_job_before_it(shadow_job):
    ready, _ = shadow_job
    body = {"model": "tiny", "training_file": ready.file_id, "shadow": {"tuning": TUNING}}
    told = ready.client.post("/fine_tuning/jobs/estimate", body=body, cast_to=dict[str, Any])
    assert told["tokens"]["source"] == "counted"
    assert told["fits"] is True
    assert 0 < told["seconds"]["low"] < told["seconds"]["high"]
    assert told["memory_bytes"]["cpu"] > 0


def test_the_jobs_phases_are_in_the_metrics(shadow_job):
    ready, _ = shadow_job
    text = httpx.get(f"{ready.url}/metrics", verify=PLAIN, timeout=30).text
    for phase in ("preparing", "training", "grafting", "evaluating", "publishing"):
        assert f'shadowft_job_phase_duration_seconds_count{{device="cpu",phase="{phase}"}}' in text
