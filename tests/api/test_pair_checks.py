"""POST /v1/pairs/check: what is answered at once, what is left to the worker, and what is refused. No worker runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from sqlalchemy import func, select

from core.models import PairCheck
from core.pair_checks import MAX_WAITING
from tests import fake_hub
from tests.api.talk import Client, told
from tests.core.test_pairs import write_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folders(client, tmp_path, monkeypatch):
    """Two models under the server's model roots."""
    monkeypatch.setattr(client.api.settings, "model_roots", (tmp_path,))
    return {name: str(write_model(tmp_path / name)) for name in ("base", "instruct")}


def post(client, body):
    """With the admin's key, which two unknown models need."""
    return client.api.http.post("/v1/pairs/check", json=body)


def check(client, status=200, **body):
    answer = post(client, body)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_the_first_stage_is_in_the_answer_and_the_second_one_waits(client, folders):
    found = check(client, **folders)
    assert found["id"].startswith("pchk_")
    assert (found["object"], found["status"], found["depth"]) == ("pair.check", "queued", "full")
    assert (found["pair"], found["base"], found["instruct"]) == (None, folders["base"], folders["instruct"])
    assert (found["base_revision"], found["similarity"], found["error"], found["finished_at"]) == (None,) * 4
    assert found["verdict"] == "warn"  # the tiny model names no eos
    assert {finding["stage"] for finding in found["findings"]} == {"headers"}
    assert client.api.http.get(f"/v1/pairs/check/{found['id']}").json() == found


def test_headers_alone_complete_at_once(client, folders):
    found = check(client, **folders, depth="headers")
    assert found["status"] == "completed"
    assert found["finished_at"] >= found["created_at"]


def test_what_the_headers_refuse_completes_at_once_with_every_reason(client, folders):
    config = Path(folders["base"]) / "config.json"
    odd = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    config.write_text(json.dumps(json.loads(config.read_bytes()) | odd))
    found = check(client, **folders)
    assert (found["status"], found["verdict"]) == ("completed", "refuse")
    refusing = {finding["code"] for finding in found["findings"] if finding["level"] == "refuse"}
    assert refusing == {"other_architecture", "quantised_checkpoint"}


def test_a_registered_pair_is_checked_by_its_name(client, folders):
    admin = {"authorization": f"Bearer {client.api.admin_key}"}
    name = f"mine-{client.member.team_id[-6:]}"
    answer = client.http.post("/pairs", json={"name": name, **folders}, headers=admin)
    assert answer.status_code == 200, answer.text
    assert check(client, pair=name)["pair"] == name


def test_two_unknown_models_are_for_admins(client):
    body = {"base": "acme/base", "instruct": "acme/instruct"}
    told(client.http.post("/pairs/check", json=body), 403, "permission_denied")


def test_a_check_is_seen_by_its_team_alone(client):
    found = client.http.post("/pairs/check", json={"pair": "qwen3-0.6b"}).json()
    other = Client(client.api, client.api.member())
    with other.http:
        told(other.http.get(f"/pairs/check/{found['id']}"), 404, "pair_check_not_found")
    told(client.http.get("/pairs/check/pchk_nothing"), 404, "pair_check_not_found")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "name a known pair, or both base and instruct"),
        ({"base": "a/b"}, "name a known pair, or both base and instruct"),
        ({"pair": "qwen3-0.6b", "base": "a/b"}, "a known pair takes no base"),
        ({"base": "a/b", "instruct": "/etc"}, "SHADOWFT_MODEL_ROOTS"),
        ({"base": "../b", "instruct": "a/b"}, "SHADOWFT_MODEL_ROOTS"),
        ({"base": "a--b/c", "instruct": "a/b"}, "neither a Hub repository"),
        ({"pair": "x", "depth": "deep"}, "depth"),
    ],
)
def test_what_names_no_two_models_is_told_and_leaves_nothing(client, body, said):
    before = count(client)
    assert said in told(post(client, body))["message"]
    assert count(client) == before


def count(client):
    with client.api.database.reading() as session:
        return session.scalar(select(func.count()).select_from(PairCheck))


def test_an_unknown_pair_gets_the_nearest_names(client):
    answer = client.http.post("/pairs/check", json={"pair": "qwen2.5-0.5"})
    assert "qwen2.5-0.5b" in told(answer, 404, "model_not_found")["message"]


def test_a_team_whose_checks_wait_for_a_worker_may_not_add_more_without_end(client, folders):
    admin = Client(client.api, client.api.member(is_admin=True))
    with admin.http:
        for _ in range(MAX_WAITING):
            assert admin.http.post("/pairs/check", json=folders).json()["status"] == "queued"
        answer = admin.http.post("/pairs/check", json=folders)
        assert "20 may" in told(answer, 429, "too_many_pair_checks")["message"]
        assert answer.headers["x-should-retry"] == "false"
    assert client.http.post("/pairs/check", json={"pair": "qwen3-0.6b"}).status_code == 200


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "hub"
    for name in ("base", "instruct", "gated"):
        write_model(folder / "acme" / name)
    (folder / "acme" / "gated" / "hub.json").write_text('{"gated": true}')
    with fake_hub.serve(folder) as url:
        yield url


def ask_a_server(tmp_path, endpoint, **body):
    """What an API whose Hub is at `endpoint` answers: the Hub's client reads that when it is imported."""
    program = textwrap.dedent(
        f"""
        import json
        from pathlib import Path
        import httpx
        from core.config import Settings
        from tests.servers import run_api
        settings = Settings(_env_file=None, data_dir=Path({str(tmp_path / "data")!r}), log_level="error", device="cpu")
        with run_api(settings) as api:
            print(json.dumps(api.http.post("/v1/pairs/check", json={body!r}).json()))
        """
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SHADOWFT_"))}
    env = {**clean, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_models_revision_is_pinned_in_the_answer(hub, tmp_path):
    found = ask_a_server(tmp_path, hub, base="acme/base", instruct="acme/instruct")
    assert (len(found["base_revision"]), len(found["instruct_revision"])) == (40, 40)
    assert (found["status"], found["findings"][-1]["code"]) == ("queued", "no_end_of_text")


@pytest.mark.parametrize("instruct", ["acme/gated", "acme/private"])
def test_a_model_that_needs_the_workers_token_is_left_to_the_worker(hub, tmp_path, instruct):
    found = ask_a_server(tmp_path, hub, base="acme/base", instruct=instruct, depth="headers")
    assert (found["status"], found["verdict"]) == ("queued", "ok")
    (note,) = found["findings"]
    assert (note["level"], note["code"]) == ("note", "left_to_the_worker")
    assert instruct in note["message"]


def test_a_hub_that_is_down_here_may_be_up_for_the_worker(tmp_path):
    found = ask_a_server(tmp_path, "http://127.0.0.1:9", base="acme/base", instruct="acme/instruct")
    assert (found["status"], found["findings"][0]["code"]) == ("queued", "left_to_the_worker")
