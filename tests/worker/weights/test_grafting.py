"""The folder that a graft writes: what it carries, what it says of itself, and when it is not written at all."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numba
import pytest
import torch

from core.errors import InvalidInput, PairRefused
from core.graft_plan import Selection
from tests.worker.weights.families import Layout, Models, Recipe, save_as
from tests.worker.weights.made_checkpoints import (
    INDEX,
    all_bytes,
    cast,
    draw,
    load_model,
    same_bits,
    same_models,
    save_model,
)
from worker.weights import FullDelta, GraftResult, Origin, Provenance, graft

Q = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
SOURCES = {"base", "tuned", "instruct"}
ALL = Selection(scope="all")


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """An instruct model near its base, and the base tuned; the tuned one in float32."""
    base = cast(draw(0))
    moved, apart = draw(1, std=0.05), draw(2, std=0.05)
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "tuned", {name: base[name].float() + moved[name] for name in base})
    save_model(tmp_path / "instruct", cast({name: base[name].float() + apart[name] for name in base}), shards=3)
    return tmp_path


def run(folder: Path, *, out: str = "out", **options: Any) -> GraftResult:
    delta = FullDelta(base=folder / "base", tuned=folder / "tuned")
    return graft(**{"instruct": folder / "instruct", "delta": delta, "out": folder / out} | options)


def test_shards_headers_and_index_are_instructs_own(pair):
    run(pair)
    for file in sorted((pair / "instruct").glob("*.safetensors")):
        original, copy = file.read_bytes(), (pair / "out" / file.name).read_bytes()
        header = 8 + int.from_bytes(original[:8], "little")
        assert copy[:header] == original[:header]
        assert len(copy) == len(original)
    assert (pair / "out" / INDEX).read_bytes() == (pair / "instruct" / INDEX).read_bytes()


def test_the_counts_are_of_changed_tensors_and_all_others(pair):
    result = run(pair)
    assert (result.grafted, result.copied) == (3, 2)
    assert (run(pair, out="all", selection=ALL).grafted, result.resumed_shards) == (5, 0)


def test_a_tied_head_stored_by_instruct_follows_the_embedding(tmp_path):
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    both = {name: torch.ones(8, 4) for name in (embedding, head)}
    save_model(tmp_path / "instruct", both)
    save_model(tmp_path / "base", {embedding: torch.ones(8, 4)})
    save_model(tmp_path / "tuned", {embedding: torch.full((8, 4), 3.0)})
    run(tmp_path, selection=ALL)
    out = load_model(tmp_path / "out")
    assert torch.equal(out[head], torch.full((8, 4), 3.0))
    assert torch.equal(out[head], out[embedding])


def test_a_text_model_is_the_base_of_a_multimodal_one(tmp_path):
    """The names differ by a prefix; the vision tower is Instruct's, and its linears are no linears of ours."""
    recipe = Recipe("vision")
    models = recipe.models()

    def text(tensors):
        inside = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}
        return {name: tensor for name, tensor in inside.items() if name.startswith("model.")}

    save_as(tmp_path / "instruct", models.instruct, Layout(2), recipe.kind.config)
    for role in ("base", "tuned"):
        save_as(tmp_path / role, text(getattr(models, role)), Layout(), recipe.kind.config["text_config"])
    result = run(tmp_path, selection=ALL)
    out = load_model(tmp_path / "out")
    for name, tensor in models.instruct.items():
        changes = name in recipe.kind.shapes and "language_model" in name
        exact = tensor.float() + models.tuned[name].float() - models.base[name].float() if changes else tensor
        assert same_bits(out[name], plain(models, name) if changes else tensor), (name, exact)
    assert any("prefix" in remark for remark in result.remarks)


def plain(models: Models, name: str) -> torch.Tensor:
    delta = models.tuned[name].float() - models.base[name].float()
    return (models.instruct[name].float() + delta).to(models.instruct[name].dtype)


