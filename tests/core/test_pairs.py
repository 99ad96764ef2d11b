"""Pairs: how a request names one, and what may be registered."""

from __future__ import annotations

import json
import os
import shutil
import socket

import numpy as np
import pytest
from safetensors.numpy import save_file

import core.pairs
from core.errors import Conflict, InvalidInput, NotFound, PairRefused
from core.job_spec import ModelSource
from core.pairs import (
    catalogue,
    checked_pair,
    checked_source,
    find_pair,
    get_pair,
    known_pairs,
    model_source,
    register,
    remove,
)


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
    base, instruct = base or hub("acme/one-base"), instruct or hub("acme/one")
    checked = checked_pair(name=name, base=base, instruct=instruct, roots=roots)
    with database.writing() as session:
        pair = register(session, checked)
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


def test_an_instruct_id_of_several_pairs_is_no_answer_either(database):
    add(database, "pinned", hub("Qwen/Qwen3-0.6B-Base", "v1"), hub("Qwen/Qwen3-0.6B", "v1"))
    with pytest.raises(InvalidInput, match=r"pinned, qwen3-0\.6b"):
        find(database, "Qwen/Qwen3-0.6B")


def test_a_pair_is_got_by_id_and_by_name(database):
    added = add(database)
    with database.reading() as session:
        assert get_pair(session, added.id) == get_pair(session, "acme") == added
        assert get_pair(session, "pair-qwen3-0.6b") == get_pair(session, "qwen3-0.6b")
        with pytest.raises(NotFound, match=r"'qwen3-0\.6b'") as caught:
            get_pair(session, "qwen3-0.6")
    assert caught.value.code == "pair_not_found"


@pytest.mark.parametrize("by", ["id", "name"])
def test_a_removed_pair_is_gone_and_its_name_free_again(database, by):
    added = add(database)
    with database.writing() as session:
        assert remove(session, added.id if by == "id" else "acme").id == added.id
        session.commit()
    with pytest.raises(NotFound):
        find(database, "acme")
    assert add(database).id != added.id


def test_a_pair_of_the_catalogue_is_not_removed(database):
    with database.writing() as session, pytest.raises(Conflict, match="catalogue"):
        remove(session, "qwen3-0.6b")


@pytest.mark.parametrize("name", ["acme", "ACME", "qwen3-0.6b", "Qwen3-0.6B"])
def test_a_name_is_given_once_whatever_its_capitals_and_also_if_the_catalogue_has_it(database, name):
    add(database)
    with pytest.raises(Conflict):
        add(database, name)


@pytest.mark.parametrize("again", ["acme", "ACME"])
def test_of_two_who_give_a_name_at_the_same_moment_one_gets_it(database, monkeypatch, again):
    monkeypatch.setattr(core.pairs, "known_pairs", lambda session: [])  # as if neither had seen the other
    add(database)
    with pytest.raises(Conflict, match=f"already a pair named '{again}'"):
        add(database, again)


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
@pytest.mark.parametrize("name", ["", ".x", "a/b", "a b", "x" * 65, "ä", "a\n", "ft:x", "check", "Pair-x"])
def test_an_unusable_name_is_refused(database, name):
    with pytest.raises(InvalidInput) as caught:
        add(database, name)
    assert caught.value.param == "name"


NO_REPOSITORIES = [
    *("", "one", "a/b/c", "../x", "a--b/c", "a/b--c", "a/..", "a/b..c", "a/b.git", "a/" + "b" * 96),
    *("https://x.y/z", "C:\\x", "a/b ", " a/b", "a/b\n", "а/cyrillic", "%2e%2e/x", "a/b#c"),
]


@pytest.mark.parametrize("location", NO_REPOSITORIES)
def test_what_is_no_repository_is_refused_before_anyone_looks_for_it(location):
    with pytest.raises(InvalidInput) as caught:
        checked_source(hub(location), (), param="base")
    assert caught.value.param == "base"


@pytest.mark.parametrize("revision", ["", "..", "../x", "a/../../b", "/a", "a//b", "a/", "-a", "a b", "a\n", "x" * 101])
def test_what_is_no_revision_is_refused_before_it_becomes_a_file_name(revision):
    with pytest.raises(InvalidInput) as caught:
        checked_source(hub("acme/one-base", revision), (), param="base")
    assert caught.value.param == "base_revision"


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/1", "a" * 40])
def test_a_branch_a_tag_and_a_commit_are_revisions(revision):
    assert checked_source(hub("acme/one-base", revision), ()).revision == revision


