"""Upload, submit, poll, download: the whole way, over HTTP, with real processes and the unmodified SDK."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import TUNING, Ready, Tiny, artifacts, download, follow, has_ended, messages, submit
from tests.servers import wait_until

pytestmark = pytest.mark.xdist_group("e2e-main")


@pytest.fixture(scope="session")
def job_on_servers(make_ready, outside_servers) -> tuple[Ready, Any]:
    """One that leaves everything to the service."""
    ready = make_ready(outside_servers)
    job = submit(ready, {"tuning": TUNING})
    return ready, follow(ready, job.id, has_ended)


@pytest.mark.parametrize("kind", ["shadow_job", "job_on_servers"])
def test_a_shadow_job_succeeds_on_embedded_parts_and_on_servers(request: pytest.FixtureRequest, kind: str):
    ready, ended = request.getfixturevalue(kind)

    assert ended.status == "succeeded", ended.error
    assert ended.fine_tuned_model.startswith("ft:tiny:default:")
    assert ended.trained_tokens > 0
    assert messages(ready, ended.id)[-1] == "The job has successfully completed"
    wait_until(lambda: not list((ready.data_dir / "work").iterdir()))  # tidied up just after


def test_events_are_worded_as_tools_expect(shadow_job):
    ready, job = shadow_job
    said = messages(ready, job.id)

    assert said[0] == f"Created fine-tuning job: {job.id}"
    assert said[1].startswith("Validating training file: file-")
    assert "Files validated, moving job to queued state" in said
    assert "Fine-tuning job started" in said
    assert any(line.startswith("Step 1/") and "training loss=" in line for line in said)
    assert f"New fine-tuned model created: {job.fine_tuned_model}" in said
    assert [line for line in said if "completed" in line] == [said[-1]]


def test_auto_hyperparameters_have_become_numbers(job_on_servers):
    _, job = job_on_servers

    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (1, 32)
    assert job.hyperparameters.learning_rate_multiplier == 1.0
    assert job.shadow["tuning"]["alpha"] == 8


def test_a_success_tells_how_much_of_the_change_the_graft_holds(shadow_job):
    _, job = shadow_job
    result = job.graft_result

    assert 0.9 < result["fidelity"] <= 1
    assert (result["scale"], result["discarded_share"]) == (1.0, 0.0)
    assert -1 <= result["cosine"] <= 1
    assert "layers" not in result


def test_every_download_has_the_hash_that_the_list_names(shadow_job, tmp_path: Path):
    ready, job = shadow_job
    contents = download(ready, job.id, tmp_path)

    for artifact in artifacts(ready, job.id):
        assert hashlib.sha256(contents[artifact["path"]]).hexdigest() == artifact["sha256"], artifact["path"]
    manifest = json.loads(contents["manifest.json"])
    assert manifest["files"].keys() == contents.keys() - {"manifest.json"}


def test_the_downloaded_model_is_instruct_plus_the_adapters_change(shadow_job, tiny: Tiny, tmp_path: Path):
    """The law of the method, checked on what a user gets: W_out = W_instruct + alpha / rank * B A."""
    ready, job = shadow_job
    download(ready, job.id, tmp_path)
    out, instruct = load_file(tmp_path / "model/model.safetensors"), load_file(tiny.instruct / "model.safetensors")
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")

    name = "model.layers.0.self_attn.q_proj"
    b, a = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA")
    assert torch.allclose(out[f"{name}.weight"], instruct[f"{name}.weight"] + 2.0 * (b @ a), atol=1e-7)
    assert torch.equal(out["model.embed_tokens.weight"], instruct["model.embed_tokens.weight"])


def test_the_downloaded_model_loads_and_answers(shadow_job, tmp_path: Path):
    ready, job = shadow_job
    download(ready, job.id, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=False)

    question = [{"role": "user", "content": "sun 0"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_the_evaluation_holds_every_variant_side_by_side(shadow_job):
    ready, job = shadow_job
    evaluation = ready.client.get(f"/fine_tuning/jobs/{job.id}/evaluation", cast_to=dict)

    assert evaluation["variants"] == ["instruct", "base_tuned", "grafted@1", "grafted@0.5"]
    assert evaluation["sets"]["validation"]["results"].keys() == set(evaluation["variants"])
    assert evaluation["verdict"]["summary"]


def test_the_result_file_is_a_csv_of_the_metrics(shadow_job):
    ready, job = shadow_job
    content = ready.client.files.content(job.result_files[0]).text

    lines = content.splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert len(lines) >= 3
    assert ready.client.files.retrieve(job.result_files[0]).purpose == "fine-tune-results"


@pytest.fixture
def direct_job(embedded: Ready):
    job = submit(embedded, {"strategy": "direct", "tuning": {"type": "full", "learning_rate": 1e-3}})
    return embedded, follow(embedded, job.id, has_ended)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["shadow", "direct"])
def test_full_tuning_works_both_ways(request: pytest.FixtureRequest, tiny: Tiny, strategy: str, tmp_path: Path):
    ready, job = request.getfixturevalue("full_job" if strategy == "shadow" else "direct_job")

    assert job.status == "succeeded", job.error
    download(ready, job.id, tmp_path)
    out, instruct = load_file(tmp_path / "model/model.safetensors"), load_file(tiny.instruct / "model.safetensors")
    changed = {name for name in out if not torch.equal(out[name], instruct[name])}
    # Scope `linear` leaves the embeddings as they are; direct tuning keeps everything that it learned.
    assert ("model.embed_tokens.weight" in changed) == (strategy == "direct")
    assert "model.layers.0.mlp.up_proj.weight" in changed


def test_a_file_with_a_bad_row_fails_the_job_with_the_row(embedded: Ready):
    rows = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"messages": 3}\n'
    file = embedded.client.files.create(file=("bad.jsonl", rows), purpose="fine-tune")
    job = submit(embedded, {}, training_file=file.id)

    ended = follow(embedded, job.id, has_ended)

    assert (ended.status, ended.error.code, ended.error.param) == ("failed", "invalid_training_file", "training_file")
    assert "line 2" in ended.error.message
    assert embedded.client.files.retrieve(file.id).status == "error"