def test_small_files_are_carried_and_other_weights_are_not(pair):
    carried = (
        "generation_config.json",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE",
        "spiece.model",
    )
    stray = ("adapter_config.json", "adapter_model.safetensors", "consolidated.safetensors", "pytorch_model.bin")
    other = ("pytorch_model.bin.index.json", "training.pt", "README.md", ".gitattributes", "shadow.json")
    for name in (*carried, *stray, *other):
        (pair / "instruct" / name).write_text(name)
    (pair / "instruct" / "additional_chat_templates").mkdir()
    (pair / "instruct" / "additional_chat_templates" / "tools.jinja").write_text("tools")
    run(pair)
    out = pair / "out"
    assert all((out / name).read_text() == name for name in carried)
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    assert not [name for name in (*stray, *other[:-1]) if (out / name).exists()]
    assert json.loads((out / "shadow.json").read_text())["format"] == 2
    assert (out / "config.json").read_bytes() == (pair / "instruct" / "config.json").read_bytes()


def test_a_small_file_that_is_a_link_to_nothing_is_refused(pair):
    (pair / "instruct" / "chat_template.jinja").symlink_to(pair / "nowhere")
    with pytest.raises(InvalidInput, match=r"chat_template\.jinja"):
        run(pair)
    assert {path.name for path in pair.iterdir()} == SOURCES
    (pair / "instruct" / "chat_template.jinja").unlink()
    (pair / "instruct" / "pytorch_model.bin").symlink_to(pair / "nowhere")
    run(pair)


# --- what it says of itself -------------------------------------------------------------------------------------------


def test_shadow_json_tells_the_origin_and_no_path(pair):
    origins = {"instruct": Origin("o/instruct", "c1"), "base": Origin("o/base", "c2")}
    run(pair, scale=0.5, provenance=Provenance(names=origins, pair="tiny"))
    text = (pair / "out" / "shadow.json").read_text()
    shadow = json.loads(text)
    assert str(pair) not in text
    told = {role: (each["name"], each["revision"]) for role, each in shadow["sources"].items()}
    assert told == {"instruct": ("o/instruct", "c1"), "base": ("o/base", "c2"), "tuned": ("tuned", None)}
    assert shadow["pair"] == "tiny"
    assert (shadow["options"]["scale"], shadow["options"]["scope"]) == (0.5, "linear")
    assert shadow["versions"]["numba"] == numba.__version__


def test_shadow_json_knows_every_file_that_was_read(pair):
    """By size and by the hash of its header; the hash of all of it where it is asked for."""
    run(pair)
    run(pair, out="hashed", hash_sources=True)
    plain, hashed = (json.loads((pair / out / "shadow.json").read_text())["sources"] for out in ("out", "hashed"))
    for role in SOURCES:
        shards = {file.name: file.read_bytes() for file in (pair / role).glob("*.safetensors")}
        assert plain[role]["files"].keys() >= shards.keys()
        for name, content in shards.items():
            length = 8 + int.from_bytes(content[:8], "little")
            headers = [hashlib.sha256(part).hexdigest() for part in (content[:length], content[8:length])]
            assert plain[role]["files"][name]["bytes"] == len(content)
            assert plain[role]["files"][name]["header_sha256"] in headers
            assert plain[role]["files"][name]["sha256"] is None
            assert hashed[role]["files"][name]["sha256"] == hashlib.sha256(content).hexdigest()


def test_paths_are_kept_where_they_are_asked_for(pair):
    """As seen from the output, so that the folders can be moved together."""
    run(pair, provenance=Provenance(keep_paths=True))
    sources = json.loads((pair / "out" / "shadow.json").read_text())["sources"]
    assert {role: each["path"] for role, each in sources.items()} == {role: f"../{role}" for role in SOURCES}


def test_the_manifest_names_every_other_file_with_its_hash(pair):
    result = run(pair)
    on_disk = all_bytes(pair / "out")
    written = sum(map(len, on_disk.values()))
    manifest = json.loads(on_disk.pop("manifest.json"))
    assert manifest["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in on_disk.items()
    }
    assert (manifest["format"], result.bytes) == (1, written)