def test_registering_checks_both_models_and_says_which_is_wrong(database):
    for param, wrong in (("base", {"base": hub("../x")}), ("instruct", {"instruct": hub("../x")})):
        with pytest.raises(InvalidInput) as caught:
            add(database, **wrong)
        assert caught.value.param == param


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


def test_without_roots_no_folder_is_taken_and_the_remedy_is_told(database, roots):
    with pytest.raises(InvalidInput, match=r"takes no local folders.*SHADOWFT_MODEL_ROOTS"):
        add(database, base=local(write_model(roots[0] / "base")), instruct=hub("acme/one"))


def test_a_folder_that_is_not_there_and_one_with_a_revision_are_refused(database, roots):
    long = roots[0] / ("x" * 300)
    revised = ModelSource(kind="local", location=str(roots[0]), revision="main")
    for source in (local(roots[0] / "absent"), local(long), revised):
        with pytest.raises(InvalidInput):
            add(database, base=source, instruct=hub("acme/one"), roots=roots)


# --- what lies in a folder --------------------------------------------------------------------------------------------


def refusal(folder, roots):
    with pytest.raises(InvalidInput) as caught:
        checked_source(local(folder), roots)
    return caught.value.message


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "LICENSE", "additional_chat_templates/x.jinja"]
)
def test_a_file_that_links_out_of_the_roots_is_refused(roots, tmp_path, file):
    folder, secret = write_model(roots[0] / "model"), tmp_path / "secret"
    secret.write_text("secret")
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(secret)
    said = refusal(folder, roots)
    assert file.rpartition("/")[2] in said
    assert "outside the model roots" in said
    assert "secret" not in said


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs_in_the_same_root(roots):
    folder = write_model(roots[0] / "models--acme--one" / "snapshots" / "abc")
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    for file in list(folder.iterdir()):
        file.rename(blobs / f"hash-of-{file.name}")
        file.symlink_to(f"../../blobs/hash-of-{file.name}")
    assert checked_source(local(folder), roots) == local(folder)
    with pytest.raises(InvalidInput, match="outside the model roots"):
        checked_source(local(folder), [folder])


def make_pipe(file):
    os.mkfifo(file)


def make_socket(file):
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind(str(file))


def make_device(file):
    try:
        os.mknod(file, 0o600 | 0o020000, os.makedev(1, 5))  # as /dev/zero, which has no end
    except PermissionError:
        pytest.skip("only root makes devices")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [make_pipe, make_socket, make_device])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_what_is_no_plain_file_is_refused_and_never_opened(roots, monkeypatch, make, name):
    folder = write_model(roots[0] / "model")
    (folder / name).unlink(missing_ok=True)
    monkeypatch.chdir(folder)  # a socket's whole address has room for a hundred letters
    make(name)
    assert "not a plain file" in refusal(folder, roots)


def test_a_link_to_nothing_and_one_to_itself_are_refused(roots):
    folder = write_model(roots[0] / "model")
    for target in ("absent.json", "loop.json"):
        (folder / "loop.json").unlink(missing_ok=True)
        (folder / "loop.json").symlink_to(target)
        assert "loop.json cannot be read" in refusal(folder, roots)


@pytest.mark.parametrize("name", [b"bad\xff.json", b"bad\xff.safetensors", b"additional_chat_templates/bad\xff.jinja"])
def test_a_file_whose_name_is_no_text_is_refused(roots, name):
    folder = write_model(roots[0] / "model")
    (folder / "additional_chat_templates").mkdir()
    (folder / os.fsdecode(name)).write_text("{}")
    assert "udcff" in refusal(folder, roots)


def test_so_is_a_folder_also_where_a_link_has_a_better_name(roots):
    folder = write_model(roots[0] / os.fsdecode(b"bad\xff"))
    (roots[0] / "good").symlink_to(folder)
    for path in (folder, roots[0] / "good"):
        assert "is not UTF-8" in refusal(path, roots)


def test_what_nobody_opens_may_lie_in_a_folder(roots, tmp_path):
    folder = write_model(roots[0] / "model")
    (folder / "licenses").mkdir()
    os.mkfifo(folder / "pytorch_model.bin")
    (folder / "notes").symlink_to(tmp_path)
    assert checked_source(local(folder), roots) == local(folder)


def test_a_folder_that_became_a_link_since_it_was_registered_is_refused(database, roots, tmp_path):
    base, instruct = write_model(roots[0] / "base"), write_model(roots[0] / "instruct")
    pair = add(database, base=local(base), instruct=local(instruct), roots=roots)
    shutil.move(base, tmp_path / "elsewhere")
    base.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidInput, match="outside the model roots"):
        checked_source(pair.source.base, roots)
