"""What is grafted, copied or refused is decided from headers; these are made by hand, no file is needed."""

import re
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.checkpoints import Checkpoint, TensorInfo
from core.errors import PairRefused
from core.graft_plan import (
    TIED_BY_DEFAULT,
    GraftPlan,
    Selection,
    is_linear,
    plan_graft,
    plan_saved,
    smallest_linear_dimension,
    vocabulary_size,
)

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


def test_a_saved_delta_lacks_integers_and_is_not_blamed_for_it():
    instruct = model()
    ids = TensorInfo("model.position_ids", "I64", (4,), "model.safetensors", 0, 0)
    with_ids = Checkpoint("made", instruct.config, instruct.tensors | {ids.name: ids})
    assert plan_saved(with_ids, model(), selection=Selection("all")).grafted.keys() == SHAPES.keys()


def reasons_of(instruct: Checkpoint, base: Checkpoint, selection: Selection = Selection()) -> list[str]:
    with pytest.raises(PairRefused) as refusal:
        plan_graft(instruct, base, selection=selection)
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
        "model.layers.0.mlp.shared_experts.down_proj.weight",
        "model.layers.0.block_sparse_moe.input_linear.weight",
        "model.layers.0.linear_attn.in_proj_qkvz.weight",
        "model.layers.0.linear_attn.out_proj.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "transformer.h.0.mlp.fc_in.weight",
        "transformer.blocks.0.ffn.experts.mlp.v1",
        "model.layers.0.mlp.experts.gate_up_proj_bias",
        "language_model.model.layers.0.mlp.down_proj.weight",
        "thinker.model.layers.0.mlp.down_proj.weight",
        "base_model.model.model.layers.0.mlp.down_proj.weight",
        "model.layers.0.self_attention.kv_proj.weight",
        "model.layers.0.self_attn.q_proj.linear.weight",
        "model.layers.0.self_attn.indexer.wq_b.weight",
        "model.layers.0.attn.Wo.weight",
        "model.layers.0.mlp.Wi.weight",
        "model.layers.0.mamba.in_proj.weight",
        "model.layers.0.mamba.out_proj.weight",
        "backbone.layers.0.mixer.in_proj.weight",
        "model.layers.0.conv.out_proj.weight",
        "model.layers.0.linear_attn.g_proj.weight",
        "model.layers.0.temporal_block.linear_x.bias",
        "model.layers.0.mlp.shared_experts.gate_proj",
        "decoder.block.0.layer.0.SelfAttention.q.weight",
        "rwkv.blocks.0.attention.receptance.weight",
        "model.H_module.layers.0.mlp.up_proj.weight",
        "model.encoder.layers.0.fc1.weight",
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
        "model.layers.0.block_sparse_moe.router.layer.weight",
        "model.layers.0.mlp.router.weight",
        "model.layers.0.feed_forward.router.weight",
        "model.layers.0.mlp.gate.e_score_correction_bias",
        "model.layers.0.mamba.dt_proj.weight",
        "model.layers.0.mamba.conv1d.weight",
        "model.layers.0.mamba.A_log",
        "model.layers.0.conv.conv.weight",
        "model.layers.0.linear_attn.in_proj_ba.weight",
        "model.layers.0.self_attn.g_proj.weight",
        "model.layers.0.gate.router_mlp.out_proj.weight",
        "model.layers.0.output.dense.weight",
        "rwkv.blocks.0.attention.time_mix_key",
        "model.encoder.layers.0.ff1.up_proj.weight",
        "model.resampler_model.spatial_linear.fc1.weight",
        "model.embed_tokens_extend.image_embed.img_processor.encoder.layers.0.self_attn.q_proj.weight",
        "model.connector.modality_projection.proj.weight",
        "audio_tower.layers.0.self_attn.q_proj.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.visual.blocks.0.mlp.gate_proj.weight",
        "bert.pooler.dense.weight",
        "q_proj",
    ],
)
def test_everything_else_is_no_linear(name):
    assert not is_linear(name)


