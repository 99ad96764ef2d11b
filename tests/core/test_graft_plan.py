"""What is grafted, copied or refused is decided from headers; these are made by hand, no file is needed."""

import re
from typing import Any

import pytest

from core.checkpoints import AdapterHeader, Checkpoint, TensorInfo
from core.errors import PairRefused
from core.graft_plan import is_linear, linear_module_names, plan_graft, plan_lora, smallest_linear_dimension

CONFIG = {"model_type": "qwen3", "hidden_size": 4, "num_hidden_layers": 1, "tie_word_embeddings": False}
SHAPES = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.self_attn.q_proj.bias": (4,),
    "model.layers.0.mlp.down_proj.weight": (4, 6),
    "model.layers.0.input_layernorm.weight": (4,),
    "lm_head.weight": (8, 4),
}
LINEARS = {name for name in SHAPES if "_proj" in name}
HEAD = "lm_head.weight"


def tensors(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, dtype, shape, "model.safetensors", 0, 0) for name, shape in shapes.items()}


def model(
    shapes: dict[str, tuple[int, ...]] | None = None,
    *,
    changes: dict[str, tuple[int, ...] | None] | None = None,
    dtype: str = "BF16",
    **config: Any,
) -> Checkpoint:
    """The small model, with tensors changed (or dropped: None) and config fields set."""
    merged = {**(shapes or SHAPES), **(changes or {})}
    kept = {name: shape for name, shape in merged.items() if shape is not None}
    return Checkpoint("made", {**CONFIG, **config}, tensors(kept, dtype))


def prefixed(prefix: str) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{name}": shape for name, shape in SHAPES.items()}


def reasons_of(instruct: Checkpoint, base: Checkpoint, scope: str = "linear") -> list[str]:
    with pytest.raises(PairRefused) as refusal:
        plan_graft(instruct, base, scope=scope)
    return refusal.value.reasons


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.mlp.gate_up_proj.weight",
        "transformer.layers.0.attn.Wqkv.weight",
        "transformer.layers.0.attn.out_proj.weight",
        "transformer.h.0.self_attention.query_key_value.weight",
        "transformer.h.0.self_attention.dense.weight",
        "transformer.h.0.attn.c_attn.weight",
        "model.layers.0.mlp.experts.3.up_proj.weight",
        "model.layers.0.block_sparse_moe.experts.3.w1.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.gate_up_proj_bias",
        "language_model.model.layers.0.mlp.down_proj.weight",
    ],
)
def test_linears_are_known_by_their_role(name):
    assert is_linear(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.shared_expert_gate.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.visual.blocks.0.mlp.gate_proj.weight",
        "bert.pooler.dense.weight",
        "q_proj",
    ],
)
def test_everything_else_is_no_linear(name):
    assert not is_linear(name)


def test_scope_linear_takes_the_linears_and_discards_the_rest():
    plan = plan_graft(model(), model(), scope="linear")
    assert plan.grafted == {name: name for name in LINEARS}
    assert plan.discarded.keys() == set(plan.copied) == SHAPES.keys() - LINEARS


def test_scope_all_takes_every_shared_float_tensor():
    integers = TensorInfo("model.ids", "I64", (4,), "model.safetensors", 0, 0)
    instruct, base = model(), model()
    for one in (instruct, base):
        one.tensors["model.ids"] = integers
    plan = plan_graft(instruct, base, scope="all")
    assert plan.grafted.keys() == SHAPES.keys()
    assert plan.copied == ("model.ids",)


def test_a_tied_head_that_only_one_stores_does_no_harm():
    without = model(changes={HEAD: None}, tie_word_embeddings=True)
    stored = model(tie_word_embeddings=True)
    assert HEAD not in plan_graft(without, stored, scope="all").grafted
    plan = plan_graft(stored, without, scope="all")
    assert plan.grafted[HEAD] == "model.embed_tokens.weight"
    assert plan.remarks == ("only one of the two stores the tied head",)


