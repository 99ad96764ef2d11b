"""Sigma against a plain float64 loop, and what it does with odd models."""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.checkpoints import read_checkpoint
from core.errors import InvalidInput, PairRefused
from tests.worker.weights.families import BF16, F16, F32, Layout, Models, Recipe, any_bits, recipes, save_as
from tests.worker.weights.law import law
from tests.worker.weights.made_checkpoints import SHAPES, Tensors, cast, draw, save_model
from worker.weights import OutOfTime, Similarity, band, measure_similarity, remark, similarity

Q = "model.layers.0.self_attn.q_proj.weight"


def measure(folder: Path, **options: Any) -> Similarity:
    return measure_similarity(folder / "base", folder / "instruct", **options)


# --- the reference ----------------------------------------------------------------------------------------------------


def sums(one: Tensor, other: Tensor) -> tuple[float, float]:
    """sum|A-B| and sum|A| + sum|B|."""
    one, other = one.double(), other.double()
    return float((one - other).abs().sum()), float(one.abs().sum() + other.abs().sum())


def ratio(listed: list[tuple[float, float]]) -> float:
    above, below = (math.fsum(column) for column in zip(*listed, strict=True))
    return above / below if below else 0.0


def expected(base: Tensors, instruct: Tensors) -> dict[str, Any]:
    """Of two models that call everything by the same names."""
    names = [name for name, tensor in instruct.items() if tensor.is_floating_point() and tensor.numel()]
    found = {name: sums(base[name], instruct[name]) for name in names}
    language = [name for name in names if not re.search("vision_tower|multi_modal_projector", name)]
    layers, modules = defaultdict(list), defaultdict(list)
    for name in language:
        if layer := re.search(r"(?:layers|h)\.(\d+)\.", name):
            layers[layer[1]].append(found[name])
        modules[re.sub(r"\.(weight|bias)$", "", name).split(".")[-1]].append(found[name])
    of_layers = [ratio([one]) for name in language for one in [found[name]] if re.search(r"(layers|h)\.\d+\.", name)]
    return {
        "sigma_mean": sum(of_layers) / len(of_layers),
        "sigma_ratio": ratio(list(found.values())),
        "layers": {key: ratio(listed) for key, listed in layers.items()},
        "modules": {key: ratio(listed) for key, listed in modules.items()},
        "worst_sigma": max(ratio([one]) for one in found.values()),
        "tensors": len(names),
        "elements": sum(instruct[name].numel() for name in names),
        "bytes": sum(model[name].nbytes for name in names for model in (base, instruct)),
    }


def near(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: near(one) for key, one in value.items()}
    return pytest.approx(value, rel=1e-6, abs=0) if isinstance(value, float) else value


@law(quick=40, thorough=800, recipe=recipes())
def test_it_is_that_of_float64(folder: Path, recipe: Recipe):
    """For every family, layout and pair of dtypes; for exponents from the smallest to nearly the largest."""
    models = recipe.write(folder)
    found = asdict(measure(folder))
    worst = found.pop("worst_tensor")
    assert found == near(expected(models.base, models.instruct))
    assert ratio([sums(models.base[worst], models.instruct[worst])]) == near(found["worst_sigma"])


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32), (BF16, F32), (F16, BF16)])
def test_a_tensor_of_many_chunks_is_summed_as_well(tmp_path, dtypes):
    """Whose last chunk, last row and last block are cut."""
    base, instruct = large(*dtypes)
    save(tmp_path, base, instruct)
    found = measure(tmp_path)
    assert found.sigma_ratio == near(ratio([sums(base[name], instruct[name]) for name in base]))
    assert found.worst_sigma == near(max(ratio([sums(base[name], instruct[name])]) for name in base))


def large(base: torch.dtype, instruct: torch.dtype) -> tuple[Tensors, Tensors]:
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES | {Q: (1031, 2203), "model.layers.1.mlp.down_proj.weight": (2048, 64)}
    one = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    other = {name: values + 1e-3 * torch.randn(values.shape, generator=generator) for name, values in one.items()}
    return cast(one, base), cast(other, instruct)


