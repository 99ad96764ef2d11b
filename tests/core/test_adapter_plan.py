"""What of an adapter is grafted, discarded or refused is decided from headers.

Most of them are made by hand. Those that PEFT itself saves from tiny models show that its names are known.
"""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftType, get_peft_model
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from core.adapter_plan import (
    HANDLED_OPTIONS,
    HARMLESS_OPTIONS,
    REFUSED_OPTIONS,
    REFUSED_TYPES,
    AdapterPlan,
    LowRank,
    Replacement,
    plan_adapter,
)
from core.checkpoints import AdapterHeader, Checkpoint, TensorInfo, read_adapter, read_checkpoint
from core.errors import PairRefused
from core.graft_plan import Selection, is_head, is_linear

Shapes = dict[str, tuple[int, ...]]

Q, DOWN, GATE = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate"
EMBED, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"
SHAPES: Shapes = {
    f"{EMBED}.weight": (8, 4),
    f"{Q}.weight": (4, 4),
    f"{Q}.bias": (4,),
    f"{DOWN}.weight": (4, 6),
    f"{GATE}.weight": (2, 4),
    f"{NORM}.weight": (4,),
    f"{HEAD}.weight": (8, 4),
}
MODEL = {"model_type": "qwen3", "hidden_size": 4, "tie_word_embeddings": False}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": True, "bias": "none"}
ALL = Selection("all")


def tensors(shapes: Shapes, dtype: str) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, dtype, shape, "x.safetensors", 0, 0) for name, shape in shapes.items()}


def model(
    changes: dict[str, tuple[int, ...] | None] | None = None, *, dtype: str = "BF16", **config: Any
) -> Checkpoint:
    """The small model, with tensors changed (or dropped: None) and config fields set."""
    kept = {name: shape for name, shape in {**SHAPES, **(changes or {})}.items() if shape is not None}
    return Checkpoint("made", {**MODEL, **config}, tensors(kept, dtype))


def tied(changes: dict[str, tuple[int, ...] | None] | None = None) -> Checkpoint:
    return model({f"{HEAD}.weight": None, **(changes or {})}, tie_word_embeddings=True)


def adapter(*shapes: Shapes, **config: Any) -> AdapterHeader:
    parts = shapes or (factors(Q, (2, 4), (4, 2)), factors(DOWN, (2, 6), (4, 2)))
    named = {f"base_model.model.{name}": shape for part in parts for name, shape in part.items()}
    return AdapterHeader("made", {**LORA, **config}, tensors(named, "F32"))


def factors(module: str, a: tuple[int, ...], b: tuple[int, ...]) -> Shapes:
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def embedding_factors(rows: int = 8) -> Shapes:
    return {f"{EMBED}.lora_embedding_A": (2, rows), f"{EMBED}.lora_embedding_B": (4, 2)}


HEAD_FACTORS = factors(HEAD, (2, 4), (8, 2))
Q_FACTORS = factors(Q, (2, 4), (4, 2))


def low_rank(plan: AdapterPlan, module: str) -> LowRank:
    found = plan.grafted[f"{module}.weight"]
    assert isinstance(found, LowRank)
    return found


def refusal(
    header: AdapterHeader,
    instruct: Checkpoint | None = None,
    base: Checkpoint | None = None,
    selection: Selection = ALL,
) -> list[str]:
    with pytest.raises(PairRefused) as refused:
        plan_adapter(instruct or model(), header, base, selection=selection)
    return refused.value.reasons


# --- plain LoRA -------------------------------------------------------------------------------------------------------


def test_factors_find_their_weights_and_scaling():
    plan = plan_adapter(model(), adapter(), None)
    assert plan.grafted.keys() == {f"{Q}.weight", f"{DOWN}.weight"}
    assert set(plan.copied) == SHAPES.keys() - plan.grafted.keys()
    found = low_rank(plan, Q)
    assert (found.scaling, found.transposed, found.magnitude, found.base) == (2.0, False, None, None)
    assert (found.a.shape, found.b.shape) == ((2, 4), (4, 2))


def test_rslora_scales_by_the_root_of_the_rank():
    assert low_rank(plan_adapter(model(), adapter(use_rslora=True), None), Q).scaling == pytest.approx(4 / 2**0.5)


def test_rank_and_alpha_patterns_hold_for_their_modules():
    header = adapter(
        factors(Q, (1, 4), (4, 1)),
        factors(DOWN, (2, 6), (4, 2)),
        rank_pattern={"q_proj": 1},
        alpha_pattern={r"layers\.0\..*down_proj": 1.5, "proj": 99},
    )
    plan = plan_adapter(model(), header, None)
    assert (low_rank(plan, Q).scaling, low_rank(plan, DOWN).scaling) == (4.0, 0.75)


def test_alphas_of_which_training_may_have_used_either_are_refused():
    """PEFT takes the first that matches, and writes them to the file in another order."""
    header = adapter(alpha_pattern={Q: 100, "q_proj": 1, r".*down_proj": 1.0, "mlp.down_proj": 1})
    (reason,) = refusal(header)
    assert reason.startswith(f"the adapter's alpha_pattern gives {Q} 100 by '{Q}' and 1 by 'q_proj': ")
    assert reason.endswith("leave in adapter_config.json the one that acted")