NESTED = {re.sub(r"^model\.", "model.language_model.", name): shape for name, shape in SHAPES.items()}


@pytest.mark.parametrize("shapes", [prefixed("language_model."), NESTED], ids=["outside", "inside"])
def test_a_multimodal_prefix_does_no_harm(shapes):
    instruct = model(shapes, changes={"vision_tower.encoder.q_proj.weight": (9, 9)})
    plan = plan_graft(instruct, model(), scope="linear")
    assert set(plan.grafted.values()) == LINEARS
    assert "vision_tower.encoder.q_proj.weight" in plan.copied
    assert plan.remarks == ("the names differ by the prefix of a multimodal model",)


def test_the_text_part_of_a_multimodal_config_is_compared():
    nested = {"model_type": "gemma3_text", "hidden_size": 4}
    instruct = model(model_type="gemma3", text_config=nested)
    assert plan_graft(instruct, model(model_type="gemma3_text"), scope="linear").grafted


def test_a_float32_base_does_no_harm():
    plan = plan_graft(model(), model(dtype="F32"), scope="linear")
    assert plan.remarks == ("stored mostly in BF16 in instruct and F32 in base",)


def test_another_rope_does_no_harm():
    assert plan_graft(model(rope_theta=5e6), model(rope_theta=1e6), scope="linear").grafted


def test_computed_buffers_are_neither_missed_nor_grafted():
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    plan = plan_graft(model(changes={name: (2,)}, dtype="F32"), model(), scope="all")
    assert name in plan.copied
    assert plan_graft(model(), model(changes={name: (2,)}), scope="all").grafted


REFUSED = {
    "architecture": (
        {"model_type": "llama"},
        {},
        "other architecture: model_type is qwen3 in instruct and llama in base",
    ),
    "layers": ({"num_hidden_layers": 2}, {}, "num_hidden_layers is 1 in instruct and 2 in base"),
    "missing": ({}, {"model.layers.0.self_attn.q_proj.bias": None}, "1 tensors of instruct are missing in base"),
    "extra": ({}, {"model.layers.0.self_attn.k_proj.bias": (4,)}, "1 tensors of base are missing in instruct"),
    "shape": ({}, {"model.layers.0.mlp.down_proj.weight": (4, 7)}, "[4, 6] against [4, 7]"),
    "vocabulary": (
        {},
        {"model.embed_tokens.weight": (9, 4), "lm_head.weight": (9, 4)},
        "other vocabulary: the entries are 8 in instruct and 9 in base",
    ),
    "tied": ({"tie_word_embeddings": True}, {}, "only base ties its head"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, {}, "base is quantised (gptq)"),
}


@pytest.mark.parametrize(("config", "changes", "finding"), REFUSED.values(), ids=REFUSED.keys())
def test_each_mismatch_is_the_only_reason_named(config, changes, finding):
    (reason,) = reasons_of(model(), model(changes=changes, **config))
    assert finding in reason


def test_all_reasons_are_named_at_once():
    changes = dict[str, tuple[int, ...] | None]()
    for _, each, _ in REFUSED.values():
        changes |= each
    config = {key: value for one, _, _ in REFUSED.values() for key, value in one.items()}
    reasons = reasons_of(model(), model(changes=changes, **config))
    assert all(any(finding in reason for reason in reasons) for _, _, finding in REFUSED.values())


def test_a_pair_without_a_known_linear_is_refused():
    shapes = {"model.layers.0.mixer.strange.weight": (4, 4)}
    (reason,) = reasons_of(model(shapes), model(shapes))
    assert "no tensor of instruct is in the scope 'linear'" in reason
    assert plan_graft(model(shapes), model(shapes), scope="all").grafted


def test_eight_bit_weights_are_refused():
    (reason,) = reasons_of(model(), model(dtype="F8_E4M3"))
    assert "q_proj.weight in base (F8_E4M3)" in reason


