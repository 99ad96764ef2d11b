"""Adapters against PEFT itself: what it trains, saved by it, merged by it into a float32 copy and grafted by us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from core.errors import PairRefused
from core.graft_plan import Selection
from tests.worker.weights.families import Recipe, Sizes
from tests.worker.weights.law import law, working_in
from tests.worker.weights.made_checkpoints import Tensors, load_model, same_bits, same_models, save_model, step
from worker.weights import FullDelta, GraftResult, LoraDelta, graft, writing

pytestmark = [
    #: PEFT 0.21 asks transformers 5 by a name that is going away.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    #: It warns of what a tied head does to those who load the adapter elsewhere.
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.*tied:UserWarning"),
]

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TINY_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}


def tied() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**TINY, tie_word_embeddings=True))


def untied() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**TINY, tie_word_embeddings=False))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(**TINY_GPT2))


class Case(NamedTuple):
    make: Any
    options: dict[str, Any]
    #: Whether ours and PEFT's are the same float32 operations: no DoRA.
    plain: bool = True
    #: Whether the adapter's file holds a copy of the embedding, as PEFT saves it by default where it is targeted.
    with_embedding: bool = False


LINEARS = {"target_modules": "all-linear"}
CONV = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
DORA = {"use_dora": True}

CASES = {
    "plain": Case(tied, LINEARS),
    "rslora": Case(tied, {**LINEARS, "use_rslora": True}),
    "rank and alpha patterns": Case(
        tied, {**LINEARS, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*down_proj": 3}}
    ),
    "patterns with rslora": Case(
        untied,
        {**LINEARS, "use_rslora": True, "rank_pattern": {r"^model\.layers\.0\..*": 7}, "alpha_pattern": {"o_proj": 5}},
    ),
    "attention only": Case(untied, {"target_modules": ["q_proj", "v_proj"]}),
    "some layers": Case(untied, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "one rank": Case(tied, {**LINEARS, "r": 1, "lora_alpha": 1}),
    "rank above the width": Case(tied, {**LINEARS, "r": 48, "lora_alpha": 7}),
    "embedding": Case(untied, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, saved too": Case(untied, {"target_modules": ["embed_tokens", "q_proj"]}, with_embedding=True),
    "tied embedding": Case(tied, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": Case(untied, {"target_modules": ["lm_head", "o_proj"]}),
    "head, saved too": Case(untied, {"target_modules": ["lm_head", "o_proj"]}, with_embedding=True),
    "embedding and head": Case(untied, {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True}),
    "Conv1D": Case(gpt2, CONV),
    "Conv1D and embedding": Case(gpt2, {**CONV, "target_modules": ["c_attn", "wte", "wpe"]}),
    "DoRA": Case(tied, {**LINEARS, **DORA}, plain=False),
    "DoRA with patterns and rslora": Case(
        untied, {**LINEARS, **DORA, "use_rslora": True, "rank_pattern": {"v_proj": 3}}, plain=False
    ),
    "DoRA on Conv1D": Case(gpt2, {**CONV, **DORA}, plain=False),
    "DoRA on embedding": Case(untied, {"target_modules": ["embed_tokens", "k_proj"], **DORA}, plain=False),
    "DoRA on head": Case(untied, {"target_modules": ["lm_head"], **DORA}, plain=False),
    "norms replaced": Case(tied, {**LINEARS, "modules_to_save": ["norm", "input_layernorm"]}),
    "embedding and head replaced": Case(untied, {**LINEARS, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied embedding and head replaced": Case(
        tied, {**LINEARS, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "DoRA and a replaced head": Case(untied, {**LINEARS, **DORA, "modules_to_save": ["lm_head"]}, plain=False),
}
#: Not a case: PEFT's merge adds the change to the one tensor twice, once for each of its names.
BOTH_ENDS = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def save_base(folder: Path, make: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # no norm is all ones, no bias zero
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder


def save_adapter(folder: Path, case: Case, base: Path) -> Path:
    """An adapter on `base` after some training: every part of it has moved."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(7)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8} | case.options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, save_embedding_layers=case.with_embedding)
    return folder