@pytest.mark.parametrize("rank", [1, 3])
def test_of_several_ranks_the_factors_tell_which_one_acted(rank):
    header = adapter(factors(Q, (rank, 4), (4, rank)), rank_pattern={Q: 1, "q_proj": 3})
    assert low_rank(plan_adapter(model(), header, None), Q).scaling == 4 / rank
    assert "do not fit rank 1" in refusal(adapter(factors(Q, (2, 4), (4, 2)), rank_pattern={Q: 1, "q_proj": 3}))[0]


modules = st.lists(st.sampled_from(["model", "layers", "0", "q_proj", "proj"]), min_size=1, max_size=4).map(".".join)


@given(module=modules, pattern=modules)
def test_a_pattern_matches_as_peft_matches_it(module, pattern):
    header = adapter(factors(module, (1, 4), (4, 1)), r=1, alpha_pattern={pattern: 3})
    found = low_rank(plan_adapter(model({f"{module}.weight": (4, 4)}), header, None, selection=ALL), module)
    assert found.scaling == {pattern: 3}.get(get_pattern_key([pattern], module), 4)


@pytest.mark.parametrize(
    "pattern", ["q_proj(", "a{99999999999999999999}", "(" * 20000 + ")" * 20000], ids=["open", "large", "deep"]
)
def test_a_broken_pattern_is_refused_by_its_name(pattern):
    (reason,) = refusal(adapter(alpha_pattern={pattern: 3}))
    assert reason == f"the adapter's alpha_pattern holds {repr(pattern)[:80]}, which is no regular expression"
    (reason,) = refusal(adapter(target_modules=pattern))
    assert reason == f"the adapter's target_modules holds {repr(pattern)[:80]}, which is no regular expression"


@pytest.mark.parametrize(
    ("config", "finding"),
    [
        ({"r": None}, "the config gives the adapter the rank None"),
        ({"r": 0}, "the rank 0"),
        ({"lora_alpha": float("inf")}, "the alpha inf"),
        ({"lora_alpha": "16"}, "the alpha '16'"),
        ({"rank_pattern": {"q_proj": 1.5}}, "the config gives the modules 'q_proj' the rank 1.5"),
        ({"rank_pattern": ["q_proj"]}, "the adapter's rank_pattern is ['q_proj'], not a mapping"),
    ],
)
def test_a_rank_or_alpha_that_is_no_number_is_refused(config, finding):
    assert any(finding in reason for reason in refusal(adapter(**config)))


def test_what_does_not_fit_is_refused_with_every_reason():
    header = adapter(
        factors(Q, (2, 5), (4, 2)),
        factors("model.layers.7.mlp.up_proj", (2, 4), (4, 2)),
        {f"{DOWN}.lora_A.weight": (2, 6)},
        {f"{GATE}.lora_strange.weight": (2, 6)},
        bias="some",
    )
    reasons = refusal(header, model(quantization_config={"quant_method": "awq"}), selection=Selection(include=("no",)))
    findings = (
        *("include pattern 'no'", "awq", "the bias 'some'", f"only one factor of {DOWN}", "lora_strange"),
        f"{Q} has the factors B [4, 2] and A [2, 5], which do not fit rank 2 and [4, 4] of instruct",
        "1 tensors that the adapter changes are missing in instruct: model.layers.7.mlp.up_proj.weight",
    )
    for finding in findings:
        assert any(finding in reason for reason in reasons), finding
    assert len(reasons) == len(findings)


@pytest.mark.parametrize("shape", [(), (2,), (2, 4, 1), (0, 4)])
def test_factors_of_another_rank_or_dimension_do_not_fit(shape):
    (reason,) = refusal(adapter(factors(Q, shape, (4, 2))))
    assert "do not fit rank 2" in reason


def test_only_a_conv1d_stores_its_weight_as_in_by_out():
    """PEFT, too, goes by the module's class, and a linear's factors of these shapes do not load."""
    part = factors(DOWN, (2, 4), (6, 2))
    assert "do not fit rank 2 and [4, 6] of instruct" in refusal(adapter(part, fan_in_fan_out=True))[0]
    module = "transformer.h.0.mlp.c_proj"
    conv = model({f"{module}.weight": (6, 4)}, model_type="gpt2")
    assert low_rank(plan_adapter(conv, adapter(factors(module, (2, 6), (4, 2))), None), module).transposed
    linear = model({f"{module}.weight": (4, 6)}, model_type="gpt_bigcode")
    header = adapter(factors(module, (2, 6), (4, 2)), fan_in_fan_out=True)
    assert not low_rank(plan_adapter(linear, header, None), module).transposed


@pytest.mark.parametrize(
    ("part", "finding"),
    [
        (factors(EMBED, (2, 4), (8, 2)), f"{EMBED} is an embedding, and has the factors of a linear"),
        (
            {f"{HEAD}.lora_embedding_A": (2, 8), f"{HEAD}.lora_embedding_B": (4, 2)},
            f"{HEAD} is a linear, and has the factors of an embedding",
        ),
        (
            {f"{Q}.lora_embedding_A": (2, 4), f"{Q}.lora_embedding_B": (4, 2)},
            f"{Q} is a linear, and has the factors of an embedding",
        ),
    ],
    ids=["embedding", "head", "linear"],
)
def test_factors_of_another_kind_of_module_are_refused(part, finding):
    assert refusal(adapter(part)) == [f"{finding}: PEFT would not load them"]