def test_a_long_list_is_cut_short():
    extra = {f"model.layers.{layer}.mlp.up_proj.weight": (4, 4) for layer in range(50)}
    (reason,) = reasons_of(model(), model(changes=extra))
    assert reason.startswith("50 tensors of base")
    assert reason.endswith("and 47 more")


def test_the_smallest_dimension_bounds_the_rank():
    assert smallest_linear_dimension(model(changes={"model.layers.0.self_attn.k_proj.weight": (2, 4)})) == 2
    assert smallest_linear_dimension(model({"model.layers.0.mlp.experts.gate_up_proj": (2, 16, 12)})) == 12


def test_linear_modules_are_named_by_their_last_part():
    assert linear_module_names(model()) == ["down_proj", "q_proj"]


# --- adapters ---------------------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": True, "bias": "none"}


def adapter(shapes: dict[str, tuple[int, ...]] | None = None, **config: Any) -> AdapterHeader:
    merged = {**factors(Q, (2, 4), (4, 2)), **factors(DOWN, (2, 6), (4, 2))} if shapes is None else shapes
    return AdapterHeader("made", {**LORA, **config}, tensors(merged, "F32"))


def factors(module: str, a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}


def lora_reasons(header: AdapterHeader, instruct: Checkpoint | None = None) -> list[str]:
    with pytest.raises(PairRefused) as refusal:
        plan_lora(instruct or model(), header)
    return refusal.value.reasons


def test_lora_factors_find_their_weights_and_scaling():
    plan = plan_lora(model(), adapter())
    assert plan.keys() == {f"{Q}.weight", f"{DOWN}.weight"}
    assert plan[f"{Q}.weight"].scaling == 2.0


def test_rslora_scales_by_the_root_of_the_rank():
    assert plan_lora(model(), adapter(use_rslora=True))[f"{Q}.weight"].scaling == pytest.approx(4 / 2**0.5)


def test_rank_and_alpha_patterns_hold_for_their_modules():
    shapes = {**factors(Q, (1, 4), (4, 1)), **factors(DOWN, (2, 6), (4, 2))}
    plan = plan_lora(model(), adapter(shapes, rank_pattern={"q_proj": 1}, alpha_pattern={r"layers\.0\..*down_proj": 1}))
    assert (plan[f"{Q}.weight"].scaling, plan[f"{DOWN}.weight"].scaling) == (4.0, 0.5)


def test_an_adapter_of_a_text_model_fits_its_multimodal_sibling():
    plan = plan_lora(model(prefixed("language_model.")), adapter())
    assert f"language_model.{Q}.weight" in plan


VARIANTS = {
    "IA3": ({"peft_type": "IA3"}, "type IA3"),
    "DoRA": ({"use_dora": True}, "DoRA"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "'olora'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "biases": ({"bias": "all"}, "'all'"),
    "token embeddings": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "aLoRA"),
    "experts": ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    "rank": ({"r": 3}, "do not fit rank 3"),
    "no rank": ({"r": None}, "the rank None"),
}


@pytest.mark.parametrize(("config", "finding"), VARIANTS.values(), ids=VARIANTS.keys())
def test_an_adapter_whose_delta_is_another_is_refused_by_name(config, finding):
    assert any(finding in reason for reason in lora_reasons(adapter(**config)))


def test_an_adapter_that_does_not_fit_is_refused_with_every_reason():
    shapes = {
        **factors(Q, (2, 5), (4, 2)),
        **factors("model.layers.7.mlp.up_proj", (2, 4), (4, 2)),
        f"base_model.model.{DOWN}.lora_A.weight": (2, 6),
        "base_model.model.lm_head.weight": (8, 4),
    }
    reasons = lora_reasons(adapter(shapes), model(quantization_config={"quant_method": "awq"}))
    for finding in ("awq", "lm_head.weight", "do not fit rank 2", "layers.7.mlp.up_proj", f"only one factor of {DOWN}"):
        assert any(finding in reason for reason in reasons)


def test_an_adapter_without_factors_is_refused():
    assert lora_reasons(adapter({})) == ["the adapter holds no LoRA factors"]
