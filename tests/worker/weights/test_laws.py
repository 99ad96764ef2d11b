"""The laws of the graft, over every family of models, on real files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from core.errors import InvalidInput
from core.graft_plan import Selection
from tests.worker.weights.families import (
    Dtypes,
    Layout,
    Models,
    Recipe,
    any_bits,
    layouts,
    one_dtype,
    recipes,
    same_dtypes,
    save_as,
    sizes,
)
from tests.worker.weights.law import law, working_in
from tests.worker.weights.made_checkpoints import Tensors, load_model, same_bits, same_models, step
from worker.weights import FullDelta, GraftResult, graft, tensors, writing

ALL, LINEAR = Selection(scope="all"), Selection(scope="linear")
scopes = st.sampled_from([ALL, LINEAR])
scales = st.sampled_from([1.0, 0.5, -1.0, 0.7, 2.0, -1.3, 1e-3])


def run(folder: Path, *, instruct: str = "instruct", out: str = "out", **options: Any) -> GraftResult:
    delta = FullDelta(base=folder / "base", tuned=folder / "tuned")
    return graft(**{"instruct": folder / instruct, "delta": delta, "out": folder / out} | options)


def floats(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def update_of(models: Models, name: str, scale: float) -> Tensor:
    return scale * (models.tuned[name].float() - models.base[name].float())


def plain(models: Models, name: str, scale: float, dtype: torch.dtype) -> Tensor:
    """The formula, in one line of torch."""
    return (models.instruct[name].float() + update_of(models, name, scale)).to(dtype)


# --- what changes, and what does not ----------------------------------------------------------------------------------


@law(quick=25, thorough=500, recipe=recipes(dtypes=same_dtypes), selection=scopes, scale=scales)
def test_a_zero_delta_gives_instruct_bit_for_bit(folder: Path, recipe: Recipe, selection: Selection, scale: float):
    """Whatever the bits are: NaN with its payload, infinities, -0.0, subnormals; in Instruct, and in base too."""
    models = recipe.models()
    for number, name in enumerate(floats(models.instruct)):
        shape, dtype = models.instruct[name].shape, recipe.dtypes.instruct
        models.instruct[name] = any_bits(shape, dtype, recipe.seed + number)
        models.base[name] = models.tuned[name] = any_bits(shape, dtype, ~recipe.seed + number)
    recipe.save(folder, models)
    result = run(folder, selection=selection, scale=scale)
    assert same_models(load_model(folder / "out"), models.instruct)
    assert (result.grafted, result.fidelity, result.worst_tensor) == (0, 1.0, None)


@law(
    quick=25,
    thorough=500,
    recipe=recipes(dtypes=same_dtypes, values=st.sampled_from(["ordinary", "integers"])),
    share=st.sampled_from([0.02, 0.5, 0.98]),
    scale=scales,
)
def test_an_element_that_tuning_left_alone_keeps_its_bits_among_others(
    folder: Path, recipe: Recipe, share: float, scale: float
):
    """NaN and infinities in it, in Instruct and in base, are no concern of its neighbours, nor of any figure."""
    models = recipe.models()
    alone = {}
    for number, (name, tensor) in enumerate(floats(models.instruct).items()):
        generator = torch.Generator().manual_seed(recipe.seed + number)
        alone[name] = torch.rand(tensor.shape, generator=generator) < share
        kept, start = (any_bits(tensor.shape, tensor.dtype, seed + number) for seed in (recipe.seed, ~recipe.seed))
        models.instruct[name] = torch.where(alone[name], kept, tensor)
        for model in (models.base, models.tuned):
            model[name] = torch.where(alone[name], start, model[name])
    recipe.save(folder, models)
    result = run(folder, selection=ALL, scale=scale)
    out = load_model(folder / "out")
    for name, instruct in floats(models.instruct).items():
        still = alone[name] | (update_of(models, name, scale) == 0)
        assert same_bits(out[name][still], instruct[still]), name
        assert same_bits(out[name][~still], plain(models, name, scale, instruct.dtype)[~still]), name
    assert math.isfinite(result.fidelity)
    assert math.isfinite(result.relative_norm)


@law(quick=15, thorough=300, recipe=recipes(), selection=scopes)
def test_the_scale_zero_gives_instruct_bit_for_bit(folder: Path, recipe: Recipe, selection: Selection):
    models = recipe.models()
    for number, name in enumerate(floats(models.instruct)):
        models.instruct[name] = any_bits(models.instruct[name].shape, recipe.dtypes.instruct, recipe.seed + number)
    recipe.save(folder, models)
    run(folder, selection=selection, scale=0.0)
    assert same_models(load_model(folder / "out"), models.instruct)


@law(quick=25, thorough=500, recipe=recipes(dtypes=same_dtypes))
def test_grafting_onto_base_itself_gives_the_tuned_model(folder: Path, recipe: Recipe):
    """To the bit, however far the exponents of base and tuned lie apart, and -0.0 too."""
    models = recipe.models()
    models.instruct.update({name: tensor.clone() for name, tensor in models.base.items()})
    recipe.save(folder, models)
    run(folder, selection=ALL)
    assert same_models(floats(load_model(folder / "out")), floats(models.tuned))


@law(
    quick=50,
    thorough=1000,
    recipe=recipes(),
    selection=scopes,
    scale=scales,
    output_dtype=st.sampled_from(["auto", "bfloat16", "float32"]),
)
def test_a_changed_element_is_the_plain_formula_rounded_once(
    folder: Path, recipe: Recipe, selection: Selection, scale: float, output_dtype: str
):
    """Where the update is zero the element is Instruct's, and no other tensor of it changes."""
    models = recipe.write(folder)
    run(folder, selection=selection, scale=scale, output_dtype=output_dtype)
    out = load_model(folder / "out")
    taken = recipe.kind.shapes if selection is ALL else recipe.kind.linear
    assert out.keys() == models.instruct.keys()
    for name, instruct in floats(models.instruct).items():
        dtype = recipe.dtypes.instruct if output_dtype == "auto" else getattr(torch, output_dtype)
        kept, given = instruct.to(dtype), out[name]
        if scale == 1 and name in taken and torch.equal(instruct.float(), models.base[name].float()):
            continue  # base's own: another law's matter
        changed = (update_of(models, name, scale) != 0) & torch.tensor(name in taken)
        assert same_bits(given[changed], plain(models, name, scale, dtype)[changed]), name
        assert same_bits(given[~changed], kept[~changed]), name


