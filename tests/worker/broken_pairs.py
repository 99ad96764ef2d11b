"""A small pair with nothing wrong, and the same pair broken in one way after another."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.worker.steps.tiny import CHATML, make_model, make_tokenizer, save_model

#: Ends an answer with a letter that not every tokenizer has.
TICKED = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '✓' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
EMBEDDING = "model.embed_tokens.weight"
KEY = "model.layers.0.self_attn.k_proj.weight"


class Folders(NamedTuple):
    base: Path
    instruct: Path


def make_pair(folder: Path) -> Folders:
    """Base, and an instruct model a light touch apart. Base has instruct's marks, and no template."""
    base = save_model(folder / "base", make_model(0), template=None, dtype=torch.float32)
    model = make_model(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-4)
    return Folders(base, save_model(folder / "instruct", model, dtype=torch.float32))


def copied(pair: Folders, folder: Path) -> Folders:
    return Folders(*(shutil.copytree(one, folder / one.name) for one in pair))


def configure(folder: Path, file: str = "config.json", **changes: Any) -> None:
    """Set fields of a JSON file; None takes one away."""
    content = {**json.loads((folder / file).read_bytes()), **changes}
    (folder / file).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights in their file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def give_tokenizer(folder: Path, template: str | None = None, **options: Any) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    make_tokenizer(template, **options).save_pretrained(folder)


def write_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)


class Case(NamedTuple):
    verdict: str
    #: Codes of the findings that make the verdict; of an `ok` one those of all.
    codes: frozenset[str]
    damage: Callable[[Folders], None]


def case(verdict: str, *codes: str) -> Callable[[Callable[[Folders], None]], Callable[[Folders], None]]:
    def keep(damage: Callable[[Folders], None]) -> Callable[[Folders], None]:
        CASES[damage.__name__] = Case(verdict, frozenset(codes), damage)
        return damage

    return keep


CASES: dict[str, Case] = {}


@case("ok", "other_special_tokens", "similarity")
def nothing_is_wrong(pair: Folders) -> None:
    configure(pair.base, "tokenizer_config.json", eos_token="<|end|>")


@case("refuse", "other_architecture", "missing_tensors")
def another_architecture(pair: Folders) -> None:
    configure(pair.base, model_type="llama")
    rewrite(pair.base, lambda tensors: tensors.pop("model.layers.0.self_attn.q_norm.weight"))


@case("refuse", "missing_tensors")
def a_tensor_is_missing(pair: Folders) -> None:
    rewrite(pair.base, lambda tensors: tensors.pop(KEY))


@case("refuse", "other_shapes")
def a_tensor_has_another_shape(pair: Folders) -> None:
    rewrite(pair.base, lambda tensors: tensors.update({KEY: tensors[KEY][:8].clone()}))


@case("refuse", "other_vocabulary")
def another_vocabulary(pair: Folders) -> None:
    configure(pair.base, vocab_size=400)
    rewrite(pair.base, lambda tensors: tensors.update({EMBEDDING: torch.randn(400, 32)}))


@case("refuse", "quantised_checkpoint")
def a_quantised_base(pair: Folders) -> None:
    configure(pair.base, quantization_config={"quant_method": "gptq", "bits": 4})


@case("refuse", "remote_code_refused")
def code_in_the_config(pair: Folders) -> None:
    configure(pair.instruct, auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})


@case("refuse", "remote_code_refused")
def code_in_the_folder(pair: Folders) -> None:
    (pair.base / "modeling_own.py").write_text("raise SystemExit\n")


@case("refuse", "remote_code_refused")
def code_of_the_tokenizer(pair: Folders) -> None:
    configure(pair.instruct, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})


@case("refuse", "foreign_file")
def a_vocabulary_from_elsewhere(pair: Folders) -> None:
    configure(pair.instruct, "tokenizer_config.json", vocab="/etc/passwd")


@case("refuse", "foreign_file")
def other_weights_than_those_that_are_checked(pair: Folders) -> None:
    configure(pair.base, transformers_weights="other.safetensors")


@case("refuse", "adapter_beside_model")
def an_adapter_beside_the_weights(pair: Folders) -> None:
    (pair.base / "adapter_config.json").write_text("{}")


@case("refuse", "config_contradicts_weights")
def a_layer_that_is_not_stored(pair: Folders) -> None:
    for folder in pair:
        configure(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3)


@case("refuse", "config_contradicts_weights")
def an_embedding_that_is_no_table(pair: Folders) -> None:
    for folder in pair:
        rewrite(folder, lambda tensors: tensors.update({EMBEDDING: torch.randn(259)}))