TWO_SPELLINGS = {
    "factor": (f"{Q}.lora_A.weight", f"{Q}.lora_A.default.weight"),
    "kinds of factors": (f"{Q}.lora_B.weight", f"{Q}.lora_embedding_B"),
    "magnitude": (f"{Q}.lora_magnitude_vector", f"{Q}.lora_magnitude_vector.default.weight"),
    "bias": (f"{Q}.bias", f"{Q}.base_layer.bias"),
    "whole": (f"{NORM}.weight", f"{NORM}.modules_to_save.weight"),
    "whole, named": (f"{NORM}.modules_to_save.default.weight", f"{NORM}.modules_to_save.weight"),
}


@pytest.mark.parametrize("names", TWO_SPELLINGS.values(), ids=TWO_SPELLINGS)
def test_two_spellings_of_one_tensor_are_refused(names):
    header = adapter(factors(Q, (2, 4), (4, 2)), dict.fromkeys(names, (4,)), bias="all")
    one, other = (f"base_model.model.{name}" for name in names)
    assert f"the adapter holds one tensor under two names: {one} and {other}" in refusal(header, base=model())


@pytest.mark.parametrize(
    ("config", "is_named"),
    [
        ({"target_modules": ["q_proj", "mlp.down_proj"]}, True),
        ({"target_modules": [Q, DOWN], "exclude_modules": ["proj"]}, True),
        ({"target_modules": r".*_proj"}, True),
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": None}, True),
        ({"target_modules": ["q_proj", "proj"]}, False),
        ({"target_modules": r".*q_proj"}, False),
        ({"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*mlp.*"}, False),
    ],
)
def test_factors_that_peft_would_not_load_are_refused(config, is_named):
    if is_named:
        assert plan_adapter(model(), adapter(**config), None).grafted
        return
    (reason,) = refusal(adapter(**config))
    assert reason == (
        "1 modules with factors are not among the adapter's target_modules, so that PEFT would not load them: " + DOWN
    )


def test_what_names_modules_must_be_names():
    assert refusal(adapter(target_modules={"q_proj": 1})) == [
        "the adapter's target_modules is {'q_proj': 1}, neither names nor a regular expression"
    ]


def test_a_copy_of_base_beside_a_linears_factors_is_refused():
    """PEFT would load it in the place of base's; beside an embedding it writes one itself."""
    name = f"{Q}.base_layer.weight"
    (reason,) = refusal(adapter(factors(Q, (2, 4), (4, 2)), {name: (4, 4)}))
    assert reason.startswith(f"the adapter holds weights of base beside its factors: base_model.model.{name}; ")
    copy = {f"{EMBED}.base_layer.weight": (8, 4)}
    assert plan_adapter(model(), adapter(embedding_factors(), copy), None, selection=ALL).grafted


def test_factors_in_eight_bits_are_refused():
    header = AdapterHeader(
        "made", LORA, tensors({"base_model.model." + k: v for k, v in HEAD_FACTORS.items()}, "F8_E4M3")
    )
    assert refusal(header) == [f"{HEAD} is stored in F8_E4M3, which cannot be grafted"]


def test_an_adapter_without_factors_is_refused():
    assert refusal(AdapterHeader("made", LORA, {})) == ["the adapter holds no LoRA factors"]


def test_names_without_the_prefix_of_peft_are_not_guessed():
    header = AdapterHeader("made", LORA, tensors(factors(Q, (2, 4), (4, 2)), "F32"))
    assert "neither LoRA factors nor whole modules" in refusal(header)[0]


def test_an_adapter_of_a_text_model_fits_its_multimodal_sibling():
    named = {f"language_model.{name}": shape for name, shape in SHAPES.items()}
    instruct = Checkpoint("made", MODEL, tensors(named, "BF16"))
    plan = plan_adapter(instruct, adapter(), None)
    assert f"language_model.{Q}.weight" in plan.grafted
    assert plan.remarks == (
        f"the names differ by a prefix: language_model.{Q}.weight in instruct and {Q}.weight in the adapter",
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("q_proj(*.", max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("q_proj(*.", max_size=4), inner, max_size=2),
    max_leaves=4,
)
keys = st.builds(
    "base_model.model.{}{}".format,
    st.sampled_from([Q, DOWN, EMBED, HEAD, NORM, "language_model.lm_head"]),
    st.sampled_from(
        (
            *(".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector"),
            *(".weight", ".bias", ".base_layer.weight", ".base_layer.bias", ".modules_to_save.weight", ".lora_C", ""),
        )
    ),
)
options = st.sampled_from([*HANDLED_OPTIONS - {"peft_type"}, "fan_in_fan_out", "newest"])


@given(
    config=st.dictionaries(options, json_values, max_size=3),
    shapes=st.dictionaries(keys, st.lists(st.sampled_from([0, 2, 4, 6, 8, 9]), max_size=3).map(tuple), max_size=6),
    ties=st.booleans(),
    with_base=st.booleans(),
)
def test_whatever_an_adapter_holds_it_is_planned_or_refused(config, shapes, ties, with_base):
    instruct = tied() if ties else model()
    header = AdapterHeader("made", {**LORA, **config}, tensors(shapes, "F32"))
    try:
        plan = plan_adapter(instruct, header, instruct if with_base else None, selection=ALL)
    except PairRefused:
        return
    assert plan.grafted.keys() | set(plan.copied) == instruct.tensors.keys()