@law(quick=15, thorough=300, recipe=recipes(), scale=scales)
def test_linear_leaves_every_other_tensor_untouched(folder: Path, recipe: Recipe, scale: float):
    """NaN among the rest included: they are copied and not added to."""
    models = recipe.models()
    others = floats(models.instruct).keys() - recipe.kind.linear.keys()
    for number, name in enumerate(sorted(others)):
        models.instruct[name] = any_bits(models.instruct[name].shape, recipe.dtypes.instruct, recipe.seed + number)
    recipe.save(folder, models)
    result = run(folder, selection=LINEAR, scale=scale)
    out = load_model(folder / "out")
    assert all(
        same_bits(out[name], models.instruct[name]) for name in models.instruct.keys() - recipe.kind.linear.keys()
    )
    assert result.grafted + result.copied == len(models.instruct)


@law(
    quick=20,
    thorough=300,
    recipe=recipes(),
    include=st.lists(
        st.sampled_from(["*", "*attn*", "*.weight", "*.0.*", "model.norm.weight", "*[de]_proj*"]), max_size=2
    ),
    exclude=st.lists(st.sampled_from(["*down*", "*.bias", "*embed*", "*.1.*", "*v_proj*"]), max_size=2),
    scope=st.sampled_from(["linear", "all"]),
)
def test_patterns_choose_among_the_tensors_of_the_scope(
    folder: Path, recipe: Recipe, include: list[str], exclude: list[str], scope: str
):
    """A pattern that matches nothing is a slip of the pen, and refused; so is a choice of no tensor at all."""
    models = recipe.write(folder)

    def is_taken(name: str) -> bool:
        in_scope = name in recipe.kind.linear or (scope == "all" and name in recipe.kind.rest)
        named = not include or any(fnmatchcase(name, pattern) for pattern in include)
        return in_scope and named and not any(fnmatchcase(name, pattern) for pattern in exclude)

    selection = Selection(scope, tuple(include), tuple(exclude))
    idle = [one for one in include + exclude if not any(fnmatchcase(name, one) for name in models.instruct)]
    if idle or not any(is_taken(name) for name in models.instruct):
        with pytest.raises(InvalidInput):
            run(folder, selection=selection)
        return
    run(folder, selection=selection)
    out = load_model(folder / "out")
    for name, tensor in models.instruct.items():
        changes = is_taken(name) and not same_bits(plain(models, name, 1.0, tensor.dtype), tensor)
        assert changes or same_bits(out[name], tensor), name
        if is_taken(name):
            apart = (models.instruct[name].float() != models.base[name].float()) & (update_of(models, name, 1.0) != 0)
            assert same_bits(out[name][apart], plain(models, name, 1.0, tensor.dtype)[apart]), name


