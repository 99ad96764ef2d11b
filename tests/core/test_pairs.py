"""Pairs: how a request names one, and what may be registered."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from core.errors import Conflict, InvalidInput, NotFound, PairRefused
from core.job_spec import ModelSource
from core.pairs import catalogue, find_pair, known_pairs, model_source, register


def hub(location, revision=None):
    return ModelSource(kind="hub", location=location, revision=revision)


def local(folder):
    return ModelSource(kind="local", location=str(folder))


@pytest.fixture
def roots(tmp_path):
    root = tmp_path / "models"
    root.mkdir()
    return [root]


def write_model(folder, hidden_size=4, **config):
    folder.mkdir(parents=True)
    fields = {"model_type": "qwen3", "hidden_size": hidden_size, "num_hidden_layers": 1, "vocab_size": 8} | config
    (folder / "config.json").write_text(json.dumps(fields))
    weights = {"model.layers.0.self_attn.q_proj.weight": np.zeros((4, hidden_size), dtype=np.float32)}
    save_file(weights, folder / "model.safetensors")
    return folder


def add(database, name="acme", base=None, instruct=None, roots=()):
    with database.writing() as session:
        base, instruct = base or hub("acme/one-base"), instruct or hub("acme/one")
        pair = register(session, name=name, base=base, instruct=instruct, roots=roots)
        session.commit()
        return pair


def find(database, model):
    with database.reading() as session:
        return find_pair(session, model)


def test_the_catalogue_names_no_pair_twice():
    names = [pair.source.name for pair in catalogue()]
    instructs = [pair.source.instruct.location for pair in catalogue()]
    assert len(set(names)) == len(names)
    assert len(set(instructs)) == len(instructs)


@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B"])
def test_a_pair_is_found_by_name_by_instruct_and_by_base(database, model):
    assert find(database, model).name == "qwen2.5-0.5b"


def test_a_base_of_several_pairs_is_no_answer_but_each_of_their_names_is(database):
    with pytest.raises(InvalidInput) as caught:
        find(database, "Qwen/Qwen3-4B-Base")
    for name in ("qwen3-4b", "qwen3-2507-4b"):
        assert name in caught.value.message
        assert find(database, name).base.location == "Qwen/Qwen3-4B-Base"


def test_an_unknown_model_gets_the_nearest_names(database):
    with pytest.raises(NotFound, match=r"qwen3-0\.6b") as caught:
        find(database, "qwen3-0.6")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_registered_pair_is_found_and_listed_before_the_catalogue(database):
    first, second = add(database, "one"), add(database, "two", hub("acme/two-base", "v1"), hub("acme/two"))
    assert find(database, "two") == second.source
    assert find(database, "acme/two").base.revision == "v1"
    with database.reading() as session:
        assert [pair.id for pair in known_pairs(session)][:2] == [second.id, first.id]


@pytest.mark.parametrize("name", ["acme", "qwen3-0.6b"])
def test_a_name_is_given_once_also_if_the_catalogue_has_it(database, name):
    add(database)
    with pytest.raises(Conflict):
        add(database, name)


@pytest.mark.parametrize("name", ["", ".x", "a/b", "a b", "x" * 65, "ä", "a\n", "ft:x"])
def test_an_unusable_name_is_refused(database, name):
    with pytest.raises(InvalidInput) as caught:
        add(database, name)
    assert caught.value.param == "name"


NO_REPOSITORIES = [
    *("", "one", "a/b/c", "../x", "a--b/c", "a/b--c", "a/..", "a/b..c", "a/b.git", "a/" + "b" * 96),
    *("https://x.y/z", "C:\\x", "a/b ", " a/b", "a/b\n", "а/cyrillic", "%2e%2e/x", "a/b#c"),
]


@pytest.mark.parametrize("location", NO_REPOSITORIES)
def test_what_is_no_repository_is_refused_before_anyone_looks_for_it(database, location):
    with pytest.raises(InvalidInput) as caught:
        add(database, base=hub(location))
    assert caught.value.param == "base"


def test_one_model_is_no_pair(database):
    with pytest.raises(InvalidInput, match="same model"):
        add(database, base=hub("acme/one"), instruct=hub("acme/one"))


@pytest.mark.parametrize("location", ["/models/x", "./x", "../x"])
def test_a_folder_is_known_by_its_form(location):
    assert model_source(location, None).kind == "local"


def test_a_folder_named_like_a_repository_does_not_stand_in_for_it(tmp_path, monkeypatch):
    write_model(tmp_path / "acme" / "one")
    monkeypatch.chdir(tmp_path)
    assert model_source("acme/one", None).kind == "hub"


def test_two_local_folders_that_fit_become_a_pair(database, roots):
    base, instruct = write_model(roots[0] / "base"), write_model(roots[0] / "instruct")
    pair = add(database, base=local(base), instruct=local(instruct), roots=roots)
    assert pair.source.base == ModelSource(kind="local", location=str(base.resolve()))


def test_two_local_folders_that_do_not_fit_are_refused_with_every_reason(database, roots):
    base = write_model(roots[0] / "base", hidden_size=6, num_hidden_layers=2, vocab_size=9)
    with pytest.raises(PairRefused) as caught:
        add(database, base=local(base), instruct=local(write_model(roots[0] / "instruct")), roots=roots)
    said = "; ".join(caught.value.reasons)
    assert len(caught.value.reasons) >= 2
    assert "hidden_size" in said
    assert "num_hidden_layers" in said


def test_no_folder_outside_the_roots_is_looked_at(database, roots, tmp_path):
    outside = write_model(tmp_path / "outside")
    (roots[0] / "link").symlink_to(outside)
    instruct = local(write_model(roots[0] / "instruct"))
    for folder in (outside, roots[0] / "link", roots[0] / ".." / "outside", "/etc", "/proc/self"):
        with pytest.raises(InvalidInput, match="outside the model roots"):
            add(database, base=local(folder), instruct=instruct, roots=roots)


def test_without_roots_no_folder_is_taken(database, roots):
    with pytest.raises(InvalidInput, match="SHADOWFT_MODEL_ROOTS"):
        add(database, base=local(write_model(roots[0] / "base")), instruct=hub("acme/one"))


def test_a_folder_that_is_not_there_and_one_with_a_revision_are_refused(database, roots):
    for source in (local(roots[0] / "absent"), ModelSource(kind="local", location=str(roots[0]), revision="main")):
        with pytest.raises(InvalidInput):
            add(database, base=source, instruct=hub("acme/one"), roots=roots)