def test_the_same_graft_twice_gives_the_same_bytes(pair):
    run(pair)
    run(pair, out="again")
    assert all_bytes(pair / "out") == all_bytes(pair / "again")


def test_progress_rises_to_all_of_the_bytes(pair):
    seen: list[tuple[int, int]] = []
    run(pair, on_progress=lambda done, total: seen.append((done, total)))
    done = [each for each, _ in seen]
    assert done == sorted(done)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1] >= sum(len(file.read_bytes()) for file in (pair / "out").glob("*.safetensors"))


# --- refusals and failures --------------------------------------------------------------------------------------------


def refused(pair: Path, **options: Any) -> InvalidInput:
    """Refused, and nothing but the three sources is left."""
    before = {role: all_bytes(pair / role) for role in SOURCES}
    with pytest.raises(InvalidInput) as refusal:
        run(pair, **options)
    assert {path.name for path in pair.iterdir()} == SOURCES
    assert {role: all_bytes(pair / role) for role in SOURCES} == before
    return refusal.value


@pytest.mark.parametrize("out", ["instruct", "base", "tuned", "instruct/out", "base/deep/out"])
def test_a_source_is_never_written(pair, out):
    assert refused(pair, out=out).param == "out"


def test_a_link_to_a_source_is_that_source(pair, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "link"
    elsewhere.symlink_to(pair / "base")
    assert refused(pair, out=str(elsewhere / "out")).param == "out"


def test_a_taken_place_is_refused_and_kept(pair):
    (pair / "out").mkdir()
    with pytest.raises(InvalidInput, match="exists already"):
        run(pair)
    assert list((pair / "out").iterdir()) == []


def test_a_link_into_nothing_is_a_taken_place(pair):
    (pair / "out").symlink_to(pair / "nowhere")
    with pytest.raises(InvalidInput, match="exists already"):
        run(pair)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_is_no_number_is_refused(pair, scale):
    assert refused(pair, scale=scale).param == "scale"


def test_patterns_that_match_nothing_are_refused(pair):
    assert refused(pair, selection=Selection(scope="all", include=("*.experts.*",)))


def test_a_diverged_tuning_is_refused(pair):
    tuned = load_model(pair / "tuned")[Q]
    tuned[0, 0] = math.nan
    replaced(pair / "tuned", {Q: tuned})
    error = refused(pair)
    assert error.code == "not_finite"
    assert Q in error.message


def replaced(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The model in `folder`, with these tensors in place of its own."""
    content = load_model(folder) | tensors
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    save_model(folder, content)


@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_a_tuning_that_diverged_in_what_is_left_out_is_told_and_grafted(pair, worst):
    run(pair, out="before")
    replaced(pair / "tuned", {EMBEDDING: torch.full_like(load_model(pair / "tuned")[EMBEDDING], worst)})
    result = run(pair)
    assert result.discarded_share is None
    assert any(EMBEDDING in remark and "diverged" in remark for remark in result.remarks)
    assert json.loads((pair / "out" / "shadow.json").read_text())["remarks"] == list(result.remarks)
    assert same_models(load_model(pair / "out"), load_model(pair / "before"))
    with pytest.raises(InvalidInput, match=EMBEDDING):
        run(pair, selection=ALL, out="all")


def test_a_kept_weight_that_the_asked_dtype_cannot_hold_is_refused(pair):
    large = load_model(pair / "instruct")[EMBEDDING].float()
    large[0, 0] = 3.4e38
    replaced(pair / "instruct", {EMBEDDING: large})
    error = refused(pair, output_dtype="bfloat16")
    assert (error.code, error.param) == ("not_finite", "output_dtype")
    assert EMBEDDING in error.message
    large[0, 0] = math.inf
    replaced(pair / "instruct", {EMBEDDING: large})
    run(pair, output_dtype="bfloat16")
    assert load_model(pair / "out")[EMBEDDING][0, 0] == math.inf


@pytest.mark.parametrize("wide", ["instruct", "base"])
def test_grafting_onto_bases_values_in_another_dtype_gives_the_tuned_model(tmp_path, wide):
    generator = torch.Generator().manual_seed(0)
    values = {name: tensor.bfloat16() for name, tensor in draw(0).items()}
    tuned = {
        name: torch.randn(one.shape, generator=generator) * 10 ** (-6 * one.abs().float())
        for name, one in values.items()
    }
    for role in ("instruct", "base"):
        save_model(tmp_path / role, {name: one.float() if role == wide else one for name, one in values.items()})
    save_model(tmp_path / "tuned", tuned)
    run(tmp_path, output_dtype="float32", selection=ALL)
    assert same_models(load_model(tmp_path / "out"), tuned)


def test_another_pair_is_refused_with_all_reasons(tmp_path):
    save_model(tmp_path / "instruct", cast(draw(0)))
    save_model(tmp_path / "base", cast(draw(1)) | {Q: torch.zeros(4, 5)}, model_type="llama")
    save_model(tmp_path / "tuned", draw(2))
    error = refused(tmp_path)
    assert isinstance(error, PairRefused)
    assert len(error.reasons) == 2


def test_a_tuned_model_that_lost_a_tensor_is_refused(tmp_path):
    lost = draw(2)
    del lost[Q]
    for each, content in {"instruct": cast(draw(0)), "base": cast(draw(1)), "tuned": lost}.items():
        save_model(tmp_path / each, content)
    assert Q in refused(tmp_path).message


def test_a_failure_on_the_way_leaves_nothing_at_out(pair):
    def fail(done: int, total: int) -> None:
        if 2 * done > total:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        run(pair, on_progress=fail)
    assert not (pair / "out").exists()
    run(pair)
    run(pair, out="undisturbed")
    assert all_bytes(pair / "out") == all_bytes(pair / "undisturbed")
    assert {path.name for path in pair.iterdir()} == SOURCES | {"out", "undisturbed"}


def test_single_elements_without_an_update_keep_their_bits(tmp_path):
    kept = torch.tensor([[-0.0, float("nan"), float("-inf"), 1.0]] * 4, dtype=torch.bfloat16)
    save_model(tmp_path / "instruct", {Q: kept})
    save_model(tmp_path / "base", {Q: torch.zeros(4, 4)})
    save_model(tmp_path / "tuned", {Q: torch.tensor([[0.0, 0.0, 0.0, 1.0]] * 4)})
    result = run(tmp_path)
    out = load_model(tmp_path / "out")[Q]
    assert same_bits(out[:, :3], kept[:, :3])
    assert out[:, 3].tolist() == [2.0] * 4
    assert (result.grafted, result.fidelity) == (1, 1.0)


def test_another_dtype_is_written_into_odd_configs_too(pair):
    """Python's JSON has words for numbers that JSON lacks, and configs in the wild use them."""
    for file, content in {
        "config.json": {"time_step_limit": [0.0, float("inf")], "vision_config": {"deep": {"dtype": "bfloat16"}}},
        "model.safetensors.index.json": {"metadata": None},
    }.items():
        path = pair / "instruct" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    run(pair, output_dtype="float32")
    config = json.loads((pair / "out" / "config.json").read_text())
    assert (config["vision_config"]["deep"]["dtype"], config["time_step_limit"][1]) == ("float32", math.inf)
    assert load_model(pair / "out")[Q].dtype == torch.float32


def test_shadow_json_tells_checkpoints_apart_without_reading_them_whole(pair):
    run(pair)
    sources = json.loads((pair / "out" / "shadow.json").read_text())["sources"]
    sampled = {
        role: json.dumps(source["files"]["model.safetensors"]) for role, source in sources.items() if role != "instruct"
    }
    assert len(set(sampled.values())) == 2
    assert all("sampled_sha256" in text for text in sampled.values())