# --- what makes no difference -----------------------------------------------------------------------------------------


def figures_of(folder: Path) -> dict[str, Any]:
    """What `shadow.json` says besides the names of files, which differ with their layout."""
    shadow = json.loads((folder / "shadow.json").read_text())
    return {key: value for key, value in shadow.items() if key != "sources"}


chunks = st.sampled_from([37, 256, 4096, tensors.CHUNK_ELEMENTS])
blocks = st.sampled_from([writing.ALIGNMENT, 3 * writing.ALIGNMENT, writing.BLOCK_BYTES])


@law(
    quick=20,
    thorough=300,
    recipe=recipes(),
    others=st.tuples(layouts, layouts, layouts),
    threads=st.sampled_from([1, 2, 3, 4]),
    chunk=chunks,
    block=blocks,
    selection=scopes,
    scale=scales,
    figures=st.booleans(),
)
def test_neither_shards_nor_threads_change_a_bit(
    folder: Path,
    recipe: Recipe,
    others: tuple[Layout, Layout, Layout],
    threads: int,
    chunk: int,
    block: int,
    selection: Selection,
    scale: float,
    figures: bool,
):
    models = recipe.write(folder)
    other = write_otherwise(folder, recipe, models, others)
    fixed = {"selection": selection, "scale": scale, "measure": figures}
    with working_in(chunk, block):
        run(folder, **fixed, threads=1)
        run(folder, **fixed, **other, threads=threads, out="other")
    assert same_models(load_model(folder / "other"), load_model(folder / "out"))


@law(
    quick=15,
    thorough=300,
    recipe=recipes(),
    others=st.tuples(layouts, layouts, layouts),
    threads=st.sampled_from([1, 2, 3, 4]),
    block=blocks,
    selection=scopes,
    scale=scales,
)
def test_neither_shards_nor_threads_change_a_figure(
    folder: Path,
    recipe: Recipe,
    others: tuple[Layout, Layout, Layout],
    threads: int,
    block: int,
    selection: Selection,
    scale: float,
):
    models = recipe.write(folder)
    other = write_otherwise(folder, recipe, models, others)
    fixed = {"selection": selection, "scale": scale}
    with working_in(tensors.CHUNK_ELEMENTS, block):
        run(folder, **fixed, threads=1)
        run(folder, **fixed, **other, threads=threads, out="other")
    one, two = (flat(figures_of(folder / each)) for each in ("other", "out"))
    assert one == pytest.approx(two, rel=1e-6, abs=1e-7)  # chunks that another block's border cuts are summed in parts