# --- the selection ----------------------------------------------------------------------------------------------------


def test_scope_linear_discards_what_is_no_linear_and_says_so():
    header = adapter(factors(Q, (2, 4), (4, 2)), factors(GATE, (2, 4), (2, 2)), embedding_factors())
    plan = plan_adapter(model(), header, None)
    assert plan.grafted.keys() == {f"{Q}.weight"}
    assert plan.discarded.keys() == {f"{GATE}.weight", f"{EMBED}.weight"}
    assert plan.remarks == (f"2 changes of the adapter are not in the scope 'linear': {GATE}.weight, {EMBED}.weight",)
    assert plan_adapter(model(), header, None, selection=ALL).discarded == {}


OTHERS = {
    "model.layers.0.self_attn.new_proj": True,
    "backbone.layers.3.mixer.time": True,
    "transformer.h.0.mlp.experts.1.both": True,
    "model.layers.0.mlp.shared_expert_gate": False,
    "model.layers.0.block_sparse_moe.gate": False,
    "model.layers.0.mlp.router.layer": False,
    "model.vision_tower.layers.0.mlp.other": False,
    "model.some_projection": False,
}


@pytest.mark.parametrize(("module", "is_taken"), OTHERS.items())
def test_scope_linear_takes_every_linear_of_a_layer_that_an_adapter_changes(module, is_taken):
    """For plain LoRA both scopes are the same, but for vocabulary, routers and what is no language model."""
    instruct = model({f"{module}.weight": (6, 4), f"{module}.bias": (6,)})
    header = adapter(factors(Q, (2, 4), (4, 2)), factors(module, (2, 4), (6, 2)), {f"{module}.bias": (6,)}, bias="all")
    plan = plan_adapter(instruct, header, instruct)
    assert (f"{module}.weight" in plan.grafted) is is_taken
    assert f"{module}.bias" in plan.discarded
    narrow = plan_adapter(instruct, header, instruct, selection=Selection(exclude=(f"{module}.*",)))
    assert f"{module}.weight" in narrow.discarded


def test_scope_linear_leaves_out_a_layers_embedding_and_its_norm():
    table, norm = "model.layers.0.positions", "model.layers.0.input_layernorm"
    part = {f"{table}.lora_embedding_A": (2, 8), f"{table}.lora_embedding_B": (4, 2), f"{norm}.weight": (4,)}
    instruct = model({f"{table}.weight": (8, 4), f"{norm}.weight": (4,)})
    plan = plan_adapter(instruct, adapter(factors(Q, (2, 4), (4, 2)), part), instruct)
    assert plan.discarded.keys() == {f"{table}.weight", f"{norm}.weight"}


def test_patterns_choose_among_an_adapters_changes():
    plan = plan_adapter(model(), adapter(), None, selection=Selection(exclude=("*.mlp.*",)))
    assert (plan.grafted.keys(), plan.discarded.keys()) == ({f"{Q}.weight"}, {f"{DOWN}.weight"})


def test_a_selection_that_leaves_nothing_of_the_adapter_is_refused():
    assert refusal(adapter(HEAD_FACTORS), selection=Selection()) == [
        "nothing that the adapter changes is in the scope 'linear'"
    ]


def test_scope_linear_leaves_out_a_vision_tower_that_is_called_otherwise_in_the_file():
    header = adapter(factors(Q, (2, 4), (4, 2)), factors("model.vision_tower.q_proj", (2, 4), (4, 2)))
    (remark,) = plan_adapter(model(), header, None).remarks
    assert remark == "1 changes of the adapter are not in the scope 'linear': model.vision_tower.q_proj.weight"
    assert "missing in instruct: model.vision_tower.q_proj.weight" in refusal(header)[0]


# --- embeddings and heads ---------------------------------------------------------------------------------------------


def test_an_embeddings_factors_are_transposed():
    plan = plan_adapter(model(), adapter(embedding_factors(), HEAD_FACTORS), None, selection=ALL)
    assert (low_rank(plan, EMBED).transposed, low_rank(plan, HEAD).transposed) == (True, False)
    assert plan.common_rows == {}


@pytest.mark.parametrize(("ours", "theirs"), [(10, 8), (8, 10)])
def test_an_adapter_of_a_padded_vocabulary_changes_the_common_rows(ours, theirs):
    instruct = model({f"{EMBED}.weight": (ours, 4), f"{HEAD}.weight": (ours, 4)})
    header = adapter(embedding_factors(theirs), factors(HEAD, (2, 4), (theirs, 2)))
    plan = plan_adapter(instruct, header, None, selection=ALL)
    assert plan.common_rows == {f"{EMBED}.weight": 8, f"{HEAD}.weight": 8}
    (remark,) = plan.remarks
    assert f"{ours} in instruct and {theirs} in the adapter: the first 8 are grafted" in remark


def test_an_adapter_of_another_vocabulary_is_refused():
    assert refusal(adapter(embedding_factors(11))) == [
        f"other vocabulary: {EMBED} has 8 rows in instruct and 11 in the adapter"
    ]


