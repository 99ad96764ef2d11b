"""What a job learned is grafted again, over HTTP, with real processes: another scale, another dtype, no training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import FULL_GRAFT, Ready, Tiny, download, graft, messages

pytestmark = pytest.mark.xdist_group("e2e-main")

Q = "model.layers.0.self_attn.q_proj"


def weights(contents: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in contents.items() if path.endswith(".safetensors") and "model/" in path}


@pytest.mark.parametrize(
    ("kind", "options"), [("shadow_job", {"scale": 1.0}), pytest.param("full_job", FULL_GRAFT, marks=pytest.mark.slow)]
)
def test_a_graft_like_the_jobs_own_is_its_model_to_the_byte(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, options: dict[str, object]
):
    ready, job = request.getfixturevalue(kind)

    again = graft(ready, job.id, **options, evaluation={"compare": False})

    assert again["status"] == "succeeded", again["error"]
    assert "The models will not be compared: it was not asked for" in messages(ready, again["id"])
    first, second = (download(ready, each, tmp_path / each) for each in (job.id, again["id"]))
    assert weights(first) == weights(second)
    assert again["graft_result"]["fidelity"] == job.graft_result["fidelity"]


@pytest.fixture(scope="session")
def half(shadow_job) -> tuple[Ready, dict[str, object]]:
    """The LoRA's change at another scale, named by its artifact."""
    ready, job = shadow_job
    path = f"/fine_tuning/jobs/{job.id}/artifacts"
    found = ready.client.get(path, cast_to=dict, options={"params": {"kind": "adapter"}})["data"]
    (last,) = [artifact["id"] for artifact in found if artifact["path"] == "adapter/adapter_model.safetensors"]
    return ready, graft(ready, last, scale=0.5, output_dtype="bfloat16", suffix="half", evaluation={"scales": [1.5]})


def test_a_graft_at_another_scale_is_instruct_plus_that_much_of_the_change(
    half, shadow_job, tiny: Tiny, tmp_path: Path
):
    ready, made = half
    assert made["status"] == "succeeded", made["error"]
    contents = download(ready, made["id"], tmp_path / "graft")
    download(ready, shadow_job[1].id, tmp_path / "job")
    out, instruct = (
        load_file(tmp_path / "graft/model/model.safetensors"),
        load_file(tiny.instruct / "model.safetensors"),
    )
    adapter = load_file(tmp_path / "job/adapter/adapter_model.safetensors")
    b, a = (adapter[f"base_model.model.{Q}.lora_{part}.weight"] for part in "BA")

    exact = instruct[f"{Q}.weight"] + 0.5 * 2.0 * (b @ a)
    assert out[f"{Q}.weight"].dtype == torch.bfloat16
    assert torch.allclose(out[f"{Q}.weight"].float(), exact, rtol=2**-8, atol=1e-7)
    assert "without training" in contents["model/README.md"].decode()
    assert not [path for path in contents if path.startswith(("adapter/", "metrics"))]


def test_a_graft_is_measured_on_the_rows_that_its_source_held_out(half, shadow_job):
    (ready, made), (_, job) = half, shadow_job
    of_graft, of_job = (
        ready.client.get(f"/fine_tuning/jobs/{each}/evaluation", cast_to=dict) for each in (made["id"], job.id)
    )

    assert of_graft["variants"] == ["instruct", "grafted@0.5", "grafted@1.5"]
    assert of_graft["sets"]["validation"]["rows"] == of_job["sets"]["validation"]["rows"]
    one, two = (each["sets"]["validation"]["results"]["instruct"] for each in (of_graft, of_job))
    assert one == two  # the same model on the same rows


def test_a_graft_tells_its_story(half, shadow_job):
    (ready, made), (_, job) = half, shadow_job
    said = messages(ready, made["id"])

    assert said[0] == f"Created graft job: {made['id']}"
    assert "Graft job started" in said
    assert f"Grafting what {job.id} learned onto the instruct model of tiny (scale 0.5, 1.5)" in said
    assert not any("raining the" in line for line in said)
    assert [line for line in said if "completed" in line] == [said[-1]]
    assert made["fine_tuned_model"].startswith("ft:tiny:default:half:")
    assert [one["id"] for one in ready.client.get("/grafts", cast_to=dict)["data"]].count(made["id"]) == 1