def flat(values: dict[str, Any], name: str = "") -> dict[str, Any]:
    """Numbers by their path. Not the worst tensor's name: among near equals it may be another one."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{name}{key}.")
        elif isinstance(value, int | float):
            found[f"{name}{key}"] = value
    return found


def write_otherwise(
    folder: Path, recipe: Recipe, models: Models, others: tuple[Layout, Layout, Layout]
) -> dict[str, Any]:
    """The same models in folders of another layout; as arguments of `run`."""
    for role, model, layout in zip(models._fields, models, others, strict=True):
        save_as(folder / f"other {role}", model, layout, recipe.kind.config)
    return {"instruct": "other instruct", "delta": FullDelta(folder / "other base", folder / "other tuned")}


@law(quick=15, thorough=300, recipe=recipes(), chunk=chunks, block=blocks, selection=scopes, scale=scales)
def test_what_is_computed_and_written_at_once_changes_no_bit(
    folder: Path, recipe: Recipe, chunk: int, block: int, selection: Selection, scale: float
):
    recipe.write(folder)
    run(folder, selection=selection, scale=scale)
    with working_in(chunk, block):
        run(folder, selection=selection, scale=scale, threads=2, out="other")
    assert same_models(load_model(folder / "other"), load_model(folder / "out"))


# --- sums, dtypes, vocabularies ---------------------------------------------------------------------------------------


@law(
    quick=25,
    thorough=250,
    recipe=recipes(),
    parts=st.tuples(*[st.sampled_from([0.125, 0.25, 0.5, -0.25, 1.0, -1.0, 2.0])] * 2),
)
def test_two_grafts_are_one_of_both_scales(folder: Path, recipe: Recipe, parts: tuple[float, float]):
    """In float32, one step of the largest of the three sums apart at most, wherever that is 8 times the updates' steps
    (of subnormal updates it may not be, however small they are).

    The three sums I + a D, (I + a D) + b D and I + (a + b) D, each within half a step of it, make 1.5 steps; the three
    products, each of an eighth, less than a quarter more; and since both results are whole multiples of half a step at
    least, and of a whole one unless a sum is smaller, one step is left. Elsewhere each of the six roundings is half a
    step of what it rounds.
    """
    first, second = parts
    models = recipe.write(folder)
    run(folder, selection=ALL, output_dtype="float32", scale=first, out="first")
    run(folder, selection=ALL, output_dtype="float32", scale=second, instruct="first", out="second")
    run(folder, selection=ALL, output_dtype="float32", scale=first + second)
    halfway, twice, once = (load_model(folder / each) for each in ("first", "second", "out"))
    for name in recipe.kind.shapes:
        sums = [model[name].double() for model in (halfway, twice, once)]
        updates = [update_of(models, name, scale).double() for scale in (first, second, first + second)]
        largest = torch.stack([each.abs() for each in sums]).amax(0)
        roundings = sum(step(each) / 2 for each in (*sums, *updates))
        small = step(torch.stack([each.abs() for each in updates]).amax(0)) <= step(largest) / 8
        bound = torch.where(small, step(largest), roundings)
        apart = (sums[1] - sums[2]).abs()
        assert bool((apart <= bound).all()), (name, apart.max())


@law(
    quick=15,
    thorough=200,
    recipe=recipes(),
    selection=scopes,
    output_dtype=st.sampled_from(["bfloat16", "float32"]),
)
def test_the_output_has_the_asked_dtype_everywhere(
    folder: Path, recipe: Recipe, selection: Selection, output_dtype: str
):
    """In every tensor, the config and the index; and the safetensors library reads each file."""
    models = recipe.write(folder)
    run(folder, selection=selection, output_dtype=output_dtype)
    out = folder / "out"
    total = 0
    weight_map = {}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                tensor, kept = opened.get_tensor(name), models.instruct[name]
                assert tensor.dtype == (getattr(torch, output_dtype) if kept.is_floating_point() else kept.dtype)
                assert kept.is_floating_point() or torch.equal(tensor, kept)
                weight_map[name] = file.name
                total += tensor.nbytes
    assert weight_map.keys() == models.instruct.keys()
    config = json.loads((out / "config.json").read_text())
    stated = [part.get("dtype", part.get("torch_dtype")) for part in (config, config.get("text_config")) if part]
    assert set(stated) <= {output_dtype, None}
    assert stated[0] == output_dtype
    index = out / "model.safetensors.index.json"
    if index.exists():
        read = json.loads(index.read_text())
        assert (read["metadata"]["total_size"], read["weight_map"]) == (total, weight_map)
    else:
        assert set(weight_map.values()) == {"model.safetensors"}


@law(
    quick=15,
    thorough=200,
    recipe=recipes(
        family=st.sampled_from(["dense", "tied, with biases", "gpt2", "vision"]),
        sizes=sizes.map(lambda drawn: replace(drawn, vocabulary=drawn.vocabulary + 16)),
    ),
    more=st.integers(1, 4),
    longer=st.sampled_from(["instruct", "base"]),
)
def test_the_rows_that_both_vocabularies_have_are_grafted(folder: Path, recipe: Recipe, more: int, longer: str):
    """Padding or added tokens: the rest is Instruct's own, and a remark says so."""
    models = recipe.models()
    for name, tensor in models.instruct.items():
        if any(part in name for part in ("embed_tokens", "wte", "lm_head")):
            rows = tensor.shape[0] + more
            if longer == "instruct":
                models.instruct[name] = any_bits((rows, *tensor.shape[1:]), tensor.dtype, recipe.seed)
                models.instruct[name][:-more] = tensor
            else:
                for model in (models.base, models.tuned):
                    model[name] = torch.cat([model[name], torch.ones(more, *tensor.shape[1:]).to(model[name].dtype)])
    recipe.save(folder, models)
    result = run(folder, selection=ALL)
    out = load_model(folder / "out")
    for name, instruct in floats(models.instruct).items():
        rows = min(instruct.shape[0], models.base[name].shape[0]) if instruct.dim() else None
        common = Models(*({name: model[name][:rows] if rows is not None else model[name]} for model in models))
        given = out[name][:rows] if rows is not None else out[name]
        update = update_of(common, name, 1.0)
        apart = (common.instruct[name].float() != common.base[name].float()) & (update != 0)
        assert same_bits(given[apart], plain(common, name, 1.0, instruct.dtype)[apart]), name
        if rows is not None:
            assert same_bits(out[name][rows:], instruct[rows:]), name
    assert any("row" in remark for remark in result.remarks)


