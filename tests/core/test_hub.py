"""A name is pinned to a commit, by the Hub or, without it, by what the models' cache has noted."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import close_session, constants

import core.checkpoints
from core.checkpoints import MAX_JSON_BYTES, read_hub_checkpoint
from core.errors import InvalidInput, Unavailable
from core.hub import mark_file, pin, read_mark, repository_folder, snapshot_at_hand
from core.job_spec import ModelSource
from tests import fake_hub
from tests.core.test_checkpoints import reach
from tests.core.test_pairs import write_model
from tests.servers import free_port
from worker.model_cache import ModelCache


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    write_model(folder / "acme/one")
    with fake_hub.serve(folder) as url:
        reach(url, monkeypatch)
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield folder
        close_session()


def named(revision=None, location="acme/one"):
    return ModelSource(kind="hub", location=location, revision=revision)


@pytest.fixture
def cut(monkeypatch):
    """From now on HF_HUB_OFFLINE is set."""

    def cut():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    return cut


@pytest.mark.parametrize("revision", [None, "main"])
def test_offline_a_name_means_what_it_meant_when_the_hub_was_last_asked(hub, tmp_path, cut, revision):
    cache = tmp_path / "cache"
    online = pin(named(revision), cache)
    (hub / "acme/one/config.json").write_text("{}")
    cut()
    assert pin(named(revision), cache) == online
    assert pin(online, cache) == online


@pytest.mark.parametrize(
    "source", [named("v9"), named("../../../secret"), named("/etc/hostname"), named(location="acme/two")]
)
def test_offline_a_name_that_was_never_asked_about_is_refused(hub, tmp_path, cut, source):
    (tmp_path / "secret").write_text("0" * 40)
    pin(named(), tmp_path / "cache")
    cut()
    with pytest.raises(InvalidInput, match=r"acme/.*HF_HUB_OFFLINE") as caught:
        pin(source, tmp_path / "cache")
    assert caught.value.code == "model_not_found"


def test_a_commit_in_the_cache_is_pinned_and_read_though_the_hub_is_down(hub, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    source = pin(named(), cache)
    online = read_hub_checkpoint(source.location, source.revision, cache_dir=cache)
    ModelCache(cache).fetch(source, lambda: None)
    reach(f"http://127.0.0.1:{free_port()}", monkeypatch)
    assert pin(source, cache) == source
    assert read_hub_checkpoint(source.location, source.revision, cache_dir=cache) == online
    with pytest.raises(Unavailable):
        pin(named("main"), cache)


def test_reading_headers_sends_the_token_to_the_hub_and_to_nobody_it_points_to(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (hub / "acme/one" / fake_hub.TROUBLE).write_text(json.dumps({"token": "hf_secret"}))
    source = pin(named(), tmp_path / "cache")
    read_hub_checkpoint(source.location, source.revision, cache_dir=tmp_path / "cache")
    lines = (hub / "served.jsonl").read_text().splitlines()
    seen = {(line["server"], line["authorization"]) for line in map(json.loads, lines)}
    assert seen == {("hub", "Bearer hf_secret"), ("cdn", None)}


def test_a_model_that_brings_code_is_refused_from_the_cache_as_well(hub, tmp_path, cut):
    (hub / "acme/one/modeling_x.py").write_text("")
    cache = tmp_path / "cache"
    source = pin(named(), cache)
    ModelCache(cache).fetch(source, lambda: None)
    cut()
    with pytest.raises(InvalidInput, match=r"modeling_x\.py"):
        read_hub_checkpoint(source.location, source.revision, cache_dir=cache)


def test_offline_the_headers_of_a_model_that_is_not_in_the_cache_cannot_be_read(hub, tmp_path, cut):
    source = pin(named(), tmp_path / "cache")
    cut()
    with pytest.raises(InvalidInput, match="HF_HUB_OFFLINE") as caught:
        read_hub_checkpoint(source.location, source.revision, cache_dir=tmp_path / "cache")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ({"says": "<html>Sign in to this network</html>"}, "JSONDecodeError"),
        ({"says": "{}"}, "KeyError: 'id'"),
        ({"says": "[]"}, "TypeError"),
        ({"says": '"yes"'}, "TypeError"),
        ({"says": '{"id": "acme/one", "siblings": [5]}'}, "not a Hub's"),
        ({"info": {"sha": None}}, "named 'None' as the model's commit"),
        ({"info": {"sha": 5}}, "named '5' as the model's commit"),
        ({"info": {"sha": "../../outside"}}, "named '../../outside' as the model's commit"),
        ({"info": {"siblings": [{"rfilename": 5}]}}, "a file has no name, size or hash"),
    ],
    ids=str,
)
def test_an_answer_that_is_not_a_hubs_is_a_hub_that_is_away(hub, tmp_path, trouble, said):
    (hub / "acme/one/hub.json").write_text(json.dumps(trouble))
    with pytest.raises(Unavailable) as caught:
        pin(named(), tmp_path / "cache")
    assert (caught.value.code, caught.value.retryable) == ("hub_unavailable", True)
    assert said in caught.value.message
    assert "acme/one" in caught.value.message


def test_so_is_one_that_becomes_no_hub_once_it_has_named_a_models_files(hub, tmp_path, monkeypatch):
    source = pin(named(), tmp_path / "cache")
    said = core.checkpoints.ask_hub(source.location, source.revision)
    monkeypatch.setattr(core.checkpoints, "ask_hub", lambda *_: said)
    (hub / "acme/one/hub.json").write_text(json.dumps({"says": "<html>Sign in to this network</html>"}))
    with pytest.raises(Unavailable, match="not a Hub's") as caught:
        read_hub_checkpoint(source.location, source.revision, cache_dir=tmp_path / "cache")
    assert caught.value.code == "hub_unavailable"


@pytest.mark.parametrize("cut", [0, 20])
def test_half_a_mark_is_no_mark(tmp_path, cut):
    mark = mark_file(tmp_path, "acme/one", "a" * 40)
    mark.parent.mkdir(parents=True)
    mark.write_text(json.dumps({"files": {}, "left_out": ["README.md"]})[:cut])
    assert read_mark(mark) is None
    assert snapshot_at_hand(tmp_path, "acme/one", "a" * 40) is None


def test_a_note_of_what_a_branch_meant_that_holds_no_commit_is_none(hub, tmp_path, cut):
    pin(named("main"), tmp_path / "cache")
    (repository_folder(tmp_path / "cache", "acme/one") / "refs/main").write_text("")
    cut()
    with pytest.raises(InvalidInput, match="HF_HUB_OFFLINE"):
        pin(named("main"), tmp_path / "cache")


def test_of_the_hub_no_json_is_fetched_that_is_too_large(hub, tmp_path):
    (hub / "acme/one/config.json").write_text("{}" + " " * MAX_JSON_BYTES)
    source = pin(named(), tmp_path / "cache")
    with pytest.raises(InvalidInput, match=r"acme/one/config\.json takes 16,777,218 bytes.* 16,777,216") as caught:
        read_hub_checkpoint(source.location, source.revision, cache_dir=tmp_path / "cache")
    assert caught.value.code == "checkpoint_too_large"
    served = [json.loads(line) for line in (hub / "served.jsonl").read_text().splitlines()]
    assert sum(line["sent"] for line in served) < 10_000


@pytest.mark.parametrize("header", [b"[]", b'{"w": 5}', b'{"w": {"dtype": "F32", "shape": [], "data_offsets": []}}'])
def test_a_header_of_another_shape_on_the_hub_is_a_damaged_file(hub, tmp_path, header):
    (hub / "acme/one/model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    source = pin(named(), tmp_path / "cache")
    with pytest.raises(InvalidInput, match=r"acme/one/model\.safetensors is damaged"):
        read_hub_checkpoint(source.location, source.revision, cache_dir=tmp_path / "cache")
