"""What a model's small files name is the model's own; nothing else is opened for it."""

from __future__ import annotations

import json

import pytest

from core.errors import InvalidInput
from core.own_files import require_own_files


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret.txt").write_text("hf_SECRET\n")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("vocab.json", "tokenizer.4.0.0.json"):
        (folder / name).write_text("{}")
    return folder


def refused(folder):
    with pytest.raises(InvalidInput) as caught:
        require_own_files(folder)
    return caught.value


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("vocab", "/etc/passwd", "/etc/passwd"),
        ("merges", "../secret.txt", "../secret.txt"),
        ("vocab_file", "absent.txt", "absent.txt"),
        ("tokenizer_file", "sub/tokenizer.json", "sub/tokenizer.json"),
        ("gguf_file", "model.gguf", "model.gguf"),
        ("fast_tokenizer_files", ["tokenizer.json", "../tokenizer.4.0.0.json"], "../tokenizer.4.0.0.json"),
        ("spm_file", "..", ".."),
        ("source_spm", "", "''"),
        ("init_inputs", [["/etc/passwd"]], "/etc/passwd"),
        ("sp_model_kwargs", {"model_file": "/etc/passwd"}, "/etc/passwd"),
        ("subfolder", "../..", "../.."),
        ("cache_dir", "/var", "/var"),
    ],
)
def test_a_file_that_is_not_the_models_own_is_refused_with_its_option_and_the_remedy(
    folder, file, option, value, named
):
    (folder / file).write_text(json.dumps({option: value}))
    error = refused(folder)
    assert error.code == "foreign_file"
    assert f"model/{file}" in error.message
    assert named in error.message
    told = next(iter(value)) if isinstance(value, dict) else option
    assert told in error.message
    assert error.hint.startswith(f"Take {told} out of {file}")


@pytest.mark.parametrize(
    "options",
    [
        {"vocab_file": "vocab.json", "merges_file": None, "fast_tokenizer_files": ["tokenizer.4.0.0.json"]},
        {"name_or_path": "/home/maker/model", "special_tokens_map_file": "/home/maker/map.json"},
        {"vocab": {"/etc/passwd": 0}, "merges": ["/ e", "t c"], "init_inputs": []},
        {"vocab": [["/etc", -1.0]], "merges": [["a", "b"]]},
        {"extra_special_tokens": {"end_of_file": "</file>"}, "added_tokens_decoder": {"7": {"content": "/"}}},
        {"eos_token": "</s>", "chat_template": "{{ '/etc/passwd' }}", "tokenizer_class": "LlamaTokenizerFast"},
        {"tokenizer_class": None, "auto_map": None, "sp_model_kwargs": {}},
    ],
)
def test_what_honest_tokenizers_say_is_taken(folder, options):
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    (folder / "special_tokens_map.json").write_text(json.dumps(options))
    require_own_files(folder)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_of_another_kind_of_class_is_refused(folder, file):
    """transformers would look the name up among all of its classes, those that load pickles among them."""
    (folder / file).write_text(json.dumps({"tokenizer_class": "AutoModelForCausalLM"}))
    assert "'AutoModelForCausalLM'" in refused(folder).message


def test_options_as_deep_as_json_goes_are_looked_through(folder):
    deep = '{"a":' * 500 + '{"vocab_file": "/etc/passwd"}' + "}" * 500
    (folder / "tokenizer_config.json").write_text(deep)
    assert "'/etc/passwd'" in refused(folder).message


def test_an_adapter_beside_the_weights_is_refused(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"read by nobody")
    require_own_files(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert refused(folder).code == "adapter_beside_model"