def merged_by_peft(folder: Path, adapter: Path) -> Tensors:
    """Into a float32 copy of the model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    merged: Tensors = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    return merged


def run(folder: Path, adapter: Path, *, instruct: str = "base", scope: str = "all", **options: Any) -> GraftResult:
    delta = LoraDelta(adapter, base=folder / "base")
    fixed = {"instruct": folder / instruct, "delta": delta, "out": folder / "out", "selection": Selection(scope=scope)}
    return graft(**fixed | options)


def steps_apart(one: Tensor, two: Tensor, *sizes: Tensor) -> float:
    """In float32 steps of the largest of the values at each place."""
    largest = torch.stack([each.double().abs() for each in (one, two, *sizes)]).amax(0)
    return float(((one.double() - two.double()).abs() / step(largest)).max())


@cases
def test_a_graft_onto_base_equals_pefts_merge(tmp_path, case):
    """A plain delta: the same operations, so that at most the order in which a product is summed may move the sum to
    the neighbouring number (measured: no bit differs). Others within 8 steps (measured: 6): PEFT's magnitude is divided
    by a norm of up to 128 squares that it sums in another order, and we subtract base and add it again."""
    base = save_base(tmp_path / "base", case.make)
    adapter = save_adapter(tmp_path / "adapter", case, base)
    run(tmp_path, adapter, output_dtype="float32")
    merged, out = merged_by_peft(base, adapter), load_model(tmp_path / "out")
    original = load_model(base)
    worst = {name: steps_apart(tensor, merged[name], original[name]) for name, tensor in out.items()}
    assert max(worst.values()) <= (1 if case.plain else 8), worst
    changed = {name for name in out if not same_bits(out[name], original[name])}
    assert changed == {name for name in out if not same_bits(merged[name], original[name])}


@cases
def test_a_graft_onto_another_model_adds_what_the_merge_changed(tmp_path, case):
    """`instruct + (merged - base)` within 10 steps of the largest: those of above, the difference and the sum."""
    base = save_base(tmp_path / "base", case.make)
    instruct = save_base(tmp_path / "instruct", case.make, seed=1)
    adapter = save_adapter(tmp_path / "adapter", case, base)
    run(tmp_path, adapter, instruct="instruct", output_dtype="float32")
    merged, out = merged_by_peft(base, adapter), load_model(tmp_path / "out")
    before, start = load_model(instruct), load_model(base)
    for name, tensor in out.items():
        exact = before[name].double() + merged[name].double() - start[name].double()
        assert steps_apart(tensor, exact, before[name], merged[name], start[name]) <= 10, name
        assert same_bits(merged[name], start[name]) == same_bits(tensor, before[name]), name


def test_a_bfloat16_graft_is_the_float32_merge_rounded_once(tmp_path):
    base = save_base(tmp_path / "base", tied)
    instruct = save_base(tmp_path / "instruct", tied, seed=1, dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", CASES["plain"], base)
    result = graft(instruct=instruct, delta=LoraDelta(adapter), out=tmp_path / "out")
    merged, out = merged_by_peft(instruct, adapter), load_model(tmp_path / "out")
    assert all(same_bits(tensor, merged[name].to(torch.bfloat16)) for name, tensor in out.items())
    assert (result.grafted, result.discarded_share) == (14, 0)


def test_what_the_scope_linear_discards_of_an_adapter_is_said_and_measured(tmp_path):
    case = Case(untied, {**LINEARS, "modules_to_save": ["lm_head", "norm"]})
    base = save_base(tmp_path / "base", case.make)
    adapter = save_adapter(tmp_path / "adapter", case, base)
    result = run(tmp_path, adapter, scope="linear", output_dtype="float32")
    merged, out, start = merged_by_peft(base, adapter), load_model(tmp_path / "out"), load_model(base)
    squares = {name: float((merged[name].double() - start[name].double()).square().sum()) for name in out}
    outside = sum(square for name, square in squares.items() if not name.endswith("_proj.weight"))
    assert all(same_bits(out[name], start[name]) for name in ("lm_head.weight", "model.norm.weight"))
    assert not same_bits(out["model.layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"])
    assert result.discarded_share == pytest.approx((outside / sum(squares.values())) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("name", ["DoRA", "norms replaced"])
def test_a_delta_that_is_relative_to_base_needs_base(tmp_path, name):
    base = save_base(tmp_path / "base", CASES[name].make)
    adapter = save_adapter(tmp_path / "adapter", CASES[name], base)
    with pytest.raises(PairRefused, match="base"):
        graft(instruct=base, delta=LoraDelta(adapter), out=tmp_path / "out", selection=Selection(scope="all"))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize("options", [LINEARS, BOTH_ENDS], ids=["linears", "both ends of a tied pair"])
def test_transformers_loads_the_result_and_it_answers_like_the_live_adapter(tmp_path, options):
    base = save_base(tmp_path / "base", tied)
    adapter = save_adapter(tmp_path / "adapter", Case(tied, options), base)
    run(tmp_path, adapter)
    ids = torch.arange(6).view(1, 6)
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    grafted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(grafted(ids).logits, live(ids).logits, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_two_changes_that_peft_was_told_to_tie_and_could_not_are_refused(tmp_path):
    """It warns of a base that does not tie them, and trains both."""
    base = save_base(tmp_path / "base", untied)
    adapter = save_adapter(tmp_path / "adapter", Case(untied, BOTH_ENDS), base)
    instruct = save_base(tmp_path / "instruct", tied, seed=1)
    fixed = {"instruct": instruct, "delta": LoraDelta(adapter), "out": tmp_path / "out"}
    with pytest.raises(PairRefused) as refused:
        graft(**fixed, selection=Selection("all"))
    (reason,) = refused.value.reasons
    assert reason.startswith(
        "the adapter's two changes of model.embed_tokens.weight differ, and instruct ties the ends"
    )
    assert graft(**fixed).grafted == 2


# --- from the adapter, and from the merged model ----------------------------------------------------------------------


@law(
    quick=15,
    thorough=300,
    shape=st.tuples(*[st.sampled_from([1, 2, 3, 7, 33, 129])] * 2),
    rank=st.sampled_from([1, 2, 5, 16]),
    alpha=st.sampled_from([1, 8, 0.3]),
    scale=st.sampled_from([1.0, -1.0, 0.5, 2.0]),
    seed=st.integers(0, 2**32),
)
def test_grafting_from_an_adapter_equals_grafting_from_its_merged_model(
    folder: Path, shape: tuple[int, int], rank: int, alpha: float, scale: float, seed: int
):
    """In float32. What the merged model lost: half a step of it, and half of its difference from base, both times
    the scale; then each sum is rounded, and the products are summed in another order: `rank` half steps of their
    absolute sum."""
    name = "model.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(seed)
    instruct, base = (torch.randn(shape, generator=generator) for _ in range(2))
    a, b = torch.randn(rank, shape[1], generator=generator), 0.1 * torch.randn(shape[0], rank, generator=generator)
    merged = base + (b @ a) * (alpha / rank)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"]}
    save_adapter_files(folder / "adapter", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, config)
    for each, tensor in {"instruct": instruct, "base": base, "merged": merged}.items():
        save_model(folder / each, {f"{name}.weight": tensor}, hidden_size=None)
    fixed = {"instruct": folder / "instruct", "scale": scale}
    graft(**fixed, delta=LoraDelta(folder / "adapter"), out=folder / "from adapter")
    graft(**fixed, delta=FullDelta(folder / "base", folder / "merged"), out=folder / "from merged")
    one, two = (load_model(folder / f"from {each}")[f"{name}.weight"].double() for each in ("adapter", "merged"))
    unit = 2.0**-24
    delta = merged.double() - base.double()
    products = (b.double().abs() @ a.double().abs()) * (alpha / rank)
    lost = abs(scale) * (merged.double().abs() + 2 * delta.abs() + (rank + 2) * products)
    bound = unit * (lost + 2 * abs(scale) * delta.abs() + one.abs() + two.abs()) * (1 + 2.0**-20)
    assert bool(((one - two).abs() <= bound).all())


def save_adapter_files(folder: Path, factors: Tensors, config: dict[str, Any]) -> None:
    save_model(folder, {f"base_model.model.{name}": tensor for name, tensor in factors.items()})
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["plain", "DoRA", "DoRA on Conv1D", "embedding and head", "norms replaced"])
def test_neither_shards_nor_blocks_nor_threads_change_a_bit(tmp_path, name):
    base = save_base(tmp_path / "base", CASES[name].make)
    adapter = save_adapter(tmp_path / "adapter", CASES[name], base)
    instruct = save_base(tmp_path / "instruct", CASES[name].make, seed=1)
    config = json.loads((instruct / "config.json").read_text())
    save_model(tmp_path / "single", load_model(instruct), misaligned=True, **{"hidden_size": None} | config)
    run(tmp_path, adapter, instruct="instruct", threads=1)
    with working_in(37, writing.ALIGNMENT):
        run(tmp_path, adapter, instruct="single", threads=4, out=tmp_path / "other")
    assert same_models(load_model(tmp_path / "other"), load_model(tmp_path / "out"))


# --- onto models that are not quite the adapter's ---------------------------------------------------------------------


def test_an_adapter_of_a_text_model_fits_a_multimodal_one(tmp_path):
    recipe = Recipe("vision", Sizes(hidden=16, inner=24, kv=8))
    models = recipe.write(tmp_path)
    module = "model.layers.0.self_attn.k_proj"
    a, b = torch.randn(4, 16), torch.randn(8, 4)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["k_proj"]}
    save_adapter_files(tmp_path / "adapter", {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, config)
    graft(instruct=tmp_path / "instruct", delta=LoraDelta(tmp_path / "adapter"), out=tmp_path / "out")
    out, changed = load_model(tmp_path / "out"), f"language_model.{module}.weight"
    exact = models.instruct[changed].float() + (b @ a) * 2
    assert same_bits(out[changed], exact.to(torch.bfloat16))
    assert all(same_bits(out[name], tensor) for name, tensor in models.instruct.items() if name != changed)


def test_an_adapted_embedding_is_grafted_on_the_rows_that_both_have(tmp_path):
    case = CASES["embedding and head"]
    base = save_base(tmp_path / "base", case.make)
    adapter = save_adapter(tmp_path / "adapter", case, base)
    longer = Qwen3ForCausalLM(Qwen3Config(**TINY | {"vocab_size": 72}, tie_word_embeddings=False))
    longer.save_pretrained(tmp_path / "instruct")
    result = run(tmp_path, adapter, instruct="instruct", output_dtype="float32")
    merged, out = merged_by_peft(base, adapter), load_model(tmp_path / "out")
    start, before = load_model(base), load_model(tmp_path / "instruct")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        exact = before[name][:64].double() + merged[name].double() - start[name].double()
        assert steps_apart(out[name][:64], exact, before[name][:64], merged[name], start[name]) <= 4
        assert same_bits(out[name][64:], before[name][64:])
    assert any("row" in remark for remark in result.remarks)