@given(st.text("abcdefgh_", min_size=2))
def test_a_layer_of_a_part_that_nobody_knows_is_not_the_language_models(part):
    """Each new family brings new names for what it sees and hears with."""
    assert not is_linear(f"model.{part}.layers.0.self_attn.q_proj.weight")
    assert not is_linear(f"{part}.encoder.layers.0.mlp.fc1.weight")


def test_scope_linear_takes_the_linears_and_discards_the_rest():
    plan = plan_graft(model(), model(), selection=Selection("linear"))
    assert plan.grafted == {name: name for name in LINEARS}
    assert plan.discarded.keys() == set(plan.copied) == SHAPES.keys() - LINEARS


def test_scope_all_takes_every_shared_float_tensor():
    integers = TensorInfo("model.ids", "I64", (4,), "model.safetensors", 0, 0)
    instruct, base = model(), model()
    for one in (instruct, base):
        one.tensors["model.ids"] = integers
    plan = plan_graft(instruct, base, selection=Selection("all"))
    assert plan.grafted.keys() == SHAPES.keys()
    assert plan.copied == ("model.ids",)


def test_a_tied_head_that_only_one_stores_does_no_harm():
    without = model(changes={HEAD: None}, tie_word_embeddings=True)
    stored = model(tie_word_embeddings=True)
    assert HEAD not in plan_graft(without, stored, selection=Selection("all")).grafted
    plan = plan_graft(stored, without, selection=Selection("all"))
    assert plan.grafted[HEAD] == "model.embed_tokens.weight"
    assert plan.remarks == ("only one of the two stores the tied head",)


def renamed(old: str, new: str) -> dict[str, tuple[int, ...]]:
    return {re.sub(old, new, name): shape for name, shape in SHAPES.items()}


#: Where checkpoints keep their language model. Gemma 3, Mistral 3 and LLaVA files have the first, Qwen 3 VL the second,
#: SmolVLM the third; Qwen2-VL files are like text-only ones; a model that was saved without its head has bare names.
LAYOUTS = {
    "language_model.model": prefixed("language_model."),
    "model.language_model": renamed(r"^model\.", "model.language_model."),
    "model.text_model": renamed(r"^model\.", "model.text_model."),
    "model": SHAPES,
    "bare": renamed(r"^model\.", ""),
}


