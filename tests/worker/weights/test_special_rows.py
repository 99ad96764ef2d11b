"""Rows that nobody has trained: how they are told from others, lent, kept and counted as the start of a tuning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.checkpoints import ADAPTER_FILE
from core.errors import InvalidInput
from core.graft_plan import Selection
from tests.worker.weights.families import BF16, F16, F32, Layout, Models, Recipe, layouts, one_dtype, save_as
from tests.worker.weights.law import law
from tests.worker.weights.made_checkpoints import Tensors, all_bytes, load_model, same_bits, same_models, save_model
from worker.weights import FullDelta, GraftResult, LoraDelta, SavedDelta, graft, save_delta, untrained_rows, verify
from worker.weights.special_rows import START_ROWS_FILE, read_start_rows, rows_for_untrained, save_start_rows

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ALL = Selection(scope="all")
ROWS, COLUMNS = 300, 16
#: The last ones, as in Llama 3.
MARKS = [290, 291, 295]
RESERVED = range(292, 300)


def table(seed: int, *, rows: int = ROWS, std: float = 0.02) -> Tensor:
    return std * torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))


def save(folder: Path, embedding: Tensor, head: Tensor | None = None, dtype: torch.dtype = BF16, **more: Any) -> Path:
    tensors = {EMBEDDING: embedding, "model.norm.weight": torch.ones(COLUMNS)}
    tensors |= {} if head is None else {HEAD: head}
    cast = {name: values.to(dtype) for name, values in tensors.items()}
    return save_model(folder, cast, tie_word_embeddings=head is None, **more)


def untouched(seed: int) -> Tensor:
    """A table in which marks and reserved rows were never trained."""
    values = table(seed)
    values[[*MARKS, *RESERVED]] = 0.0
    return values


# --- how they are told ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_rows_of_zeros_are_untrained_in_both_tables(tmp_path, dtype):
    save(tmp_path / "m", untouched(0), untouched(1), dtype)
    assert untrained_rows(tmp_path / "m", [5, *MARKS, 289]) == {EMBEDDING: MARKS, HEAD: MARKS}


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_rows_that_decayed_to_next_to_nothing_are_untrained(tmp_path, dtype):
    values = table(0)
    values[MARKS] = 1e-20 * table(1, rows=3)
    save(tmp_path / "m", values, dtype=dtype)
    assert untrained_rows(tmp_path / "m", MARKS) == {EMBEDDING: MARKS}


def test_rows_that_are_equal_to_one_another_are_untrained_whatever_their_size(tmp_path):
    """As in the head of Llama 3.1; also where a single mark is asked for, and its like are reserved."""
    head = table(1)
    head[[*MARKS, *RESERVED]] = table(2, rows=1)
    save(tmp_path / "m", table(0), head)
    assert untrained_rows(tmp_path / "m", MARKS) == {HEAD: MARKS}
    assert untrained_rows(tmp_path / "m", [290]) == {HEAD: [290]}


def test_small_rows_that_differ_are_trained(tmp_path):
    values = table(0)
    values[MARKS] *= 0.05
    values[-1] = 0.0  # padding
    save(tmp_path / "m", values)
    assert untrained_rows(tmp_path / "m", MARKS) == {}


def test_rows_in_the_middle_and_at_the_ends_are_found_in_a_sharded_model_under_a_prefix(tmp_path):
    recipe = replace(Recipe("vision"), sizes=replace(Recipe().sizes, vocabulary=80, hidden=8))
    models = recipe.models()
    name = f"language_model.{EMBEDDING}"
    models.base[name][[0, 40, 79]] = 0.0
    save_as(tmp_path / "m", models.base, Layout(3, 1, misaligned=True), recipe.kind.config)
    assert untrained_rows(tmp_path / "m", [79, 0, 40, 41, 40]) == {name: [0, 40, 79]}


def test_tokens_that_the_model_lacks_are_not_named(tmp_path):
    save(tmp_path / "m", untouched(0))
    assert untrained_rows(tmp_path / "m", [299, 300, 5000, -1]) == {EMBEDDING: [299]}
    assert untrained_rows(tmp_path / "m", []) == {}


# --- what is lent -----------------------------------------------------------------------------------------------------


def test_instructs_rows_are_lent_where_they_are_trained(tmp_path):
    """Of a mark that Instruct does not know either there is nothing to lend; neither table speaks for the other."""
    base = save(tmp_path / "base", untouched(0), table(1), F32)
    theirs = table(2)
    theirs[291] = 0.0
    save(tmp_path / "instruct", theirs, table(3))
    rows = rows_for_untrained(base, tmp_path / "instruct", [5, *MARKS])
    assert {name: list(some) for name, some in rows.items()} == {EMBEDDING: [290, 295]}
    stored = load_model(tmp_path / "instruct")[EMBEDDING]
    assert all(same_bits(torch.from_numpy(values), stored[row].float()) for row, values in rows[EMBEDDING].items())


def test_a_tied_head_that_is_stored_gets_its_embeddings_rows(tmp_path):
    for role, embedding in (("base", untouched(0)), ("instruct", table(2))):
        tensors = {EMBEDDING: embedding, HEAD: embedding.clone(), "model.norm.weight": torch.ones(COLUMNS)}
        save_model(tmp_path / role, tensors, tie_word_embeddings=True)
    rows = rows_for_untrained(tmp_path / "base", tmp_path / "instruct", MARKS)
    assert {name: list(some) for name, some in rows.items()} == {EMBEDDING: MARKS, HEAD: MARKS}


def test_a_base_that_has_trained_them_is_lent_nothing(tmp_path):
    base = save(tmp_path / "base", table(0), table(1))
    save(tmp_path / "instruct", table(2), table(3))
    assert rows_for_untrained(base, tmp_path / "instruct", MARKS) == {}
    save_start_rows(tmp_path, {})
    assert not (tmp_path / START_ROWS_FILE).exists()
    assert read_start_rows(tmp_path) == {}


def test_what_is_kept_is_what_is_read(tmp_path):
    rows = {EMBEDDING: {290: table(0)[0].numpy(), 7: table(0)[1].numpy()}, HEAD: {3: table(0)[2].numpy()}}
    save_start_rows(tmp_path, rows)
    found = read_start_rows(tmp_path)
    assert found.keys() == rows.keys()
    assert all(np.array_equal(found[name][row], rows[name][row]) for name in rows for row in rows[name])


# --- the start of a tuning --------------------------------------------------------------------------------------------

TABLES = ("embed_tokens", "wte", "lm_head")


def patch(folder: Path, recipe: Recipe, seed: int) -> Models:
    """A pair whose base has rows of zeros, tuned from a start with Instruct's rows there. Base is the start."""
    models = recipe.models()
    generator = torch.Generator().manual_seed(seed)
    rows, published = {}, dict(models.base)
    for name in models.base:
        if any(part in name for part in TABLES):
            count = models.base[name].shape[0]
            chosen = torch.randperm(count, generator=generator)[: max(1, count // 3)]
            published[name] = models.base[name].clone()
            published[name][chosen] = 0.0
            lent = models.instruct[name][chosen].float()
            models.base[name] = models.base[name].float()
            models.base[name][chosen] = lent
            models.tuned[name][chosen] = (lent + 1e-3 * torch.randn(lent.shape, generator=generator)).to(
                models.tuned[name].dtype
            )
            rows[name] = {int(row): values.numpy() for row, values in zip(chosen, lent, strict=True)}
    recipe.save(folder, models._replace(base=published))
    save_start_rows(folder / "tuned", rows)
    return models


def run(folder: Path, out: str = "out", **options: Any) -> GraftResult:
    delta = FullDelta(folder / "base", folder / "tuned")
    return graft(**{"instruct": folder / "instruct", "delta": delta, "out": folder / out, "selection": ALL} | options)


def check(models: Models, out: Tensors) -> None:
    """To the bit: Instruct plus (tuned minus the start), and Instruct's own bits where tuning left the start alone."""
    for name, instruct in models.instruct.items():
        if instruct.is_floating_point():
            update = models.tuned[name].float() - models.base[name].float()
            plain = torch.where(update == 0, instruct, (instruct.float() + update).to(instruct.dtype))
            same = models.base[name].float().equal(instruct.float())  # then the tuned values, to the bit
            assert same_bits(out[name], models.tuned[name].to(instruct.dtype) if same else plain), name


patched = st.builds(
    Recipe,
    family=st.sampled_from(["dense", "tied, with biases", "gpt2", "vision"]),
    sizes=st.sampled_from([replace(Recipe().sizes, vocabulary=rows) for rows in (3, 33, 129)]),
    dtypes=st.tuples(one_dtype, one_dtype, one_dtype).map(lambda three: replace_dtypes(*three)),
    layouts=st.tuples(layouts, layouts, layouts),
    values=st.just("ordinary"),
    seed=st.integers(0, 2**32),
)


def replace_dtypes(*three: torch.dtype) -> Any:
    return type(Recipe().dtypes)(*three)


@law(quick=20, thorough=300, recipe=patched, seed=st.integers(0, 99))
def test_the_graft_subtracts_the_start_that_the_tuning_really_had(folder: Path, recipe: Recipe, seed: int):
    models = patch(folder, recipe, seed)
    result = run(folder)
    check(models, load_model(folder / "out"))
    sources = {role: folder / role for role in ("instruct", "base", "tuned")}
    found = verify(folder / "out", sources=sources, everything=True)
    assert (found.problems, found.tensors) == ((), found.tensors_in_all)
    told = json.loads((folder / "out" / "shadow.json").read_text())
    kept = read_start_rows(folder / "tuned")
    assert told["start_rows"] == {name: sorted(some) for name, some in kept.items()}
    assert told["sources"]["tuned"]["files"].keys() >= {START_ROWS_FILE}
    assert result.fidelity <= 1


@law(quick=10, thorough=200, recipe=patched, seed=st.integers(0, 99))
def test_a_base_that_is_instruct_but_for_those_rows_gives_the_tuned_model(folder: Path, recipe: Recipe, seed: int):
    dtype = recipe.dtypes.instruct
    recipe = replace(recipe, dtypes=replace_dtypes(dtype, dtype, dtype))
    models = patch(folder, recipe, seed)
    published = load_model(folder / "base")
    rows = read_start_rows(folder / "tuned")
    instruct = {name: values.clone() for name, values in published.items()}
    for name, some in rows.items():
        for row, values in some.items():
            instruct[name][row] = torch.from_numpy(values).to(dtype)
    save_as(folder / "other", instruct, recipe.layouts[2], recipe.kind.config)
    run(folder, instruct=folder / "other")
    out = load_model(folder / "out")
    for name, values in models.tuned.items():
        assert same_bits(out[name], values if values.is_floating_point() else instruct[name]), name


RECIPE = replace(
    Recipe("dense", layouts=(Layout(), Layout(2), Layout(3))), sizes=replace(Recipe().sizes, vocabulary=33)
)


def test_the_saved_delta_is_that_of_the_same_start(tmp_path):
    models = patch(tmp_path, RECIPE, 1)
    run(tmp_path)
    save_delta(base=tmp_path / "base", tuned=tmp_path / "tuned", out=tmp_path / "delta")
    graft(instruct=tmp_path / "instruct", delta=SavedDelta(tmp_path / "delta"), out=tmp_path / "later", selection=ALL)
    assert same_models(load_model(tmp_path / "later"), load_model(tmp_path / "out"))
    stored = load_file(tmp_path / "delta" / "delta.safetensors")[EMBEDDING]
    assert same_bits(stored, models.tuned[EMBEDDING].float() - models.base[EMBEDDING].float())
    told = json.loads((tmp_path / "delta" / "delta.json").read_text())
    assert told["start_rows"].keys() == {EMBEDDING, HEAD}
    sources = {"base": tmp_path / "base", "tuned": tmp_path / "tuned"}
    assert verify(tmp_path / "delta", sources=sources, everything=True).problems == ()


def test_rows_that_a_scope_leaves_out_are_measured_from_the_same_start(tmp_path):
    models = patch(tmp_path, RECIPE, 1)
    result = run(tmp_path, selection=Selection("linear"))
    squares = {
        name: float((models.tuned[name].double() - models.base[name].double()).square().sum())
        for name in RECIPE.kind.shapes
    }
    left_out = sum(squares[name] for name in RECIPE.kind.rest)
    assert result.discarded_share == pytest.approx((left_out / sum(squares.values())) ** 0.5, rel=1e-5)


def test_a_changed_row_of_the_start_is_found(tmp_path):
    patch(tmp_path, RECIPE, 1)
    run(tmp_path)
    file = tmp_path / "tuned" / START_ROWS_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    sources = {role: tmp_path / role for role in ("instruct", "base", "tuned")}
    problem = f"the tuned source's {START_ROWS_FILE} is not the file that was grafted (its sha256 differs)"
    assert verify(tmp_path / "out", sources=sources).problems == (problem,)


def test_other_rows_are_another_graft(tmp_path):
    """A draft of one start is not gone on with from another."""
    patch(tmp_path, RECIPE, 1)
    run(tmp_path)
    (tmp_path / "tuned" / START_ROWS_FILE).unlink()
    run(tmp_path, "unpatched")
    one, other = (load_model(tmp_path / out) for out in ("out", "unpatched"))
    assert not same_bits(one[EMBEDDING], other[EMBEDDING])
    assert "start_rows" not in json.loads((tmp_path / "unpatched" / "shadow.json").read_text())


def write_lora(folder: Path) -> Path:
    """An adapter of one linear."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(1, 4), f"{module}.lora_B.weight": torch.ones(4, 1)}
    save_file(factors, folder / ADAPTER_FILE)
    return folder


def test_an_adapters_graft_names_the_rows_and_is_not_changed_by_them(tmp_path):
    RECIPE.write(tmp_path)
    adapter = write_lora(tmp_path / "adapter")
    for out in ("before", "after"):
        graft(instruct=tmp_path / "instruct", delta=LoraDelta(adapter), out=tmp_path / out)
        save_start_rows(adapter, {EMBEDDING: {3: np.ones(4, np.float32)}, HEAD: {3: np.ones(4, np.float32)}})
    before, after = all_bytes(tmp_path / "before"), all_bytes(tmp_path / "after")
    assert {name for name in before if before[name] != after[name]} == {"shadow.json", "manifest.json"}
    told = json.loads(after["shadow.json"])
    assert told["start_rows"] == {EMBEDDING: [3], HEAD: [3]}
    assert told["sources"]["adapter"]["files"].keys() >= {START_ROWS_FILE}


@pytest.mark.parametrize("dora", [False, True], ids=["whole", "DoRA"])
def test_an_adapters_vocabulary_is_measured_from_the_same_start(tmp_path, dora):
    """As if a base with those rows had been published, bit for bit."""
    models = RECIPE.write(tmp_path)
    row = torch.arange(4, dtype=torch.float32)
    start = models.base[EMBEDDING].float()
    start[3] = row
    save_as(tmp_path / "patched", models.base | {EMBEDDING: start}, Layout(), RECIPE.kind.config)
    tensors = {"": start + 0.125}
    if dora:
        a, b = torch.randn(2, 33), torch.randn(4, 2)
        tensors = {"lora_embedding_A": a, "lora_embedding_B": b, "lora_magnitude_vector": torch.rand(4)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": dora}
    for name, base in (("plain", "patched"), ("adapter", "base")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        prefix = f"base_model.model.{EMBEDDING.removesuffix('weight')}"
        save_file({prefix + (key or "weight"): value for key, value in tensors.items()}, tmp_path / name / ADAPTER_FILE)
        save_start_rows(tmp_path / name, {EMBEDDING: {3: row.numpy()}} if name == "adapter" else {})
        delta = LoraDelta(tmp_path / name, tmp_path / base)
        graft(instruct=tmp_path / "instruct", delta=delta, out=tmp_path / f"{name} out", selection=ALL)
    assert same_models(load_model(tmp_path / "adapter out"), load_model(tmp_path / "plain out"))
    sources = {role: tmp_path / role for role in ("instruct", "adapter", "base")}
    assert verify(tmp_path / "adapter out", sources=sources, everything=True).problems == ()


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("tensor", ["model.other.weight", "model.norm.weight", "lm_head.bias"])
def test_an_adapters_rows_must_be_rows_of_a_vocabulary(tmp_path, tensor, with_base):
    RECIPE.write(tmp_path)
    adapter = write_lora(tmp_path / "adapter")
    save_start_rows(adapter, {tensor: {1: np.ones(4, np.float32)}})
    delta = LoraDelta(adapter, tmp_path / "base" if with_base else None)
    with pytest.raises(InvalidInput, match=f"adapter/{START_ROWS_FILE} holds {tensor}/1, which is no row"):
        graft(instruct=tmp_path / "instruct", delta=delta, out=tmp_path / "out")


ODD: dict[str, Tensors] = {
    "no number": {f"{EMBEDDING}/x": torch.ones(4)},
    "no name": {"7": torch.ones(4)},
    "a sign": {f"{EMBEDDING}/-1": torch.ones(4)},
    "a table": {f"{EMBEDDING}/1": torch.ones(2, 4)},
    "another dtype": {f"{EMBEDDING}/1": torch.ones(4, dtype=BF16)},
    "too long": {f"{EMBEDDING}/1": torch.ones(5)},
    "a row too far": {f"{EMBEDDING}/33": torch.ones(4)},
    "a tensor that base lacks": {"model.other.weight/1": torch.ones(4)},
    "a tensor without rows": {"model.norm.weight/1": torch.ones(4)},
}


@pytest.mark.parametrize("tensors", ODD.values(), ids=ODD.keys())
def test_odd_rows_are_refused(tmp_path, tensors):
    patch(tmp_path, RECIPE, 1)
    save_file(tensors, tmp_path / "tuned" / START_ROWS_FILE)
    with pytest.raises(InvalidInput, match=f"tuned/{START_ROWS_FILE} holds .* no row of the model") as caught:
        run(tmp_path)
    assert caught.value.code == "damaged_checkpoint"


def test_a_file_that_is_none_is_refused(tmp_path):
    patch(tmp_path, RECIPE, 1)
    (tmp_path / "tuned" / START_ROWS_FILE).write_bytes(b"rows")
    with pytest.raises(InvalidInput, match=f"tuned/{START_ROWS_FILE} is damaged"):
        run(tmp_path)
