"""`shadowft pairs` against a real server: in this process where it can be, as a child where the environment matters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from tests import fake_hub
from tests.servers import free_port, run_service
from tests.worker.steps.tiny import make_expert_model, make_model, save_model

ROOT = Path(__file__).parents[2]
ON_SQLITE = pytest.mark.parametrize("api", ["sqlite"], indirect=True)


@pytest.fixture
def shadowft(shadowft):
    return partial(shadowft, "pairs")


@pytest.fixture
def pairs(shadowft, monkeypatch, api):
    """The same as the admin of a server."""
    monkeypatch.setenv("SHADOWFT_URL", api.url)
    monkeypatch.setenv("SHADOWFT_API_KEY", api.admin_key)
    return shadowft


def child(*arguments, **env):
    return subprocess.run(
        [sys.executable, "-m", "cli", "pairs", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )


@ON_SQLITE
def test_the_pairs_are_listed_for_people_and_for_programs(pairs):
    table = pairs("list")
    assert (table.status, table.err) == (0, "")
    for word in ("qwen3-0.6b", "Qwen/Qwen3-0.6B-Base", "apache-2.0", "verified"):
        assert word in table.out
    found = json.loads(pairs("list", "--format", "json").out)
    assert f"{len(found)} pairs" in table.out
    searched = json.loads(pairs("list", "--search", "gemma-3", "--format", "json").out)
    assert {pair["family"] for pair in searched} == {"Gemma 3"}


@ON_SQLITE
def test_one_pair_is_shown_with_its_cautions_and_their_sources(pairs):
    shown = pairs("show", "gemma-3-4b")
    assert shown.status == 0
    for word in ("google/gemma-3-4b-pt", "HF_TOKEN", "0.1075", "from memory", "seen in: public code"):
        assert word in shown.out
    assert json.loads(pairs("show", "gemma-3-4b", "--format", "json").out)["name"] == "gemma-3-4b"


@ON_SQLITE
def test_a_pair_is_added_shown_and_removed(pairs):
    added = pairs("add", "mine", "--base", "acme/a", "--instruct", "acme/b", "--instruct-revision", "v2")
    assert (added.status, added.err) == (0, "")
    assert added.out.startswith("pair-")
    assert "acme/b@v2" in pairs("show", "mine").out
    assert "acme/b@v2" in pairs("list").out
    assert pairs("remove", "mine").out == f"{added.out.strip()} is removed.\n"
    assert pairs("show", "mine").status == 1


@ON_SQLITE
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "qwen3-0.6"), "qwen3-0.6b"),
        (("show", "a/b?c#d"), "a/b?c#d"),
        (("remove", "qwen3-0.6b"), "catalogue"),
        (("add", "check", "--base", "a/b", "--instruct", "a/c"), "check"),
        (("add", "x", "--base", "/etc", "--instruct", "a/c"), "SHADOWFT_MODEL_ROOTS"),
    ],
    ids=str,
)
def test_what_the_server_refuses_is_one_sentence_and_a_status(pairs, arguments, said):
    done = pairs(*arguments)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("shadowft: ")
    assert said in done.err
    assert done.err.count("\n") == 1


@ON_SQLITE
def test_a_wrong_key_is_one_sentence(shadowft, api):
    done = shadowft("list", "--url", api.url, "--api-key", "sft_1_2")
    assert (done.status, done.out) == (1, "")
    assert "key" in done.err


def test_a_server_that_is_not_there_is_one_sentence(shadowft):
    for url in (f"http://127.0.0.1:{free_port()}", "http://no-such-host.invalid", "nowhere", "http://[bad"):
        done = shadowft("list", "--url", url, "--api-key", "x")
        assert (done.status, done.out) == (1, "")
        assert done.err.startswith("shadowft: ")
        assert url in done.err
        assert done.err.count("\n") == 1
    checked = shadowft("check", "qwen3-0.6b", "--url", "http://no-such-host.invalid", "--api-key", "x")
    assert checked.status == 2


class Stranger(BaseHTTPRequestHandler):
    """A server of something else."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>welcome</html>")

    def log_message(self, *_):
        pass


def test_another_servers_answer_is_one_sentence(shadowft):
    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        done = shadowft("list", "--url", f"http://127.0.0.1:{server.server_port}", "--api-key", "x")
        server.shutdown()
        thread.join()
    assert done.status == 1
    assert "no Shadow-FT server" in done.err