@pytest.mark.parametrize("theirs", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("ours", LAYOUTS.values(), ids=LAYOUTS)
def test_where_the_language_model_is_kept_does_no_harm(ours, theirs):
    vision = {"vision_tower.encoder.q_proj.weight": (9, 9)}
    instruct = model(ours, changes=vision)
    plan = plan_graft(instruct, model(theirs), selection=Selection("all"))
    assert list(plan.grafted) == list(ours)
    assert list(plan.grafted.values()) == list(theirs)
    assert "vision_tower.encoder.q_proj.weight" in plan.copied
    assert plan_graft(model(theirs), instruct).grafted.keys() == {one for one in theirs if "_proj" in one}
    assert any("differ by a prefix" in remark for remark in plan.remarks) == (ours != theirs)


def test_a_name_that_could_be_either_of_two_is_not_guessed():
    both = model(changes=prefixed("language_model."))
    (reason,) = reasons_of(model(renamed(r"^model\.", "transformer.")), both, Selection("all"))[:1]
    assert reason.startswith("5 tensors of instruct are missing in base")


@pytest.mark.parametrize("stored", [True, False])
def test_where_the_two_parts_of_a_config_disagree_a_stored_head_is_no_embedding(stored):
    text = {"model_type": "mistral", "hidden_size": 4, "tie_word_embeddings": False}
    changes = None if stored else {HEAD: None}
    unsure = model(changes=changes, model_type="mistral3", tie_word_embeddings=True, text_config=text)
    sure = model(changes=changes, model_type="mistral", tie_word_embeddings=not stored)
    assert plan_graft(unsure, sure).grafted


def silent(model_type: str, changes: dict[str, tuple[int, ...] | None] | None = None, **config: Any) -> Checkpoint:
    """A model whose config does not say whether it ties."""
    made = model(changes=changes, model_type=model_type, **config)
    del made.config["tie_word_embeddings"]
    return made


@pytest.mark.parametrize("family", sorted(TIED_BY_DEFAULT))
def test_a_family_that_ties_by_default_need_not_say_so(family):
    without, stored = silent(family, {HEAD: None}), silent(family)
    assert plan_graft(stored, without, selection=Selection("all")).grafted[HEAD] == "model.embed_tokens.weight"
    assert plan_graft(without, stored, selection=Selection("all")).grafted


def test_a_text_part_that_is_silent_ties_by_its_own_family():
    text = {"model_type": "gemma3_text", "hidden_size": 4}
    assert plan_graft(silent("gemma3", text_config=text), silent("gemma3_text", {HEAD: None})).grafted


def test_a_family_that_ties_by_default_may_say_otherwise():
    (reason,) = reasons_of(model(model_type="gemma"), silent("gemma"))
    assert reason.startswith("only base ties its head to its embedding; take two models of one release, or save base")


@pytest.mark.parametrize("family", sorted(TIED_BY_DEFAULT))
def test_the_families_that_tie_by_default_are_those_of_transformers(family):
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    assert auto.CONFIG_MAPPING[family]().get_text_config().tie_word_embeddings is True


def test_a_head_that_was_not_saved_is_missed_with_the_remedy():
    (reason,) = reasons_of(model(), model(changes={HEAD: None}))
    assert reason == (
        f"1 tensors of instruct are missing in base: {HEAD}; base stores no such head: save it with its head, as "
        "AutoModelForCausalLM does"
    )


def test_a_tied_pair_may_store_head_or_embedding():
    head_only = model(changes={"model.embed_tokens.weight": None}, tie_word_embeddings=True)
    usual = model(changes={HEAD: None}, tie_word_embeddings=True)
    assert plan_graft(head_only, usual, selection=Selection("all")).grafted[HEAD] == "model.embed_tokens.weight"


def test_the_text_part_of_a_multimodal_config_is_compared():
    nested = {"model_type": "gemma3_text", "hidden_size": 4}
    instruct = model(model_type="gemma3", text_config=nested)
    assert plan_graft(instruct, model(model_type="gemma3_text"), selection=Selection("linear")).grafted


def test_a_float32_base_does_no_harm():
    plan = plan_graft(model(), model(dtype="F32"), selection=Selection("linear"))
    assert plan.remarks == ("stored mostly in BF16 in instruct and F32 in base",)


def test_another_rope_does_no_harm():
    assert plan_graft(model(rope_theta=5e6), model(rope_theta=1e6), selection=Selection("linear")).grafted


#: Of Llama, GPT-2, Pythia and GPT-Neo.
BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": (2,),
    "transformer.h.0.attn.bias": (1, 1, 8, 8),
    "gpt_neox.layers.0.attention.bias": (1, 1, 8, 8),
    "gpt_neox.layers.0.attention.masked_bias": (),
    "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (2,),
    "transformer.h.0.attn.attention.bias": (1, 1, 8, 8),
    "transformer.h.0.attn.attention.masked_bias": (),
}


@pytest.mark.parametrize(("name", "shape"), BUFFERS.items())
def test_computed_buffers_are_neither_missed_nor_grafted(name, shape):
    both = model(changes={name: shape}, dtype="F32")
    plan = plan_graft(both, model(), selection=Selection("all"))
    assert name in plan.copied
    assert name in plan_graft(both, both, selection=Selection("all")).copied
    assert plan_graft(model(), model(changes={name: shape}), selection=Selection("all")).grafted


def test_a_bias_with_the_name_of_a_mask_is_a_bias():
    name = "model.layers.0.attention.bias"
    both = model(changes={name: (4,)})
    assert name in plan_graft(both, both, selection=Selection("all")).grafted
    assert "missing in base" in reasons_of(both, model())[0]


VISION = "vision_tower.encoder.q_proj.weight"


