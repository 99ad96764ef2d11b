"""The first stage of a pair's verdict, on heads made by hand and on small folders."""

from __future__ import annotations

import json
import shutil

import pytest

from core.errors import InvalidInput, Unavailable
from core.fingerprint import model_fingerprint
from core.graft_plan import Selection
from core.job_spec import ModelSource
from core.verdict import Finding, ModelHead, check_head, compare_heads, end_ids, examine, read_head, verdict_of
from tests.core.test_graft_plan import model, prefixed
from tests.core.test_pairs import write_model

SCALED = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}


def head(checkpoint=None, *, generation_config=None, tokenizer_config=None, location="other", **config):
    made = checkpoint or model(eos_token_id=1, **config)
    return ModelHead(
        checkpoint=type(made)(location, made.config, made.tensors),
        generation_config={"eos_token_id": 1} if generation_config is None else generation_config,
        tokenizer_config=tokenizer_config,
    )


def found(base, instruct=None, **options):
    """Levels and codes of what is said of the two."""
    instruct = instruct or head(location="instruct")
    return [(finding.level, finding.code) for finding in compare_heads(base, instruct, **options)]


def test_a_pair_without_a_fault_has_no_findings():
    assert found(head()) == []


def test_every_reason_of_the_plan_refuses_at_once():
    base = head(model(changes={"lm_head.weight": (8, 5)}, dtype="I8", hidden_size=8, model_type="llama"))
    codes = {code for level, code in found(base) if level == "refuse"}
    assert codes >= {"other_architecture", "other_shapes", "quantised_checkpoint"}


def test_harmless_differences_are_notes():
    assert found(head(model(dtype="F32", eos_token_id=1))) == [("note", "other_dtype")]
    assert ("note", "other_prefix") in found(head(model(prefixed("model."), eos_token_id=1)))


def test_patterns_that_match_nothing_refuse():
    selection = Selection(include=("*.q_prj.*",))
    assert {code for _, code in found(head(), selection=selection)} == {"unknown_pattern", "nothing_to_graft"}


def test_a_model_is_no_pair_with_itself():
    assert found(head(location="a/b@1"), head(location="a/b@1")) == [("refuse", "same_model")]


@pytest.mark.parametrize(
    ("base", "instruct"),
    [
        ({"rope_theta": 1e6}, {"rope_theta": 5e6}),
        ({"rope_theta": 1e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}),
        ({}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}},
        ),
    ],
)
def test_other_rotations_warn(base, instruct):
    assert {("warn", "other_rope")} == set(found(head(**base), head(location="i", **instruct)))


@pytest.mark.parametrize(
    ("base", "instruct"),
    [
        ({}, {"rope_theta": 1e4}),  # what is not stated is the family's default
        ({"rope_theta": 1000000}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ({"rope_theta": 5e5, "rope_scaling": SCALED}, {"rope_parameters": {"rope_theta": 5e5, **SCALED}}),
        ({"rope_scaling": None}, {"rope_scaling": {"rope_type": "default"}}),
        (
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
        ),
    ],
)
def test_the_same_rotation_spelled_otherwise_is_the_same(base, instruct):
    assert found(head(**base), head(location="i", **instruct)) == []


def test_a_warning_names_both_values():
    (finding,) = compare_heads(head(rope_theta=1000000.0), head(location="i", rope_theta=5e6))
    assert "rope_theta is 1000000 in base and 5000000 in instruct" in finding.message


@pytest.mark.parametrize(("theta", "level"), [(1e6, "note"), (5e6, "warn")])
def test_other_context_lengths_are_a_warning_where_positions_turn_otherwise(theta, level):
    base = head(max_position_embeddings=32768, rope_theta=1e6)
    instruct = head(location="i", max_position_embeddings=40960, rope_theta=theta)
    finding = next(one for one in compare_heads(base, instruct) if one.code == "other_context_length")
    assert finding.level == level
    assert "32768" in finding.message
    assert "40960" in finding.message


def test_the_ends_of_texts_are_told():
    assert found(head(), head(location="i", generation_config={"eos_token_id": [1, 2]})) == [("note", "other_end_ids")]
    without = ModelHead(head(location="i").checkpoint, None, None)
    assert found(head(), without) == [("note", "no_generation_config")]
    silent = ModelHead(head(model(), location="i").checkpoint, {}, None)
    assert ("warn", "no_end_of_text") in found(head(), silent)


def test_the_generation_config_wins_over_the_config():
    assert end_ids({"eos_token_id": [3, 2]}, {"eos_token_id": 1}) == [2, 3]
    assert end_ids({}, {"text_config": {"eos_token_id": 7}}) == [7]
    assert end_ids(None, {}) == []


@pytest.mark.parametrize("role", ["base", "instruct"])
def test_a_tokenizer_with_code_of_its_own_is_refused(role):
    own = {"auto_map": {"AutoTokenizer": ["own.Own", None]}}
    heads = {"base": head(), "instruct": head(location="i")}
    heads[role] = head(location=role, tokenizer_config=own)
    (finding,) = compare_heads(**heads)
    assert (finding.level, finding.code) == ("refuse", "remote_code_refused")
    assert role in finding.message


def test_a_model_that_is_tuned_itself_is_judged_alone():
    assert check_head(head()) == []
    quantised = head(quantization_config={"quant_method": "awq"})
    assert [finding.code for finding in check_head(quantised)] == ["quantised_checkpoint"]


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, and its weights have 1 layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0, and its weights have 1 layers"),
        ({"num_hidden_layers": 2**40}, f"num_hidden_layers {2**40}, and"),
        ({"hidden_size": 2**40}, f"hidden_size {2**40}, and model.embed_tokens.weight has the shape [8, 4]"),
        ({"hidden_size": None, "n_embd": 5}, "n_embd 5, and model.embed_tokens.weight has the shape [8, 4]"),
        ({"vocab_size": 2**40}, f"vocab_size {2**40}, and lm_head.weight has the shape [8, 4]"),
        ({"vocab_size": "8"}, "vocab_size 8, and"),
        ({"vocab_size": -1}, "vocab_size -1, and"),
        ({"num_attention_heads": 2**40}, f"num_attention_heads {2**40}, and its weights have 112 numbers in all"),
        ({"text_config": {"vocab_size": 9}}, "vocab_size 9, and"),
    ],
)
def test_a_config_that_is_not_of_these_weights_is_refused_with_both_numbers(stated, said):
    one = head(**stated)
    for findings in (check_head(one), compare_heads(one, head(**stated, location="i"))):
        refusing = [finding for finding in findings if finding.level == "refuse"]
        assert {finding.code for finding in refusing} == {"config_contradicts_weights"}
        assert any(said in finding.message for finding in refusing)