def save(folder: Path, base: Tensors, instruct: Tensors, **config: Any) -> None:
    save_model(folder / "base", base, shards=3, **config)
    save_model(folder / "instruct", instruct, shards=2, salt=4, **config)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_no_number_of_threads_changes_a_bit(tmp_path, threads):
    save(tmp_path, *large(BF16, BF16))
    assert measure(tmp_path, threads=threads) == measure(tmp_path)


def test_what_is_computed_at_once_changes_nothing_but_the_last_place(tmp_path, monkeypatch):
    save(tmp_path, *large(BF16, F32))
    before = measure(tmp_path)
    monkeypatch.setattr(similarity, "CHUNK_ELEMENTS", 4096)
    monkeypatch.setattr(similarity, "BLOCK_ELEMENTS", 12288)
    after = measure(tmp_path)
    assert after.sigma_ratio == pytest.approx(before.sigma_ratio, rel=1e-8)
    assert after.sigma_mean == pytest.approx(before.sigma_mean, rel=1e-8)


# --- its ends ---------------------------------------------------------------------------------------------------------


def test_models_without_a_number_are_refused(tmp_path):
    for name in ("base", "instruct"):
        save_model(tmp_path / name, {name: values[:0].clone() for name, values in cast(draw(0)).items()})
    with pytest.raises(InvalidInput, match="no weight in common") as caught:
        measure(tmp_path)
    assert caught.value.code == "empty_weights"


def test_a_model_lies_at_zero_from_itself_and_at_one_from_its_negative(tmp_path):
    base = cast(draw(0))
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "instruct", {name: -values for name, values in base.items()})
    assert (measure(tmp_path).sigma_mean, measure(tmp_path).sigma_ratio) == (1.0, 1.0)
    same = measure_similarity(tmp_path / "base", tmp_path / "base")
    assert (same.sigma_mean, same.sigma_ratio, same.worst_sigma) == (0.0, 0.0, 0.0)


def test_two_tensors_of_zeros_are_equal(tmp_path):
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    save(tmp_path, zeros, zeros)
    assert measure(tmp_path).sigma_ratio == 0.0


def test_numbers_whose_sums_float32_does_not_hold_are_summed_in_float64(tmp_path):
    huge = {name: torch.full(shape, 3e38) for name, shape in SHAPES.items()}
    save(tmp_path, huge, {name: -0.5 * values for name, values in huge.items()})
    assert measure(tmp_path).sigma_ratio == near(1.0)
    assert measure_similarity(tmp_path / "base", tmp_path / "base").sigma_ratio == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["base", "instruct"])
def test_a_weight_that_is_no_number_is_told_with_its_tensor(tmp_path, role, value):
    base, instruct = cast(draw(0)), cast(draw(1))
    {"base": base, "instruct": instruct}[role][Q][2, 1] = value
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "instruct", instruct)
    with pytest.raises(InvalidInput, match=f"^{re.escape(Q)} in {role}/model.safetensors holds NaN or inf") as caught:
        measure(tmp_path)
    assert caught.value.code == "not_finite"


def test_what_is_computed_and_not_learned_is_not_looked_at(tmp_path):
    mask = {"transformer.h.0.attn.bias": torch.full((1, 1, 4, 4), -math.inf)}
    recipe = Recipe("gpt2")
    models = recipe.models()
    save_as(tmp_path / "base", models.base | mask, Layout(), recipe.kind.config)
    save_as(tmp_path / "instruct", models.instruct | mask, Layout(), recipe.kind.config)
    assert measure(tmp_path).tensors == sum(1 for tensor in models.base.values() if tensor.is_floating_point())


# --- names that differ ------------------------------------------------------------------------------------------------


def test_a_prefix_makes_no_difference(tmp_path):
    recipe = Recipe("vision")
    models = recipe.write(tmp_path)
    found = measure(tmp_path)
    bare = {name.removeprefix("language_model."): values for name, values in models.base.items()}
    save_as(tmp_path / "bare", bare, Layout(), recipe.kind.config)
    other = measure_similarity(tmp_path / "bare", tmp_path / "instruct")
    assert replace(other, bytes=0) == replace(found, bytes=0)
    assert found.layers.keys() == {"0"}