def test_a_part_outside_the_language_model_must_fit_where_it_is_grafted():
    ours, theirs = model(changes={VISION: (9, 9)}), model(changes={VISION: (6, 6)})
    assert reasons_of(ours, theirs, Selection("all")) == [f"other shapes: {VISION} [9, 9] against [6, 6]"]
    for selection in (Selection("linear"), Selection("all", exclude=("vision_tower.*",))):
        plan = plan_graft(ours, theirs, selection=selection)
        (remark,) = plan.remarks
        assert VISION in plan.copied
        assert remark.startswith("1 tensors outside the language model have other shapes, and stay those of instruct: ")
        assert remark.endswith(f"{VISION} [9, 9] against [6, 6]")


REFUSED = {
    "architecture": (
        {"model_type": "llama"},
        {},
        "other architecture: model_type is qwen3 in instruct and llama in base",
    ),
    "layers": ({"num_hidden_layers": 2}, {}, "num_hidden_layers is 1 in instruct and 2 in base"),
    "activation": ({"hidden_activation": "relu"}, {}, "hidden_activation is silu in instruct and relu in base"),
    "GPT-2's activation": ({"activation_function": "relu"}, {}, "activation_function is silu in instruct and relu"),
    "experts at work": ({"num_experts_per_tok": 4}, {}, "num_experts_per_tok is 2 in instruct and 4 in base"),
    "missing": ({}, {"model.layers.0.self_attn.q_proj.bias": None}, "1 tensors of instruct are missing in base"),
    "extra": ({}, {"model.layers.0.self_attn.k_proj.bias": (4,)}, "1 tensors of base are missing in instruct"),
    "shape": ({}, {"model.layers.0.mlp.down_proj.weight": (4, 7)}, "[4, 6] against [4, 7]"),
    "vocabulary": (
        {},
        {"model.embed_tokens.weight": (11, 4), "lm_head.weight": (11, 4)},
        "other vocabulary: the entries are 8 in instruct and 11 in base",
    ),
    "tied": ({"tie_word_embeddings": True}, {}, "only base ties its head"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, {}, "base is quantised (gptq)"),
}
STATED = {"hidden_activation": "silu", "activation_function": "silu", "num_experts_per_tok": 2}


@pytest.mark.parametrize(("config", "changes", "finding"), REFUSED.values(), ids=REFUSED.keys())
def test_each_mismatch_is_the_only_reason_named(config, changes, finding):
    (reason,) = reasons_of(model(**STATED), model(changes=changes, **STATED | config))
    assert finding in reason


def test_all_reasons_are_named_at_once():
    changes = dict[str, tuple[int, ...] | None]()
    for _, each, _ in REFUSED.values():
        changes |= each
    config = {key: value for one, _, _ in REFUSED.values() for key, value in one.items()}
    reasons = reasons_of(model(**STATED), model(changes=changes, **config))
    assert all(any(finding in reason for reason in reasons) for _, _, finding in REFUSED.values())


def test_a_pair_without_a_known_linear_is_refused():
    shapes = {"model.layers.0.mixer.strange.weight": (4, 4)}
    (reason,) = reasons_of(model(shapes), model(shapes))
    assert "no tensor of instruct is in the scope 'linear'" in reason
    assert plan_graft(model(shapes), model(shapes), selection=Selection("all")).grafted


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


# --- the selection ----------------------------------------------------------------------------------------------------

Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("selection", "grafted"),
    [
        (Selection(include=("*.mlp.*",)), {DOWN}),
        (Selection(exclude=("*.mlp.*", "*.bias")), {Q}),
        (Selection(include=("*_proj.weight",), exclude=("*q_proj*",)), {DOWN}),
        (Selection("all", include=("*norm*", HEAD)), {"model.layers.0.input_layernorm.weight", HEAD}),
    ],
)
def test_patterns_choose_among_the_tensors_of_the_scope(selection, grafted):
    plan = plan_graft(model(), model(), selection=selection)
    assert plan.grafted.keys() == grafted
    assert plan.discarded.keys() == SHAPES.keys() - grafted
    assert plan.selection is selection


def test_patterns_heed_case():
    assert Selection(include=("*Q_PROJ*",)).takes(model().tensors[Q]) is False


