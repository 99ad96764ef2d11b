"""What a graft reports, against the same figures in plain float64."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st

from core.graft_plan import Selection
from tests.worker.weights.families import Models, Recipe, recipes
from tests.worker.weights.law import law
from tests.worker.weights.made_checkpoints import Tensors, load_model, save_model, step
from worker.weights import LOW_FIDELITY, FullDelta, GraftResult, graft, remedy

Q = "model.layers.0.self_attn.q_proj.weight"


def run(folder: Path, **options: Any) -> GraftResult:
    delta = FullDelta(base=folder / "base", tuned=folder / "tuned")
    return graft(**{"instruct": folder / "instruct", "delta": delta, "out": folder / "out"} | options)


class Plain(NamedTuple):
    """Of one tensor, as vectors of float64."""

    update: torch.Tensor
    error: torch.Tensor
    kept: torch.Tensor
    gap: torch.Tensor

    @classmethod
    def of(cls, models: Models, out: Tensors, name: str, scale: float) -> Plain:
        base, tuned, kept, stored = (each[name].double().flatten() for each in (*models, out))
        update = scale * (tuned - base)
        return cls(update, stored - (kept + update), kept, kept - base)


def fidelity(listed: Iterable[Plain]) -> float:
    update, error, _, _ = map(torch.cat, zip(*listed, strict=True))
    return 1 - float(error.norm() / update.norm())


def relative_norm(listed: Iterable[Plain]) -> float:
    update, _, kept, _ = map(torch.cat, zip(*listed, strict=True))
    return float(update.norm() / kept.norm())


def cosine(listed: Iterable[Plain]) -> float:
    update, _, _, gap = map(torch.cat, zip(*listed, strict=True))
    return float(update.dot(gap) / (update.norm() * gap.norm()))


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-4, abs=1e-5)


def near_fidelity(listed: Iterable[Plain]) -> Any:
    """Within 1e-4, and what half a step of float32 is of the update: so much the sum moves before it is stored."""
    update, _, kept, _ = map(torch.cat, zip(*listed, strict=True))
    return pytest.approx(fidelity(listed), abs=1e-4 + float((step(kept + update) / 2).norm() / update.norm()))


@law(
    quick=15,
    thorough=300,
    recipe=recipes(values=st.sampled_from(["ordinary", "integers"])),
    scope=st.sampled_from(["linear", "all"]),
    scale=st.sampled_from([1.0, 0.5, -1.3]),
    output_dtype=st.sampled_from(["auto", "bfloat16"]),
)
def test_every_figure_is_that_of_float64(folder: Path, recipe: Recipe, scope: str, scale: float, output_dtype: str):
    models = recipe.write(folder)
    result = run(folder, selection=Selection(scope=scope), scale=scale, output_dtype=output_dtype)
    out = load_model(folder / "out")
    everything = {name: Plain.of(models, out, name, scale) for name in recipe.kind.shapes}
    taken = {name: each for name, each in everything.items() if scope == "all" or name in recipe.kind.linear}
    changed = {name: each for name, each in taken.items() if bool(each.update.any())}
    assert result.grafted == len(changed)
    if not changed:
        assert (result.fidelity, result.worst_tensor, result.relative_norm) == (1.0, None, 0.0)
        return
    check(result, list(changed.values()))
    worst = min(changed, key=lambda name: fidelity([changed[name]]))
    assert result.worst_fidelity == near_fidelity([changed[worst]])
    assert result.worst_fidelity == near_fidelity([changed[result.worst_tensor]])
    whole, outside = (
        math.fsum(float(each.update.square().sum()) for each in some.values())
        for some in (everything, {name: each for name, each in everything.items() if name not in taken})
    )
    assert result.discarded_share == near(math.sqrt(outside / whole))
    layers, modules = defaultdict(list), defaultdict(list)
    for name, each in changed.items():
        if number := re.search(r"\.(\d+)\.(?!gate_proj|up_proj|down_proj)", name):
            layers[number[1]].append(each)
        modules[re.sub(r"\.(weight|bias)$", "", name).split(".")[-1]].append(each)
    for groups, found in ((layers, result.layers), (modules, result.modules)):
        assert found.keys() == groups.keys()
        for group, listed in groups.items():
            assert found[group].tensors == len(listed)
            check(found[group], listed)


def check(found: Any, listed: list[Plain]) -> None:
    assert found.fidelity == near_fidelity(listed)
    if any(bool(each.kept.any()) for each in listed):
        assert found.relative_norm == near(relative_norm(listed))
    if any(bool(each.gap.any()) for each in listed):
        assert found.cosine == near(cosine(listed))
    else:
        assert found.cosine is None


def test_shadow_json_says_what_the_result_says(tmp_path):
    Recipe().write(tmp_path)
    result = run(tmp_path, selection=Selection(scope="all"))
    shadow = json.loads((tmp_path / "out" / "shadow.json").read_text())
    told = asdict(result)
    figures = ("fidelity", "worst_tensor", "worst_fidelity", "discarded_share", "relative_norm", "cosine", "grafted")
    assert {name: shadow[name] for name in (*figures, "layers", "modules")} == {
        name: told[name] for name in (*figures, "layers", "modules")
    }
    json.dumps(told, allow_nan=False)


def save_single(folder: Path, instruct: torch.Tensor, tuned: torch.Tensor) -> None:
    """One tensor each; base is zero."""
    save_model(folder / "instruct", {Q: instruct})
    save_model(folder / "base", {Q: torch.zeros_like(tuned)})
    save_model(folder / "tuned", {Q: tuned})


def test_the_rounding_of_a_float32_output_is_seen_too(tmp_path):
    save_single(tmp_path, torch.ones(4, 4), torch.full((4, 4), 2.0**-25))  # a quarter of 1.0's last place
    assert run(tmp_path).fidelity == 0


def test_an_update_that_storage_swallows_whole_has_the_fidelity_zero(tmp_path):
    save_single(tmp_path, torch.ones(4, 4).bfloat16(), torch.full((4, 4), 2.0**-14))  # a 64th of 1.0's last place
    result = run(tmp_path)
    assert (result.fidelity, result.worst_fidelity, result.worst_tensor) == (0, 0, Q)
    assert result.fidelity < LOW_FIDELITY


def test_float32_output_keeps_what_bfloat16_loses(tmp_path):
    generator = torch.Generator().manual_seed(0)
    save_single(
        tmp_path, torch.randn(64, 64, generator=generator).bfloat16(), 1e-4 * torch.randn(64, 64, generator=generator)
    )
    lost = run(tmp_path)
    kept = run(tmp_path, output_dtype="float32", out=tmp_path / "float32")
    assert lost.fidelity < LOW_FIDELITY < 0.999 < kept.fidelity
    assert "float32" in remedy("full", "bfloat16")
    assert "float32" not in remedy("full", "float32")
    assert "adapter" in remedy("lora", "bfloat16")


def test_a_graft_without_figures_has_the_same_weights(tmp_path):
    Recipe().write(tmp_path)
    run(tmp_path)
    run(tmp_path, measure=False, hashes=False, out=tmp_path / "bare")
    measured, bare = (load_model(tmp_path / each) for each in ("out", "bare"))
    assert all(torch.equal(measured[name], bare[name]) for name in measured)


@pytest.mark.parametrize("scale", [1e-3, 1e-5, 1e-7, 1e-9, -1e-9])
def test_an_update_below_the_last_place_of_float32_is_no_kept_one(tmp_path, scale):
    """The sum itself is rounded before it is stored: what that takes is lost too."""
    torch.manual_seed(0)
    base = torch.randn(64, 64).mul_(0.02).bfloat16()
    models = Models({Q: base}, {Q: base.float() + 1e-3 * torch.randn(64, 64)}, {Q: (base * 1.01).bfloat16()})
    for role, tensors in zip(models._fields, models, strict=True):
        save_model(tmp_path / role, tensors)
    result = run(tmp_path, scale=scale)
    plain = Plain.of(models, load_model(tmp_path / "out"), Q, scale)
    assert result.fidelity == pytest.approx(fidelity([plain]), abs=1e-6)
    assert result.fidelity > -1e-6


@pytest.mark.parametrize("scale", [1e-170, -1e-320, 1e39, 1e200])
def test_any_finite_scale_of_no_change_gives_instruct(tmp_path, scale):
    kept = torch.tensor([[1.0, -0.0], [3e38, 1e-40]]).bfloat16()
    save_model(tmp_path / "instruct", {Q: kept})
    for role in ("base", "tuned"):
        save_model(tmp_path / role, {Q: torch.ones(2, 2)})
    result = run(tmp_path, scale=scale)
    assert (result.grafted, result.fidelity) == (0, 1.0)
    assert torch.equal(load_model(tmp_path / "out")[Q].view(torch.int16), kept.view(torch.int16))


def test_weights_that_are_all_zero_have_no_relative_norm(tmp_path):
    save_single(tmp_path, torch.zeros(4, 4), torch.ones(4, 4))
    result = run(tmp_path)
    assert (result.relative_norm, result.layers["0"].relative_norm, result.fidelity) == (None, None, 1.0)


def test_at_scale_zero_no_share_was_looked_at(tmp_path):
    for role, value in {"instruct": 1.0, "base": 1.0, "tuned": 2.0}.items():
        save_model(tmp_path / role, {Q: torch.full((2, 2), value)})
    assert run(tmp_path, scale=0.0).discarded_share is None