@pytest.mark.parametrize("stored_by", ["base", "instruct", "both"])
def test_a_tied_head_is_counted_once(tmp_path, stored_by):
    recipe = Recipe("tied, with biases")
    models = recipe.write(tmp_path)
    before = measure(tmp_path)
    for role, model in (("base", models.base), ("instruct", models.instruct)):
        if stored_by in (role, "both"):
            with_head = model | {"lm_head.weight": model["model.embed_tokens.weight"].clone()}
            save_as(tmp_path / "more" / role, with_head, Layout(), recipe.kind.config)
        else:
            save_as(tmp_path / "more" / role, model, Layout(), recipe.kind.config)
    assert measure(tmp_path / "more") == before


def test_of_two_vocabularies_the_rows_that_both_have_are_compared(tmp_path):
    recipe = Recipe("dense", sizes=replace(Recipe().sizes, vocabulary=40))
    models = recipe.models()
    longer = {
        name: torch.cat([values, torch.full((2, values.shape[1]), math.nan).to(values.dtype)])
        if re.search("embed_tokens|lm_head", name)
        else values
        for name, values in models.instruct.items()
    }
    recipe.save(tmp_path, Models(models.base, models.tuned, longer))
    found = asdict(measure(tmp_path))
    del found["worst_tensor"]
    assert found == near(expected(models.base, models.instruct))


def test_models_of_two_lineages_are_refused(tmp_path):
    save_model(tmp_path / "base", draw(0), model_type="llama")
    save_model(tmp_path / "instruct", draw(0))
    with pytest.raises(PairRefused, match="model_type"):
        measure(tmp_path)


def test_a_cut_file_is_told(tmp_path):
    save_model(tmp_path / "base", draw(0))
    save_model(tmp_path / "instruct", draw(1))
    (tmp_path / "base" / "model.safetensors").write_bytes((tmp_path / "base" / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(InvalidInput, match="is damaged"):
        measure(tmp_path)


# --- its manners ------------------------------------------------------------------------------------------------------


def test_a_deadline_ends_it(tmp_path):
    save(tmp_path, *large(BF16, BF16))
    with pytest.raises(OutOfTime):
        measure(tmp_path, deadline=time.monotonic() - 1)
    assert measure(tmp_path, deadline=time.monotonic() + 3600) == measure(tmp_path)


def test_a_deadline_that_passes_meanwhile_ends_it_too(tmp_path, monkeypatch):
    save(tmp_path, *large(BF16, BF16))
    monkeypatch.setattr(similarity, "BLOCK_ELEMENTS", similarity.CHUNK_ELEMENTS)
    deadline = time.monotonic() + 0.5
    told: list[int] = []

    def dawdle(done: int, total: int) -> None:
        told.append(done)
        time.sleep(max(0.0, deadline - time.monotonic()) + 0.01)

    with pytest.raises(OutOfTime):
        measure(tmp_path, threads=2, deadline=deadline, on_progress=dawdle)
    assert len(told) <= 2  # one block a thread, of three dozen


def test_the_bytes_that_were_read_are_told_and_grow_to_all(tmp_path):
    save(tmp_path, *large(BF16, F32))
    told: list[tuple[int, int]] = []
    found = measure(tmp_path, on_progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (found.bytes, found.bytes)
    assert found.bytes == sum(read_checkpoint(tmp_path / role).total_bytes for role in ("base", "instruct"))


def test_all_bits_are_read_or_refused(tmp_path):
    """Whatever the bits, there is a number or a sentence."""
    for seed in range(8):
        models = [{name: any_bits(shape, BF16, seed + place) for name, shape in SHAPES.items()} for place in (0, 99)]
        folder = tmp_path / str(seed)
        save(folder, *models)
        with pytest.raises(InvalidInput, match="NaN or infinity"):
            measure(folder)


@pytest.mark.parametrize(
    ("sigma", "found", "words"),
    [(0.016, "tested", "within 0.045"), (0.056, "untested", "beyond the 0.045"), (0.1075, "doubtful", "above 0.09")],
)
def test_the_distance_is_put_into_words_that_claim_little(tmp_path, sigma, found, words):
    save_model(tmp_path / "base", draw(0))
    save_model(tmp_path / "instruct", draw(1))
    assert band(sigma) == found
    said = remark(replace(measure(tmp_path), sigma_mean=sigma))
    assert words in said
    assert "validated by nobody" in said
