"""What a job reads is brought into its workspace: files from storage, models from a Hub of the loopback.

The Hub's client reads HF_ENDPOINT when it is imported, so that its part runs in a child.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from core.config import Settings
from core.errors import InvalidInput, StepFailed
from core.job_spec import DataSource, DeltaFile, DeltaSource, ModelSource, PairSource
from core.storage import LocalStorage
from tests import fake_hub
from tests.core.test_jobs import make_spec
from tests.core.test_pairs import write_model
from tests.servers import free_port
from worker.inputs import fetch
from worker.workspace import open_workspace

ROOT = Path(__file__).parents[2]


# --- from storage and local folders -----------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path):
    return Settings(_env_file=None, data_dir=tmp_path / "data", model_roots=(tmp_path / "models",))


@pytest.fixture
def storage(settings):
    return LocalStorage(settings.storage_dir)


@pytest.fixture
def spec(tmp_path):
    models = {name: write_model(tmp_path / "models" / name) for name in ("base", "instruct")}
    local = {name: ModelSource(kind="local", location=str(folder)) for name, folder in models.items()}
    return make_spec("ftjob-1").model_copy(update={"pair": PairSource(name="tiny", **local)})


@pytest.fixture
def workspace(settings):
    return open_workspace(settings.work_dir, "ftjob-1", 1)


def put(storage, key, content):
    incoming = storage.receive(key)
    incoming.write(content)
    incoming.keep()
    return DataSource(file_id=f"file-{key}", filename="rows.jsonl", storage_key=key, sha256="0" * 64)


def test_a_workspace_is_filled_with_links_and_its_spec(spec, storage, settings, workspace):
    probes = spec.evaluation.model_copy(update={"probes": {"general": put(storage, "g", b"general")}})
    filled = {"training": put(storage, "t", b"rows"), "validation": put(storage, "v", b"held"), "evaluation": probes}
    spec = spec.model_copy(update=filled)
    for _ in range(2):  # a second attempt on this machine meets what the first one left
        fetch(spec, workspace, storage=storage, settings=settings, check=lambda: None)
    assert workspace.spec() == spec.model_copy(update={"snapshots": workspace.spec().snapshots})
    assert workspace.training.read_bytes() == b"rows"
    assert workspace.validation.read_bytes() == b"held"
    assert workspace.probe("general").read_bytes() == b"general"
    assert workspace.base.resolve() == Path(spec.pair.base.location)
    assert (workspace.instruct / "config.json").exists()


def test_what_was_done_with_a_model_that_was_exchanged_since_is_worth_nothing(spec, storage, settings, workspace):
    spec = spec.model_copy(update={"training": put(storage, "t", b"rows")})

    def fetched():
        fetch(spec, workspace, storage=storage, settings=settings, check=lambda: None)
        return workspace.spec().training_sha256

    before = fetched()
    workspace.step("train").mkdir()
    assert (fetched(), workspace.step("train").exists()) == (before, True)
    config = Path(spec.pair.base.location) / "config.json"
    config.write_text(config.read_text() + "\n")
    assert fetched() != before
    assert not workspace.step("train").exists()


def test_direct_tuning_needs_no_base(spec, storage, settings, workspace):
    direct = spec.model_copy(update={"strategy": "direct", "training": put(storage, "t", b"rows")})
    fetch(direct, workspace, storage=storage, settings=settings, check=lambda: None)
    assert not workspace.base.is_symlink()
    assert (workspace.instruct / "config.json").exists()


def test_a_model_that_was_turned_out_of_the_roots_since_is_not_read(spec, storage, settings, workspace, tmp_path):
    base = Path(spec.pair.base.location)
    shutil.move(base, tmp_path / "elsewhere")
    base.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidInput, match="outside the model roots"):
        fetch(spec, workspace, storage=storage, settings=settings, check=lambda: None)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_config.json", "{}"),
        ("tokenizer_config.json", '{"vocab": "/etc/passwd"}'),
        ("config.json", '{"model_type": "qwen3", "transformers_weights": "other.safetensors"}'),
    ],
)
def test_a_folder_that_has_come_to_lead_elsewhere_since_is_not_trained(
    spec, storage, settings, workspace, file, content
):
    (Path(spec.pair.base.location) / file).write_text(content)
    spec = spec.model_copy(update={"training": put(storage, "t", b"rows")})
    with pytest.raises(InvalidInput, match=file):
        fetch(spec, workspace, storage=storage, settings=settings, check=lambda: None)
    assert not workspace.base.exists()


def test_a_file_that_was_deleted_meanwhile_is_named(spec, storage, settings, workspace):
    with pytest.raises(InvalidInput, match=r"rows\.jsonl") as caught:
        fetch(spec, workspace, storage=storage, settings=settings, check=lambda: None)
    assert caught.value.code == "file_not_found"


def test_a_model_folder_that_was_emptied_meanwhile_is_named(spec, storage, settings, workspace):
    (Path(spec.pair.base.location) / "config.json").unlink()
    spec = spec.model_copy(update={"training": put(storage, "t", b"rows")})
    with pytest.raises(InvalidInput, match=r"config\.json"):
        fetch(spec, workspace, storage=storage, settings=settings, check=lambda: None)


@pytest.fixture
def graft(spec, storage):
    """A graft of a published adapter; nothing of its base is there."""
    kept = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"factors"}
    files = []
    for path, content in kept.items():
        put(storage, f"jobs/ftjob-0/a1/adapter/{path}", content)
        sha256 = hashlib.sha256(content).hexdigest()
        files.append(
            DeltaFile(path=path, storage_key=f"jobs/ftjob-0/a1/adapter/{path}", sha256=sha256, bytes=len(content))
        )
    shutil.rmtree(spec.pair.base.location)
    delta = DeltaSource(kind="adapter", job_id="ftjob-0", files=tuple(files))
    evaluation = spec.evaluation.model_copy(update={"left_out": "it was not asked for"})
    return spec.model_copy(update={"kind": "graft", "delta": delta, "evaluation": evaluation})


def test_a_graft_reads_the_published_change_and_neither_base_nor_rows(graft, storage, settings, workspace):
    for _ in range(2):
        fetch(graft, workspace, storage=storage, settings=settings, check=lambda: None)
    assert {path.name: path.read_bytes() for path in workspace.delta.iterdir()} == {
        "adapter_config.json": b"{}", "adapter_model.safetensors": b"factors",
    }  # fmt: skip
    assert sorted(path.name for path in workspace.inputs.iterdir()) == ["delta", "instruct"]


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_published_change_that_is_not_what_it_was_is_named(graft, storage, settings, workspace, damage):
    path = storage.path(graft.delta.files[1].storage_key)
    path.write_bytes(b"faktors") if damage == "changed" else path.unlink()
    with pytest.raises(StepFailed, match=r"adapter/adapter_model\.safetensors of the job ftjob-0") as caught:
        fetch(graft, workspace, storage=storage, settings=settings, check=lambda: None)
    cause = caught.value.cause
    assert (cause.code, cause.fault, cause.retryable) == ("artifact_damaged", "infrastructure", False)


# --- from the Hub -----------------------------------------------------------------------------------------------------

CLIENT = """
    import json, sys
    from pathlib import Path
    from core.checkpoints import read_hub_checkpoint
    from core.errors import ShadowError
    from core.hub import pin
    from core.job_spec import ModelSource
    from core.verdict import read_head
    from worker.model_cache import ModelCache

    cache = Path(sys.argv[1])
    answers = []
    for act, repository, revision in json.loads(sys.argv[2]):
        source = ModelSource(kind="hub", location=repository, revision=revision)
        try:
            if act == "pin":
                answers.append(pin(source).revision)
            elif act == "head":
                answers.append(read_head(pin(source), cache).tokenizer_config)
            elif act == "headers":
                answers.append(sorted(read_hub_checkpoint(repository, revision, cache_dir=cache).tensors))
            else:
                folder = ModelCache(cache).fetch(pin(source), lambda: None)
                answers.append({path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*")})
        except ShadowError as error:
            answers.append({"error": type(error).__name__, **error.cause.as_dict()})
    print(json.dumps(answers))
"""


@pytest.fixture
def hub(tmp_path):
    """The Hub's folder, and `ask(*acts)`: what the client answers in a process of its own."""
    folder = tmp_path / "hub"
    with fake_hub.serve(folder) as url:

        def ask(*acts, url=url, **env):
            program = [sys.executable, "-c", textwrap.dedent(CLIENT), str(tmp_path / "cache"), json.dumps(acts)]
            ours = {
                "HF_ENDPOINT": url,
                "HF_HOME": str(tmp_path / "home"),
                "PYTHONPATH": str(ROOT),
            }
            done = subprocess.run(
                program, env={**os.environ, **ours, **env}, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout.splitlines()[-1])  # the lines before are its log

        ask.folder = folder
        yield ask


def requests(hub):
    return (hub.folder / "requests.log").read_text().splitlines()


#: What the cache does with a Hub in trouble is in test_model_cache.py.


WANTED = (
    *("config.json", "model.safetensors", "tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE"),
    *("tokenizer.model.v3", "Use_Policy.md", "license.pdf"),
)
UNWANTED = (
    *("pytorch_model.bin", "training_args.bin", "optimizer.pt", "modeling_x.py", "onnx/model.onnx", "README.md"),
    *("pytorch_model.bin.index.json", "tokenizer.model.pkl"),
    *(
        "other.safetensors",
        "consolidated.safetensors",
        "original/params.json",
        "adapter_model.safetensors",
        "adapter_config.json",
    ),
)


def make_model(hub, name="acme/one"):
    folder = write_model(hub.folder / name)
    for file in set(WANTED) | set(UNWANTED):
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(f"{file} of {name}")
    return folder


def test_only_what_a_model_needs_is_fetched_and_only_once(hub):
    make_model(hub)
    first, second = hub(["download", "acme/one", None], ["download", "acme/one", None])
    assert set(first) == set(WANTED)
    assert first == second
    fetched = [line.rpartition("/")[2] for line in requests(hub) if line.startswith("GET") and "/resolve/" in line]
    assert sorted(fetched) == sorted(WANTED)


def test_a_revision_is_pinned_to_the_commit_that_it_means_now(hub):
    folder = make_model(hub)
    (first,) = hub(["pin", "acme/one", "main"])
    assert len(first) == 40
    (folder / "config.json").write_text("{}")
    second, absent = hub(["pin", "acme/one", None], ["pin", "acme/one", "v9"])
    assert second != first
    assert (absent["code"], absent["retryable"]) == ("model_not_found", False)
    assert "v9" in absent["message"]


def test_headers_are_read_without_the_weights(hub):
    (make_model(hub) / "modeling_x.py").unlink()
    (hub.folder / "acme/one/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    names, options = hub(["headers", "acme/one", "main"], ["head", "acme/one", "main"])
    assert names == ["model.layers.0.self_attn.q_proj.weight"]
    assert options == {"eos_token": "</s>"}


def test_files_that_are_not_the_models_own_are_refused_before_anything_is_fetched(hub):
    (make_model(hub) / "modeling_x.py").unlink()
    (hub.folder / "acme/one/special_tokens_map.json").write_text('{"tokenizer_file": "/etc/passwd"}')
    (answer,) = hub(["head", "acme/one", "main"])
    assert (answer["code"], answer["fault"]) == ("foreign_file", "user")
    assert "acme/one/special_tokens_map.json has tokenizer_file '/etc/passwd'" in answer["message"]


def test_a_model_that_brings_code_is_refused(hub):
    make_model(hub)
    (answer,) = hub(["headers", "acme/one", "main"])
    assert (answer["code"], answer["fault"]) == ("remote_code_refused", "user")


def test_a_gated_and_an_absent_model_are_the_users_to_mend(hub):
    folder = make_model(hub)
    (folder / fake_hub.TROUBLE).write_text('{"gated": true}')
    gated, absent = hub(["download", "acme/one", None], ["pin", "acme/absent", None])
    assert (gated["code"], gated["retryable"], gated["fault"]) == ("gated_model", False, "user")
    assert "HF_TOKEN" in gated["hint"]
    assert (absent["code"], absent["retryable"]) == ("model_not_found", False)
    assert "acme/absent" in absent["message"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_is_asked_again_later(hub, status):
    folder = make_model(hub)
    (folder / fake_hub.TROUBLE).write_text(json.dumps({"status": status}))
    (answer,) = hub(["pin", "acme/one", None])
    assert (answer["code"], answer["retryable"], answer["fault"]) == ("hub_unavailable", True, "infrastructure")


def test_a_hub_that_is_away_is_asked_again_later(hub):
    make_model(hub)
    nowhere = f"http://127.0.0.1:{free_port()}"
    answers = hub(["pin", "acme/one", None], ["headers", "acme/one", "main"], url=nowhere)
    assert [(answer["code"], answer["retryable"]) for answer in answers] == [("hub_unavailable", True)] * 2