@case("refuse", "config_contradicts_weights")
def weights_without_a_number(pair: Folders) -> None:
    for folder in pair:
        rewrite(folder, lambda tensors: tensors.update({name: one[:0].clone() for name, one in tensors.items()}))


@case("refuse", "no_padding")
def a_tokenizer_with_neither_eos_nor_pad(pair: Folders) -> None:
    configure(pair.instruct, "tokenizer_config.json", eos_token=None, pad_token=None)


@case("warn", "turn_without_end")
def a_turn_that_ends_in_what_nobody_knows(pair: Folders) -> None:
    letters = {letter: position for position, letter in enumerate(sorted(set(string.printable)))}
    for folder, template in ((pair.base, None), (pair.instruct, TICKED)):
        give_tokenizer(folder)
        tokenizer = Tokenizer(BPE(vocab=letters, merges=[]))
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="~", pad_token="^", chat_template=template
        ).save_pretrained(folder)


@case("refuse", "other_tokens", "other_ids")
def moved_ids(pair: Folders) -> None:
    give_tokenizer(pair.base, first="z")


@case("refuse", "no_chat_template")
def no_template(pair: Folders) -> None:
    give_tokenizer(pair.instruct, None)


@case("refuse", "damaged_checkpoint")
def a_cut_file(pair: Folders) -> None:
    weights = pair.instruct / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


@case("refuse", "only_one_tied", "missing_tensors")
def a_head_that_only_base_has(pair: Folders) -> None:
    configure(pair.base, tie_word_embeddings=False)
    rewrite(pair.base, lambda tensors: tensors.update({"lm_head.weight": torch.randn(259, 32)}))


@case("refuse", "untied_head")
def a_tied_head_that_is_another_tensor(pair: Folders) -> None:
    rewrite(pair.instruct, lambda tensors: tensors.update({"lm_head.weight": torch.randn(259, 32)}))


@case("warn", "untrained_rows")
def untrained_marks(pair: Folders) -> None:
    rewrite(pair.base, lambda tensors: tensors[EMBEDDING][257:].zero_())


@case("warn", "other_rope", "other_context_length")
def other_positions(pair: Folders) -> None:
    rope = {"rope_type": "default", "rope_theta": 5_000_000.0}
    configure(pair.instruct, rope_parameters=rope, max_position_embeddings=1024)


@case("refuse", "broken_tokenizer")
def a_tokenizer_that_is_no_json(pair: Folders) -> None:
    (pair.instruct / "tokenizer.json").write_text('{"version": "1.0", "model": ')


@case("refuse", "broken_tokenizer")
def a_tokenizer_of_another_kind(pair: Folders) -> None:
    configure(pair.base, "tokenizer.json", model={"type": "Nonsense", "vocab": {}})


@case("refuse", "broken_chat_template")
def a_template_that_does_not_parse(pair: Folders) -> None:
    write_template(pair.instruct, "{% for message in messages %}")


@case("refuse", "broken_chat_template")
def a_template_that_reaches_out(pair: Folders) -> None:
    write_template(pair.instruct, "{{ ''.__class__.__mro__[1].__subclasses__() }}")


@case("warn", "system_role_refused")
def a_template_without_a_system_role(pair: Folders) -> None:
    guard = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    write_template(pair.instruct, guard + CHATML)


@case("warn", "turn_end_is_no_eos")
def a_turn_that_ends_with_no_eos(pair: Folders) -> None:
    configure(pair.instruct, "generation_config.json", eos_token_id=256)


@case("refuse", "token_unknown_to_base")
def marks_that_base_has_no_rows_for(pair: Folders) -> None:
    configure(pair.base, vocab_size=256)
    rewrite(pair.base, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][:256].clone()}))
    give_tokenizer(pair.base, marks=["~"])


@case("refuse", "unknown_architecture")
def an_architecture_of_nobody(pair: Folders) -> None:
    for folder in pair:
        configure(folder, model_type="nonsense")


@case("refuse", "not_safetensors")
def pickles(pair: Folders) -> None:
    (pair.base / "model.safetensors").rename(pair.base / "pytorch_model.bin")


@case("warn", "same_weights")
def the_same_weights(pair: Folders) -> None:
    shutil.copy(pair.base / "model.safetensors", pair.instruct / "model.safetensors")


@case("refuse", "not_finite")
def a_weight_that_is_no_number(pair: Folders) -> None:
    rewrite(pair.base, lambda tensors: tensors[KEY].fill_(float("nan")))