def test_a_pattern_without_any_tensor_is_refused_with_what_it_may_have_meant():
    reasons = reasons_of(model(), model(), Selection(include=("*.q_prj.*",), exclude=("q_proj",)))
    assert "the include pattern '*.q_prj.*' matches no tensor of instruct; did you mean '*.q_proj.*'" in reasons[0]
    assert "the exclude pattern 'q_proj' matches no tensor of instruct; did you mean '*.q_proj.*'" in reasons[1]


def test_a_selection_that_leaves_nothing_is_refused():
    selection = Selection(include=("*norm*",), exclude=("*_proj*",))
    assert reasons_of(model(), model(), selection) == [
        "no tensor of instruct is in the scope 'linear' with include *norm* and exclude *_proj* and in base too"
    ]


def test_tensors_that_float32_cannot_hold_are_not_even_discarded():
    instruct, base = model(), model()
    for one in (instruct, base):
        one.tensors["model.extra"] = TensorInfo("model.extra", "F64", (4,), "model.safetensors", 0, 0)
    assert "model.extra" in plan_graft(instruct, base).copied
    assert "model.extra" not in plan_graft(instruct, base).discarded
    assert "model.extra in instruct (F64)" in reasons_of(instruct, base, Selection("all"))[0]


names = st.text("abc.01_", min_size=1, max_size=8)
patterns = st.lists(st.one_of(names, names.map(lambda name: f"*{name}*")), max_size=3).map(tuple)


@given(names=st.sets(names, min_size=1, max_size=12), include=patterns, exclude=patterns)
def test_every_tensor_has_one_fate_and_exclude_wins(names, include, exclude):
    both = model({**SHAPES, **dict.fromkeys(names, (4,))})
    matching = tuple(one for one in include if any(fnmatchcase(name, one) for name in both.tensors))
    excluding = tuple(one for one in exclude if any(fnmatchcase(name, one) for name in both.tensors))
    try:
        plan = plan_graft(both, both, selection=Selection("all", matching, excluding))
    except PairRefused:
        return
    assert plan.grafted.keys() | set(plan.copied) == both.tensors.keys()
    assert not plan.grafted.keys() & set(plan.copied)
    assert plan.discarded.keys() == set(plan.copied)
    for name in plan.grafted:
        assert not any(fnmatchcase(name, one) for one in excluding)
        assert not matching or any(fnmatchcase(name, one) for one in matching)


# --- vocabularies -----------------------------------------------------------------------------------------------------

EMBEDDING = "model.embed_tokens.weight"


def padded(rows: int, **config: Any) -> Checkpoint:
    return model(changes={EMBEDDING: (rows, 4), HEAD: (rows, 4)}, **config)


@pytest.mark.parametrize(("ours", "theirs"), [(10, 8), (8, 10)])
def test_rows_that_only_one_vocabulary_has_stay_those_of_instruct(ours, theirs):
    plan = plan_graft(padded(ours), padded(theirs), selection=Selection("all"))
    assert plan.common_rows == {EMBEDDING: 8, HEAD: 8}
    (remark,) = plan.remarks
    assert remark.startswith(f"the rows of the vocabulary are {ours} in instruct and {theirs} in base: ")
    assert remark.endswith("the first 8 are grafted, the others stay those of instruct")


def test_scope_linear_says_that_all_rows_stay():
    plan = plan_graft(padded(10), padded(8))
    assert plan.common_rows == {EMBEDDING: 8, HEAD: 8}
    assert plan.remarks == ("the rows of the vocabulary are 10 in instruct and 8 in base: all stay those of instruct",)


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [(151936, 151646, True), (32000, 33024, True), (32000, 33025, False), (1280, 1024, True), (1281, 1024, False)],
)
def test_a_vocabulary_may_differ_by_padding_only(ours, theirs, same):
    if same:
        assert plan_graft(padded(ours), padded(theirs)).common_rows[HEAD] == min(ours, theirs)
        return
    (reason,) = reasons_of(padded(ours), padded(theirs))
    assert reason == f"other vocabulary: the entries are {ours} in instruct and {theirs} in base"


