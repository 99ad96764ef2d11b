"""A name is pinned to a commit, by the Hub or, without it, by what the models' cache has noted."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import close_session, constants

from core.checkpoints import read_hub_checkpoint
from core.errors import InvalidInput, Unavailable
from core.hub import pin
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