# --- overflow ---------------------------------------------------------------------------------------------------------


@law(
    quick=15,
    thorough=300,
    dtype=one_dtype,
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([1.0, -2.5, 1e30]),
)
def test_a_graft_is_written_whole_and_finite_or_refused(folder: Path, dtype: torch.dtype, seed: int, scale: float):
    """Refused exactly where an element that the tuning changed would not be a finite number."""
    recipe = Recipe(dtypes=Dtypes(dtype, dtype, dtype), seed=seed)
    models = recipe.models()
    name = "model.norm.weight"
    for number, model in enumerate((models.base, models.tuned, models.instruct)):
        model[name] = any_bits(model[name].shape, dtype, seed + number)
    recipe.save(folder, models)
    changed = ~same(models.base[name], models.tuned[name]) & (update_of(models, name, scale) != 0)
    finite = bool(plain(models, name, scale, dtype)[changed].isfinite().all())
    finite = finite and all(
        bool(plain(models, other, scale, dtype).isfinite().all()) for other in recipe.kind.shapes if other != name
    )
    if finite:
        run(folder, selection=ALL, scale=scale)
        return
    with pytest.raises(InvalidInput) as refusal:
        run(folder, selection=ALL, scale=scale)
    assert refusal.value.code == "not_finite"
    assert {path.name for path in folder.iterdir()} == {"base", "tuned", "instruct"}


def same(one: Tensor, two: Tensor) -> Tensor:
    """NaN, whatever its payload, is what it was."""
    return (one == two) | (one.isnan() & two.isnan())