@pytest.mark.parametrize("part", [embedding_factors(), HEAD_FACTORS], ids=["embedding", "head"])
def test_on_a_tied_instruct_the_shared_tensor_changes(part):
    plan = plan_adapter(tied(), adapter(part), None, selection=ALL)
    assert plan.grafted.keys() == {f"{EMBED}.weight"}
    assert low_rank(plan, EMBED).transposed is ("lora_embedding" in next(iter(part)))
    assert plan.remarks == (
        "instruct ties its head to its embedding: the graft changes both, the unmerged adapter only one of them",
    )


def test_a_tied_tensor_that_is_stored_twice_changes_twice():
    instruct = model(tie_word_embeddings=True)
    plan = plan_adapter(instruct, adapter(HEAD_FACTORS), None, selection=ALL)
    assert plan.grafted.keys() == {f"{EMBED}.weight", f"{HEAD}.weight"}


def test_a_tied_tensor_under_the_name_of_the_head_alone():
    instruct = model({f"{EMBED}.weight": None}, tie_word_embeddings=True)
    plan = plan_adapter(instruct, adapter(embedding_factors()), None, selection=ALL)
    assert low_rank(plan, HEAD).transposed


def test_two_changes_of_one_tied_tensor_are_refused():
    reasons = refusal(adapter(embedding_factors(), HEAD_FACTORS), tied())
    assert reasons == [
        f"the adapter changes {EMBED}.weight twice: by {EMBED} and by {HEAD}, which instruct ties to one tensor"
    ]


def test_changes_that_peft_tied_itself_are_one():
    header = adapter(embedding_factors(), HEAD_FACTORS, ensure_weight_tying=True)
    assert plan_adapter(tied(), header, None, selection=ALL).grafted.keys() == {f"{EMBED}.weight"}
    header = adapter(factors(Q, (2, 4), (4, 2)), {f"{Q}.weight": (4, 4)}, ensure_weight_tying=True)
    assert "twice" in refusal(header, base=model())[0]


def test_of_two_changes_that_peft_tied_the_second_is_there_to_be_compared():
    header = adapter(embedding_factors(), HEAD_FACTORS, ensure_weight_tying=True)
    twin = plan_adapter(tied(), header, None, selection=ALL).twins[f"{EMBED}.weight"]
    assert isinstance(twin, LowRank)
    assert twin.a.shape == (2, 4)
    assert plan_adapter(tied(), adapter(Q_FACTORS, embedding_factors()), None).twins == {}


@pytest.mark.parametrize(
    ("part", "config"),
    [
        ({}, {"alpha_pattern": {HEAD: 3}}),
        ({f"{EMBED}.lora_magnitude_vector": (4,), f"{HEAD}.lora_magnitude_vector": (8,)}, {"use_dora": True}),
    ],
    ids=["alphas", "magnitudes"],
)
def test_changes_that_cannot_be_one_are_refused_whatever_peft_was_told(part, config):
    header = adapter(embedding_factors(), HEAD_FACTORS, part, ensure_weight_tying=True, **config)
    assert "twice" in refusal(header, tied(), tied())[0]


def test_two_changes_of_one_tied_tensor_do_no_harm_where_the_scope_leaves_them_out():
    plan = plan_adapter(tied(), adapter(Q_FACTORS, embedding_factors(), HEAD_FACTORS), None)
    assert plan.grafted.keys() == {f"{Q}.weight"}
    assert plan.discarded == {}
    assert plan.remarks == (
        f"1 changes of the adapter are not in the scope 'linear': {EMBED}.weight",
        f"the discarded share does not count {EMBED}.weight, which the adapter changes twice",
    )


def test_the_embedding_of_another_family_is_not_taken_for_a_tied_one():
    header = adapter({"transformer.wte.lora_embedding_A": (2, 8), "transformer.wte.lora_embedding_B": (4, 2)})
    assert "missing in instruct: transformer.wte.weight" in refusal(header, tied())[0]


# --- DoRA and whole tensors -------------------------------------------------------------------------------------------


def dora(module: str, part: Shapes, out: int, suffix: str = "") -> Shapes:
    return {**part, f"{module}.lora_magnitude_vector{suffix}": (out,)}


@pytest.mark.parametrize("suffix", ["", ".weight", ".default.weight"])
def test_dora_has_a_magnitude_per_row_and_needs_base(suffix):
    header = adapter(dora(DOWN, factors(DOWN, (2, 6), (4, 2)), 4, suffix), use_dora=True)
    found = low_rank(plan_adapter(model(), header, model()), DOWN)
    assert found.magnitude is not None
    assert found.base is not None
    assert (found.magnitude.shape, found.magnitude_axis, found.base.name) == ((4,), 0, f"{DOWN}.weight")
    (reason,) = refusal(header)
    assert reason.startswith("the adapter sets use_dora, and DoRA's magnitudes are absolute for base: ")
    assert reason.endswith("give the model that the adapter was trained on, with --base")


def test_doras_magnitudes_of_an_embedding_belong_to_its_columns():
    header = adapter(dora(EMBED, embedding_factors(), 4), use_dora=True)
    found = low_rank(plan_adapter(model(), header, model(), selection=ALL), EMBED)
    assert (found.transposed, found.magnitude_axis) == (True, 1)


def test_doras_columns_need_every_row_that_they_were_trained_on():
    header = adapter(dora(EMBED, embedding_factors(10), 4), use_dora=True)
    assert refusal(header, model(), model()) == [f"other vocabulary: DoRA's {EMBED} has 10 rows, and base's has 8"]


