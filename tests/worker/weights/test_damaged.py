"""Folders that are damaged or hold more than a model: refused in a sentence, with nothing left; strays never opened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import InvalidInput
from core.graft_plan import Selection
from tests.worker.weights.families import ROLES, Layout, Recipe
from tests.worker.weights.made_checkpoints import INDEX, load_model, save_model
from worker.weights import FullDelta, graft

RECIPE = Recipe(layouts=(Layout(3), Layout(3), Layout(3)))
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    RECIPE.write(tmp_path)
    return tmp_path


def run(folder: Path, **options: Any) -> None:
    delta = FullDelta(base=folder / "base", tuned=folder / "tuned")
    graft(**{"instruct": folder / "instruct", "delta": delta, "out": folder / "out"} | options)


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def cut(folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-3])


def empty(folder: Path) -> None:
    first_shard(folder).write_bytes(b"")


def grow(folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes() + bytes(8))


def change_header(folder: Path, change: Callable[[dict[str, Any]], str]) -> None:
    """Replace the header's text; the data stay what they are."""
    shard = first_shard(folder)
    content = shard.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    text = change(json.loads(content[8:end])).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def overlap(folder: Path) -> None:
    def change(header: dict[str, Any]) -> str:
        entries = [entry for name, entry in header.items() if name != "__metadata__" and entry["data_offsets"][0]]
        for entry in entries:
            entry["data_offsets"] = [place - 1 for place in entry["data_offsets"]]
        return json.dumps(header)

    change_header(folder, change)


def name_twice(folder: Path) -> None:
    def change(header: dict[str, Any]) -> str:
        name, entry = next((name, entry) for name, entry in header.items() if name != "__metadata__")
        return json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"

    change_header(folder, change)


def no_json(folder: Path) -> None:
    change_header(folder, lambda header: "not JSON at all")


def far_offsets(folder: Path) -> None:
    def change(header: dict[str, Any]) -> str:
        entry = next(entry for name, entry in header.items() if name != "__metadata__" and entry["data_offsets"][1])
        entry["data_offsets"] = [place + 2**40 for place in entry["data_offsets"]]
        return json.dumps(header)

    change_header(folder, change)


def shard_missing(folder: Path) -> None:
    first_shard(folder).unlink()


def wrong_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    names = list(index["weight_map"])
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"][names[0]] = next(shard for shard in shards if shard != index["weight_map"][names[0]])
    (folder / INDEX).write_text(json.dumps(index))


def index_to_elsewhere(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: f"../instruct/{shard}" for name, shard in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def own_code(folder: Path) -> None:
    (folder / "modeling_mine.py").write_text("raise SystemExit")


DAMAGE = [
    *(cut, empty, grow, overlap, name_twice, no_json, far_offsets),
    *(shard_missing, wrong_index, index_to_elsewhere, no_config, own_code),
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_model_is_refused_in_a_sentence_and_nothing_is_left(models, role, damage):
    damage(models / role)
    with pytest.raises(InvalidInput) as refusal:
        run(models)
    assert role in refusal.value.message
    assert refusal.value.hint
    assert {path.name for path in models.iterdir()} == set(ROLES)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.write_bytes(b"rubbish")], ids=["pipes", "rubbish"])
def test_nothing_but_the_named_shards_is_opened(models, make):
    """Every name that a careless loader takes: to open a pipe that nobody writes to never returns."""
    strays = ("consolidated.safetensors", "adapter_model.safetensors", "model-00009-of-00009.safetensors")
    for role in ROLES:
        for name in (*strays, "pytorch_model.bin", "training_args.bin", "model.gguf"):
            make(models / role / name)
    run(models)
    assert load_model(models / "out").keys() == load_model_of(models / "instruct").keys()
    assert not [path for path in (models / "out").iterdir() if path.name in strays or path.suffix in (".bin", ".gguf")]


def load_model_of(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def test_a_quantised_model_is_refused(models):
    config = json.loads((models / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (models / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="quantised"):
        run(models)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("selection", [Selection(), Selection("all", exclude=("*.extra",))], ids=str)
def test_what_float32_does_not_hold_is_copied_where_nobody_grafts_it(tmp_path, dtype, selection):
    extra = {"model.layers.0.extra": torch.ones(4).to(dtype)}
    for value, role in enumerate(ROLES):
        save_model(tmp_path / role, {Q: torch.full((4, 4), float(value))} | extra)
    run(tmp_path, selection=selection)
    out = load_model(tmp_path / "out")
    assert torch.equal(out[Q], torch.full((4, 4), 3.0))
    assert out["model.layers.0.extra"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_a_dtype_that_float32_does_not_hold_is_refused(tmp_path, dtype):
    for role in ROLES:
        save_model(tmp_path / role, {Q: torch.ones(4, 4).to(dtype)})
    with pytest.raises(InvalidInput):
        run(tmp_path, selection=Selection(scope="all"))
    assert {path.name for path in tmp_path.iterdir()} == set(ROLES)