@ON_SQLITE
def test_on_the_servers_machine_the_admins_key_is_found_and_no_proxy_asked(api):
    env = {"SHADOWFT_DATA_DIR": str(api.settings.data_dir), "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}
    done = child("list", "--search", "qwen3-0.6b", "--format", "json", SHADOWFT_URL=api.url, **env)
    assert done.returncode == 0, done.stderr
    assert [pair["name"] for pair in json.loads(done.stdout)] == ["qwen3-0.6b"]


def test_the_admins_key_is_shown_to_no_other_machine(tmp_path):
    (tmp_path / "admin.key").write_text("sft_secret")
    done = child("list", "--url", "http://models.invalid", SHADOWFT_DATA_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "--api-key" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("x", "--all"),
        ("x", "--base", "a/b", "--instruct", "a/c"),
        ("--base", "a/b"),
        ("x", "--full"),
    ],
    ids=str,
)
def test_a_check_is_of_one_thing(shadowft, arguments):
    assert shadowft("check", *arguments).status == 2


# --- checks -----------------------------------------------------------------------------------------------------------

#: One service answers them all.
together = pytest.mark.xdist_group("cli-pairs")

FIT, UNFIT, AWAY = "qwen3-0.6b", "qwen3-1.7b", "qwen3-8b"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub on which one pair of the catalogue fits, one does not, and one cannot be read just now."""
    folder = tmp_path_factory.mktemp("hub")
    for name, model in (
        ("Qwen3-0.6B-Base", make_model(0)),
        ("Qwen3-0.6B", make_model(1)),
        ("Qwen3-1.7B-Base", make_model(0)),
        ("Qwen3-1.7B", make_expert_model(0)),
    ):
        save_model(folder / "Qwen" / name, model, dtype=torch.float32)
    for name in ("Qwen3-8B-Base", "Qwen3-8B"):
        (folder / "Qwen" / name).mkdir()
        (folder / "Qwen" / name / "hub.json").write_text('{"status": 503}')
    with fake_hub.serve(folder) as url:
        yield url


@pytest.fixture(scope="module")
def served(hub, tmp_path_factory):
    with run_service({"HF_ENDPOINT": hub}, tmp_path_factory.mktemp("service")) as ran:
        yield ran


@pytest.fixture
def service(served, shadowft, monkeypatch):
    """`shadowft pairs …` as the admin of a whole service whose Hub that is."""
    monkeypatch.setenv("SHADOWFT_URL", served.url)
    monkeypatch.setenv("SHADOWFT_API_KEY", served.key)
    return shadowft


@together
def test_a_pair_that_fits_is_checked_to_the_end(service):
    done = service("check", FIT)
    assert (done.status, done.err) == (0, "")
    assert done.out.split()[:2] in ([FIT, "ok"], [FIT, "warn"])
    assert "weights_not_here" in done.out, "a finding of the second stage"


@together
def test_a_pair_that_does_not_fit_is_refused_with_every_reason_and_remedy(service):
    done = service("check", UNFIT)
    assert done.status == 1
    assert done.out.startswith(f"{UNFIT} refuse\n")
    found = json.loads(service("check", UNFIT, "--format", "json").out)
    reasons = [finding for finding in found["findings"] if finding["level"] == "refuse"]
    said = " ".join(done.out.split())
    assert reasons
    for reason in reasons:
        assert reason["code"] in said
        assert " ".join(f"{reason['message']} {reason['remedy']}".split()) in said


@together
@pytest.mark.slow
def test_two_models_are_checked_without_a_pair_of_theirs(service):
    models = ("--base", "Qwen/Qwen3-0.6B-Base", "--instruct", "Qwen/Qwen3-0.6B", "--base-revision", "main")
    done = service("check", *models, "--format", "json")
    found = json.loads(done.out)
    assert (done.status, found["pair"], found["instruct"]) == (0, None, "Qwen/Qwen3-0.6B")
    assert (found["status"], found["depth"]) == ("completed", "full")
    assert len(found["base_revision"]) == 40


@together
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("qwen3-0.6",), "qwen3-0.6b"),
        ((AWAY, "--timeout", "0.5"), "after 0.5 s"),
        (("--base", "/etc", "--instruct", "a/b"), "SHADOWFT_MODEL_ROOTS"),
    ],
    ids=str,
)
def test_what_could_not_be_checked_has_a_status_of_its_own(service, arguments, said):
    done = service("check", *arguments)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("shadowft: ")
    assert said in done.err


@together
@pytest.mark.slow
def test_all_pairs_are_checked_and_one_that_fails_stops_no_other(service):
    done = service("check", "--all", "--format", "json", "--timeout", "60")
    results = {result["pair"]: result for result in json.loads(done.out)}
    assert done.status == 1
    assert len(results) == len(json.loads(service("list", "--format", "json").out))
    assert results[FIT]["outcome"] in {"ok", "warn"}
    assert results[UNFIT]["outcome"] == "refuse"
    assert results[AWAY]["outcome"] == "unchecked"
    assert results["llama-3.1-8b"]["check"]["findings"][0]["code"] == "model_not_found"
    table = service("check", "--all", "--timeout", "1")
    assert f"{UNFIT} refuse" in table.out
    assert f"{FIT} ok" not in table.out
    assert table.out.splitlines()[-1].startswith(f"{len(results)} pairs: ")
