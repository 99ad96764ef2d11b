"""A delta kept as a folder of its own, and grafted later."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from safetensors import safe_open

from core.errors import InvalidInput, PairRefused
from core.graft_plan import Selection
from tests.worker.weights.families import Recipe, Sizes, recipes
from tests.worker.weights.law import law
from tests.worker.weights.made_checkpoints import Tensors, all_bytes, load_model, same_bits, same_models
from worker.weights import FullDelta, SavedDelta, graft, save_delta


@law(
    quick=25,
    thorough=300,
    recipe=recipes(),
    scope=st.sampled_from(["linear", "all"]),
    scale=st.sampled_from([1.0, 0.7, -2.0]),
    output_dtype=st.sampled_from(["auto", "float32"]),
)
def test_a_graft_from_a_saved_delta_is_that_from_base_and_tuned(
    folder: Path, recipe: Recipe, scope: str, scale: float, output_dtype: str
):
    """To the bit, but for tensors that are base's own at scale 1; its figures but for the cosine, which needs base."""
    models = recipe.models()
    for name, tensor in models.instruct.items():
        is_bases = tensor.is_floating_point() and torch.equal(tensor.float(), models.base[name].float())
        if scale == 1 and is_bases:
            models.instruct[name] = torch.full_like(tensor, 0.5)
    recipe.save(folder, models)
    saved = save_delta(base=folder / "base", tuned=folder / "tuned", out=folder / "delta")
    fixed = {
        "instruct": folder / "instruct",
        "selection": Selection(scope=scope),
        "scale": scale,
        "output_dtype": output_dtype,
    }
    full = graft(**fixed, delta=FullDelta(folder / "base", folder / "tuned"), out=folder / "full")
    later = graft(**fixed, delta=SavedDelta(folder / "delta"), out=folder / "later")
    assert same_models(load_model(folder / "later"), load_model(folder / "full"))
    assert later.fidelity == pytest.approx(full.fidelity, rel=1e-6, abs=1e-6)
    assert later.discarded_share == pytest.approx(full.discarded_share, rel=1e-6)
    assert saved.bytes == sum(map(len, all_bytes(folder / "delta").values()))


@law(quick=15, thorough=300, recipe=recipes())
def test_onto_base_itself_a_saved_delta_gives_the_tuned_model_within_a_step_of_the_change(folder: Path, recipe: Recipe):
    """And the tuned value itself where a weight has kept its sign and neither more than doubled nor halved."""
    models = recipe.write(folder)
    save_delta(base=folder / "base", tuned=folder / "tuned", out=folder / "delta")
    fixed = {
        "instruct": folder / "base",
        "delta": SavedDelta(folder / "delta"),
        "selection": Selection(scope="all"),
    }
    graft(**fixed, out=folder / "wide", output_dtype="float32")
    graft(**fixed, out=folder / "out")
    wide, out = load_model(folder / "wide"), load_model(folder / "out")
    for name in recipe.kind.shapes:
        base, tuned = models.base[name].float(), models.tuned[name].float()
        change = (tuned - base).abs()
        off = (wide[name] - tuned).abs()
        assert (off <= torch.nextafter(change, torch.full_like(change, torch.inf)) - change).all()
        near = (base.sign() == tuned.sign()) & (base.abs() <= 2 * tuned.abs()) & (tuned.abs() <= 2 * base.abs())
        assert (off[near] == 0).all()
        assert same_bits(out[name], wide[name].to(models.base[name].dtype))


def test_a_saved_delta_is_grafted_on_the_rows_that_both_have(tmp_path):
    recipe = Recipe(sizes=Sizes(vocabulary=32))
    models = recipe.models()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        models.instruct[name] = torch.cat([models.instruct[name], models.instruct[name][:4]])
    recipe.save(tmp_path, models)
    save_delta(base=tmp_path / "base", tuned=tmp_path / "tuned", out=tmp_path / "delta")
    fixed = {"instruct": tmp_path / "instruct", "selection": Selection(scope="all")}
    full = graft(**fixed, delta=FullDelta(tmp_path / "base", tmp_path / "tuned"), out=tmp_path / "full")
    later = graft(**fixed, delta=SavedDelta(tmp_path / "delta"), out=tmp_path / "later")
    assert same_models(load_model(tmp_path / "later"), load_model(tmp_path / "full"))
    assert any("row" in remark for remark in (*full.remarks, *later.remarks))


def read_delta(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    return found


def test_a_saved_delta_is_float32_and_tuned_minus_base(tmp_path):
    recipe = Recipe("vision")
    models = recipe.write(tmp_path)
    saved = save_delta(base=tmp_path / "base", tuned=tmp_path / "tuned", out=tmp_path / "delta")
    delta = read_delta(tmp_path / "delta")
    assert saved.tensors == len(delta)
    assert delta.keys() >= recipe.kind.linear.keys()
    for name, tensor in delta.items():
        assert same_bits(tensor + 0.0, (models.tuned[name].float() - models.base[name].float()) + 0.0)
    assert json.loads((tmp_path / "delta" / "config.json").read_text())["model_type"] == "gemma3"


def test_a_saved_delta_has_a_manifest(tmp_path):
    Recipe().write(tmp_path)
    save_delta(base=tmp_path / "base", tuned=tmp_path / "tuned", out=tmp_path / "delta")
    on_disk = all_bytes(tmp_path / "delta")
    files = json.loads(on_disk.pop("manifest.json"))["files"]
    assert files == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in on_disk.items()
    }


def test_a_delta_of_other_models_is_refused(tmp_path):
    Recipe(sizes=Sizes(hidden=8)).write(tmp_path / "other")
    Recipe().write(tmp_path)
    save_delta(base=tmp_path / "other" / "base", tuned=tmp_path / "other" / "tuned", out=tmp_path / "delta")
    with pytest.raises(PairRefused):
        graft(instruct=tmp_path / "instruct", delta=SavedDelta(tmp_path / "delta"), out=tmp_path / "out")
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


def test_a_delta_of_models_that_do_not_belong_together_is_refused(tmp_path):
    Recipe(sizes=Sizes(hidden=8)).write(tmp_path / "other")
    Recipe().write(tmp_path)
    with pytest.raises(PairRefused):
        save_delta(base=tmp_path / "base", tuned=tmp_path / "other" / "tuned", out=tmp_path / "delta")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "instruct", "other"}


def test_a_taken_place_is_refused_and_kept(tmp_path):
    Recipe().write(tmp_path)
    with pytest.raises(InvalidInput):
        save_delta(base=tmp_path / "base", tuned=tmp_path / "tuned", out=tmp_path / "instruct")
    assert (tmp_path / "instruct" / "config.json").exists()


def test_a_damaged_delta_is_refused(tmp_path):
    Recipe().write(tmp_path)
    save_delta(base=tmp_path / "base", tuned=tmp_path / "tuned", out=tmp_path / "delta")
    file = tmp_path / "delta" / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InvalidInput, match="damaged"):
        graft(instruct=tmp_path / "instruct", delta=SavedDelta(tmp_path / "delta"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