def test_an_embedding_of_another_width_is_another_shape():
    (reason,) = reasons_of(model(), model(changes={EMBEDDING: (9, 5)}))
    assert reason == f"other shapes: {EMBEDDING} [8, 4] against [9, 5]"


def test_a_head_may_be_padded_alone():
    assert plan_graft(model(), model(changes={HEAD: (9, 4)})).common_rows == {HEAD: 8}


def test_a_tied_head_shares_the_rows_of_the_embedding():
    with_head, without = padded(10, tie_word_embeddings=True), model(changes={HEAD: None}, tie_word_embeddings=True)
    assert plan_graft(with_head, without).common_rows == {EMBEDDING: 8, HEAD: 8}


@given(ours=st.integers(1, 6000), theirs=st.integers(1, 6000))
def test_which_of_the_two_has_more_rows_changes_no_verdict(ours, theirs):
    plans: list[GraftPlan | None] = []
    for one, two in ((ours, theirs), (theirs, ours)):
        try:
            plans.append(plan_graft(padded(one), padded(two)))
        except PairRefused:
            plans.append(None)
    assert (plans[0] is None) == (plans[1] is None)
    if plans[0] is not None and plans[1] is not None:
        assert plans[0].common_rows == plans[1].common_rows


def test_a_scalar_in_place_of_an_embedding_is_another_shape():
    (reason, *_) = reasons_of(model(), model(changes={EMBEDDING: ()}))
    assert reason == f"other shapes: {EMBEDDING} [8, 4] against []"
    assert vocabulary_size(model({EMBEDDING: ()})) == 0


# --- quantised sources ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.self_attn.q_proj.qweight", "I32"),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", "F32"),
        ("model.layers.0.self_attn.q_proj.weight_packed", "I32"),
        ("model.layers.0.self_attn.q_proj.weight.absmax", "F32"),
        ("model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4", "U8"),
        ("model.layers.0.self_attn.q_proj.SCB", "F32"),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", "U8"),
        (Q, "U8"),
    ],
)
def test_packed_weights_are_refused_also_without_a_word_in_the_config(name, dtype):
    base = model()
    base.tensors[name] = TensorInfo(name, dtype, (4, 4), "model.safetensors", 0, 0)
    reasons = reasons_of(model(), base, Selection("all"))
    assert f"base holds packed weights: {name} ({dtype}); take the unquantised model" in reasons


def test_compressed_tensors_older_word_is_enough():
    (reason,) = reasons_of(model(), model(compression_config={"quant_method": "compressed-tensors"}))
    assert reason == "base is quantised (compressed-tensors); take the unquantised model"


def test_a_quantised_text_part_is_refused():
    text = {"model_type": "gemma3_text", "hidden_size": 4, "quantization_config": {"quant_method": "fp8"}}
    (reason,) = reasons_of(model(model_type="gemma3"), model(model_type="gemma3", text_config=text))
    assert reason == "base is quantised (fp8); take the unquantised model"


# --- files of strangers -----------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
config_keys = st.sampled_from(
    ["model_type", "hidden_size", "vocab_size", "tie_word_embeddings", "text_config", "quantization_config"]
)
configs = st.dictionaries(config_keys, json_values, max_size=4)
shapes = st.dictionaries(
    st.sampled_from([*SHAPES, "language_model.lm_head.weight", ""]), st.lists(st.integers(0, 9), max_size=3).map(tuple)
)


@given(
    ours=configs, theirs=configs, our_shapes=shapes, their_shapes=shapes, selection=st.sampled_from(["linear", "all"])
)
def test_whatever_headers_hold_a_pair_is_planned_or_refused(ours, theirs, our_shapes, their_shapes, selection):
    instruct = Checkpoint("made", ours, tensors(our_shapes))
    base = Checkpoint("made", theirs, tensors(their_shapes))
    try:
        plan = plan_graft(instruct, base, selection=Selection(selection))
    except PairRefused:
        return
    for name, other in plan.grafted.items():
        left, right = instruct.tensors[name].shape, base.tensors[other].shape
        assert left == right or (plan.common_rows[name] == min(left[0], right[0]) and left[1:] == right[1:])