def test_a_padded_head_of_dora_changes_the_rows_that_all_three_have():
    header = adapter(dora(HEAD, factors(HEAD, (2, 4), (10, 2)), 10), use_dora=True)
    base = model({f"{HEAD}.weight": (9, 4), f"{EMBED}.weight": (9, 4)})
    assert plan_adapter(model(), header, base, selection=ALL).common_rows == {f"{HEAD}.weight": 8}
    wide = model({f"{HEAD}.weight": (12, 4), f"{EMBED}.weight": (12, 4)})
    wide_base = model({f"{HEAD}.weight": (10, 4), f"{EMBED}.weight": (10, 4)})
    assert plan_adapter(wide, header, wide_base, selection=ALL).common_rows == {f"{HEAD}.weight": 10}


def test_a_magnitude_and_the_config_must_agree():
    part = factors(Q, (2, 4), (4, 2))
    assert refusal(adapter(part, use_dora=True), base=model()) == [
        f"the adapter sets use_dora, but holds no magnitude of {Q}"
    ]
    assert refusal(adapter(dora(Q, part, 4))) == [f"the adapter does not set use_dora, but has a magnitude of {Q}"]
    assert refusal(adapter(dora(Q, part, 3), use_dora=True), base=model()) == [
        f"the magnitude of {Q} is [3], and its B is [4, 2]"
    ]


SAVED = {f"{NORM}.weight": (4,), f"{HEAD}.weight": (8, 4)}


@pytest.mark.parametrize("infix", ["", "modules_to_save.", "modules_to_save.default."])
def test_a_module_that_was_saved_whole_is_a_difference_from_base(infix):
    saved = {name.replace(".weight", f".{infix}weight"): shape for name, shape in SAVED.items()}
    header = adapter(factors(Q, (2, 4), (4, 2)), saved, modules_to_save=["norm", "lm_head"])
    plan = plan_adapter(model(), header, model(), selection=ALL)
    found = plan.grafted[f"{NORM}.weight"]
    assert isinstance(found, Replacement)
    assert (found.tensor.name, found.base.name) == (f"base_model.model.model.norm.{infix}weight", f"{NORM}.weight")
    assert plan_adapter(model(), header, model()).discarded.keys() == SAVED.keys()


def test_a_whole_module_needs_base():
    header = adapter(factors(Q, (2, 4), (4, 2)), SAVED, modules_to_save=["norm", "lm_head"])
    reasons = refusal(header)
    assert reasons[0].startswith(f"the adapter saves {NORM}.weight whole, and the change of a whole tensor is a diff")
    assert all(reason.endswith("with --base") for reason in reasons)


def test_a_whole_module_that_the_scope_leaves_out_needs_no_base():
    """PEFT also saves a resized vocabulary whole, without being asked to."""
    plan = plan_adapter(model(), adapter(Q_FACTORS, {f"{EMBED}.weight": (8, 4)}), None)
    assert (plan.grafted.keys(), plan.discarded) == ({f"{Q}.weight"}, {})
    assert plan.remarks == (
        f"1 changes of the adapter are not in the scope 'linear': {EMBED}.weight",
        f"the discarded share does not count {EMBED}.weight, which only base would tell (--base)",
    )
    reasons = refusal(adapter({f"{EMBED}.weight": (8, 4)}), selection=Selection())
    assert reasons == ["nothing that the adapter changes is in the scope 'linear'"]


def test_trained_biases_are_whole_tensors():
    part = {**factors(Q, (2, 4), (4, 2)), f"{Q}.base_layer.bias": (4,)}
    plan = plan_adapter(model(), adapter(part, bias="lora_only"), model())
    assert isinstance(plan.grafted[f"{Q}.bias"], Replacement)
    assert f"the adapter saves {Q}.bias whole" in refusal(adapter(part, bias="all"))[0]
    assert "weights of base beside its factors" in refusal(adapter(part))[0]  # PEFT saves none that it did not train


def test_a_resized_head_that_was_saved_whole_changes_the_rows_that_all_three_have():
    header = adapter({f"{HEAD}.weight": (9, 4)}, modules_to_save=["lm_head"])
    plan = plan_adapter(model({f"{HEAD}.weight": (10, 4)}), header, model(), selection=ALL)
    assert plan.common_rows == {f"{HEAD}.weight": 8}


@pytest.mark.parametrize("shape", [(), (8,), (8, 5), (8, 4, 1)])
def test_a_whole_module_of_another_shape_is_refused(shape):
    (reason,) = refusal(adapter({f"{HEAD}.weight": shape}, modules_to_save=["lm_head"]), base=model())
    assert reason == f"the adapter saves {HEAD}.weight as {list(shape)}, and instruct has [8, 4]"


def test_a_classifier_that_instruct_lacks_is_refused():
    header = adapter(factors(Q, (2, 4), (4, 2)), {"score.weight": (2, 4)}, modules_to_save=["score"])
    assert refusal(header, base=model()) == ["1 tensors that the adapter changes are missing in instruct: score.weight"]


ENDS = {f"{EMBED}.weight": (8, 4)}, {f"{HEAD}.weight": (8, 4)}, {f"{EMBED}.weight": (8, 4), f"{HEAD}.weight": (8, 4)}