@pytest.mark.parametrize(
    ("changes", "stated"),
    [
        ({}, {"vocab_size": 8, "head_dim": 2}),
        ({}, {"num_hidden_layers": None}),
        ({"model.layers.1.mlp.down_proj.weight": (4, 6)}, {"num_nextn_predict_layers": 1}),  # GLM 4.5
        ({"vision_tower.layers.5.mlp.down_proj.weight": (4, 6)}, {}),
        (  # Llama 3.2 Vision
            {"model.embed_tokens.weight": (16, 4)},
            {"text_config": {"model_type": "mllama_text_model", "vocab_size": 8}},
        ),
        (  # the smallest OPT
            {"model.embed_tokens.weight": (8, 2), "lm_head.weight": (8, 2)},
            {"word_embed_proj_dim": 2},
        ),
    ],
)
def test_a_config_of_these_weights_is_taken(changes, stated):
    assert check_head(head(model(changes=changes, eos_token_id=1, **stated))) == []


def test_an_embedding_that_is_no_table_is_refused():
    odd = {"model.embed_tokens.weight": (8,)}
    findings = check_head(head(model(changes=odd, eos_token_id=1)))
    assert [finding.code for finding in findings] == ["config_contradicts_weights"]


def test_the_gravest_finding_gives_the_verdict():
    note, warn, refuse = (Finding(level, "code", "Words.") for level in ("note", "warn", "refuse"))
    assert verdict_of([]) == verdict_of([note]) == "ok"
    assert verdict_of([note, warn]) == "warn"
    assert verdict_of([warn, refuse, note]) == "refuse"


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path):
    return [ModelSource(kind="local", location=str(write_model(tmp_path / name))) for name in ("base", "instruct")]


def examined(sources, tmp_path, **options):
    return examine(*sources, settle=options.pop("settle", lambda source: source), cache=tmp_path, **options)


def test_side_files_are_read_where_they_are(sources, tmp_path):
    assert read_head(sources[0], tmp_path).generation_config is None
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert read_head(sources[0], tmp_path).generation_config == {"eos_token_id": 5}


def test_both_models_that_cannot_be_used_are_named(sources, tmp_path):
    (tmp_path / "base" / "own.py").write_text("")
    (tmp_path / "instruct" / "generation_config.json").write_text("{")
    first = examined(sources, tmp_path)
    assert [finding.code for finding in first.findings] == ["remote_code_refused", "damaged_checkpoint"]
    assert first.heads == {}


def test_what_would_be_loaded_from_elsewhere_is_a_finding_of_each_model(sources, tmp_path):
    (tmp_path / "base" / "adapter_config.json").write_text("{}")
    (tmp_path / "instruct" / "tokenizer_config.json").write_text('{"vocab": "/etc/passwd"}')
    first = examined(sources, tmp_path)
    assert [finding.code for finding in first.findings] == ["adapter_beside_model", "foreign_file"]
    assert "instruct/tokenizer_config.json has vocab '/etc/passwd'" in first.findings[1].message
    assert "Take vocab out" in first.findings[1].remedy


def test_what_settling_refuses_is_a_finding_and_an_away_hub_is_not(sources, tmp_path):
    def outside(source):
        raise InvalidInput("It lies outside.", code="outside", hint="Put it inside.")

    def away(source):
        raise Unavailable("The Hub is away.")

    (finding, _) = examined(sources, tmp_path, settle=outside).findings
    assert finding == Finding("refuse", "outside", "The base model cannot be used: It lies outside.", "Put it inside.")
    with pytest.raises(Unavailable):
        examined(sources, tmp_path, settle=away)


def test_nothing_of_base_matters_to_a_model_that_is_tuned_itself(sources, tmp_path):
    shutil.rmtree(tmp_path / "base")
    first = examined(sources, tmp_path, without_base=True)
    assert first.heads.keys() == {"instruct"}
    assert verdict_of(first.findings) == "warn"  # the tiny model names no eos


def test_a_folder_has_another_fingerprint_once_anything_in_it_changed(sources, tmp_path):
    source = sources[0]
    checkpoint = read_head(source, tmp_path).checkpoint
    seen = {model_fingerprint(source, checkpoint)}
    (tmp_path / "base" / "README.png").write_text("not of the model")
    assert model_fingerprint(source, checkpoint) in seen
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps({}))
    seen.add(model_fingerprint(source, checkpoint))
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    seen.add(model_fingerprint(source, checkpoint))
    assert len(seen) == 3
    hub = ModelSource(kind="hub", location="a/b", revision="f" * 40)
    assert model_fingerprint(hub, checkpoint) == f"a/b@{'f' * 40}"