@pytest.mark.parametrize("ends", ENDS, ids=["embedding", "head", "both"])
def test_an_end_of_a_tied_model_saved_whole_is_refused_where_it_is_asked_for(ends):
    """PEFT's merge is a model with two tensors in the place of one."""
    header = adapter(Q_FACTORS, ends, modules_to_save=["embed_tokens", "lm_head"])
    (reason,) = refusal(header, tied(), tied())
    assert reason.startswith(f"the adapter saves {min(ends, key=is_head)} whole, and instruct ties its head")
    for remedy in ("ensure_weight_tying", f"--exclude {EMBED}.weight", "tie_word_embeddings false"):
        assert remedy in reason
    assert plan_adapter(tied(), header, tied()).grafted.keys() == {f"{Q}.weight"}
    kept = Selection("all", exclude=("*embed*",))
    assert plan_adapter(tied(), header, tied(), selection=kept).grafted.keys() == {f"{Q}.weight"}


@pytest.mark.parametrize("ends", ENDS, ids=["embedding", "head", "both"])
@pytest.mark.parametrize("config", [{"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}, {}])
def test_a_tied_tensor_that_peft_kept_tied_may_be_saved_whole(ends, config):
    """It was told to, or the vocabulary was resized and nothing of it trained apart."""
    plan = plan_adapter(tied(), adapter(ends, **config), tied(), selection=ALL)
    assert plan.grafted.keys() == {f"{EMBED}.weight"}
    assert len(plan.twins) == len(ends) - 1


def test_base_must_be_of_the_same_lineage():
    reasons = refusal(adapter(), base=model(model_type="llama", quantization_config={"quant_method": "gptq"}))
    assert any("other architecture" in reason for reason in reasons)
    assert any("base is quantised (gptq)" in reason for reason in reasons)


def test_base_is_named_also_where_the_change_does_not_need_it():
    found = low_rank(plan_adapter(model(), adapter(), model(dtype="F32")), Q)
    assert found.base is not None
    assert found.base.dtype == "F32"


# --- everything else that PEFT knows ----------------------------------------------------------------------------------


def test_every_type_of_peft_is_handled_or_refused_by_name():
    assert {kind.value for kind in PeftType} - REFUSED_TYPES.keys() == {"LORA"}


@pytest.mark.parametrize("kind", REFUSED_TYPES)
def test_another_type_is_refused_with_its_reason(kind):
    assert refusal(adapter(peft_type=kind)) == [f"the adapter is of the type {kind}: {REFUSED_TYPES[kind]}"]


@pytest.mark.parametrize("kind", ["NEWEST", None, 3])
def test_an_unknown_type_is_refused(kind):
    assert refusal(adapter(peft_type=kind)) == [f"the adapter is of the type {kind}: this version does not know it"]


def test_every_option_of_peft_is_handled_harmless_or_refused():
    known = [*HANDLED_OPTIONS, *HARMLESS_OPTIONS, *REFUSED_OPTIONS]
    assert {field.name for field in fields(LoraConfig)} <= set(known)
    assert len(known) == len(set(known))


@pytest.mark.parametrize("option", REFUSED_OPTIONS)
def test_an_option_that_makes_another_change_is_refused_with_its_reason(option):
    (reason,) = refusal(adapter(**{option: [1]}))
    assert reason == f"the adapter sets {option}: {REFUSED_OPTIONS[option]}"


def test_an_option_of_a_newer_peft_is_refused_where_it_is_set():
    assert plan_adapter(model(), adapter(use_newest=False, newest_config=None), None).grafted
    assert refusal(adapter(newest_config={"k": 1})) == [
        "the adapter sets newest_config to {'k': 1}, an option that this version does not know"
    ]


@pytest.mark.parametrize("init", [True, False, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_an_initialisation_that_leaves_base_alone_is_plain(init):
    assert plan_adapter(model(), adapter(init_lora_weights=init), None).grafted


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_an_initialisation_that_changes_base_is_refused_with_the_way_to_convert_it(init):
    (reason,) = refusal(adapter(init_lora_weights=init))
    assert repr(init) in reason
    assert "path_initial_model_for_weight_conversion" in reason


@pytest.mark.parametrize("init", ["loftq", "newest"])
def test_an_initialisation_that_cannot_be_converted_is_refused(init):
    assert repr(init) in refusal(adapter(init_lora_weights=init))[0]


# --- what PEFT itself saves -------------------------------------------------------------------------------------------

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


def llama(**config: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=1, attention_bias=True, **config))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**TINY, num_key_value_heads=1, num_local_experts=2))


def lfm2() -> nn.Module:
    layers = ["conv", "full_attention"]
    config = {**TINY, "num_hidden_layers": 2, "num_key_value_heads": 1, "layer_types": layers, "conv_L_cache": 3}
    return Lfm2ForCausalLM(Lfm2Config(**config))


def gemma3() -> nn.Module:
    vision = {key: TINY[key] for key in TINY if key != "vocab_size"} | {"image_size": 28, "patch_size": 14}
    text = {**TINY, "num_key_value_heads": 1, "head_dim": 8}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def saved(make: Callable[[], nn.Module], tmp_path: Path, **options: Any) -> tuple[Checkpoint, AdapterHeader, nn.Module]:
    torch.manual_seed(0)
    plain = make()
    plain.save_pretrained(tmp_path / "model")
    wrapped = get_peft_model(plain, LoraConfig(r=2, **options))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    return read_checkpoint(tmp_path / "model"), read_adapter(tmp_path / "adapter"), wrapped


CASES = {
    "linears": (llama, {"target_modules": "all-linear"}),
    "embedding and head": (llama, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "DoRA": (llama, {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"], "use_dora": True}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "DoRA on Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj", "wte", "wpe"], "use_dora": True}),
    "biases": (llama, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "all biases": (gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
    "whole modules": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm", "embed_tokens", "lm_head"]}),
    "attention beside experts": (mixtral, {"target_modules": ["q_proj", "o_proj"]}),
    "a multimodal model": (gemma3, {"target_modules": r".*language_model.*(q|down)_proj|.*embed_tokens"}),
    "VeLoRA": (llama, {"target_modules": ["q_proj"], "velora_config": VeloraConfig(num_groups=4)}),
    "MonteCLoRA": (llama, {"target_modules": ["q_proj"], "monteclora_config": MontecloraConfig(num_samples=2)}),
    "MiCA": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "a square Conv1D beside a linear": (gpt2, {"target_modules": ["c_proj", "lm_head"]}),
}


TIED_CASES = {
    "a head": ({"target_modules": ["lm_head"]}, LowRank),
    "an embedding": ({"target_modules": ["embed_tokens"]}, LowRank),
    "tied by PEFT": ({"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, LowRank),
    "saved whole, tied by PEFT": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        Replacement,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "options"), CASES.values(), ids=CASES)
def test_what_peft_saves_is_planned_as_peft_merges_it(make, options, tmp_path):
    checkpoint, header, wrapped = saved(make, tmp_path, **options)
    plan = plan_adapter(checkpoint, header, checkpoint, selection=ALL)
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    stored = {kind: load_file(tmp_path / kind / "model.safetensors") for kind in ("model", "merged")}
    learned = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, start in stored["model"].items():
        change = change_of(plan.grafted[name], start, learned) if name in plan.grafted else torch.zeros_like(start)
        torch.testing.assert_close(
            start + change, stored["merged"][name], msg=lambda text, name=name: f"{name}: {text}"
        )
    assert plan.grafted
    assert not plan.discarded


def change_of(found: LowRank | Replacement, start: Tensor, learned: dict[str, Tensor]) -> Tensor:
    """The change as the plan's own words describe it."""
    if isinstance(found, Replacement):
        return learned[found.tensor.name] - start
    product = found.scaling * (learned[found.b.name] @ learned[found.a.name])  # (out, in)
    change = product.T if found.transposed else product
    if found.magnitude is None:
        return change
    along = 1 - found.magnitude_axis
    lengths = (start + change).norm(dim=along)
    return (start + change) * (learned[found.magnitude.name] / lengths).unsqueeze(along) - start


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("options", "kind"), TIED_CASES.values(), ids=TIED_CASES)
def test_what_peft_saves_of_a_tied_model_changes_the_shared_tensor(options, kind, tmp_path):
    checkpoint, header, _ = saved(lambda: llama(tie_word_embeddings=True), tmp_path, **options)
    plan = plan_adapter(checkpoint, header, checkpoint, selection=ALL)
    assert isinstance(plan.grafted[f"{EMBED}.weight"], kind)
    assert any("ties its head" in remark for remark in plan.remarks) is not bool(plan.twins)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_all_linears_is_taken_whole_by_the_scope_of_linears(tmp_path):
    checkpoint, header, wrapped = saved(lfm2, tmp_path, target_modules="all-linear")
    plan = plan_adapter(checkpoint, header, None)
    assert not plan.discarded
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    stored = {kind: load_file(tmp_path / kind / "model.safetensors") for kind in ("model", "merged")}
    moved = {name for name, start in stored["model"].items() if not torch.equal(start, stored["merged"][name])}
    assert plan.grafted.keys() == moved
    assert any("conv.in_proj" in name for name in moved)


@pytest.mark.filterwarnings("ignore")
def test_fused_experts_are_refused_with_the_way_to_graft_them(tmp_path):
    checkpoint, header, _ = saved(mixtral, tmp_path, target_modules="all-linear")
    reasons = refusal(header, checkpoint)
    assert f"the adapter sets target_parameters: {REFUSED_OPTIONS['target_parameters']}" in reasons
    assert "merge_and_unload() and graft the merged model as a tuned base" in reasons[0]


@pytest.mark.filterwarnings("ignore")
def test_a_converted_pissa_adapter_is_plain_lora(tmp_path):
    wrapped = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    wrapped.save_pretrained(tmp_path / "raw")
    wrapped.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    llama().save_pretrained(tmp_path / "model")
    instruct = read_checkpoint(tmp_path / "model")
    assert "pissa" in refusal(read_adapter(tmp_path / "raw"), instruct)[0]
    assert low_rank(plan_adapter(instruct, read_adapter(tmp_path / "plain"), None), Q).a.shape == (4, 16)


@pytest.mark.filterwarnings("ignore")
def test_a_scope_of_linears_discards_what_peft_trained_beyond_it(tmp_path):
    checkpoint, header, _ = saved(gemma3, tmp_path, target_modules="all-linear")
    plan = plan_adapter(checkpoint, header, None)
    assert plan.grafted
    assert all(is_linear(name) for name in plan.grafted)
    assert any("vision" in remark for remark in plan.remarks)
