"""Only what an assistant has to produce carries loss, whatever the template looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.datasets import Conversation, Message
from core.errors import InvalidDataset, InvalidInput, PairRefused
from tests.worker.steps import tiny
from worker.chat_text import (
    IGNORED,
    ChatText,
    EncodedRow,
    Row,
    encode_rows,
    require_rows,
    require_same_tokens,
    split_rows,
)

LLAMA = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '</s>' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
QWEN = (
    "{% set ns = namespace(last=-1) %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' %}"
    "{% set thoughts = '' %}"
    "{% if '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thoughts) %}"
    "{{ '<think>\\n' + thoughts + '\\n</think>\\n\\n' + content.lstrip('\\n') }}{% else %}{{ content }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + content }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
#: Template, its marks, the mark that ends an answer, whether it strips contents.
STYLES = {
    "chatml": (tiny.CHATML, ["<|end|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", False),
    "llama": (
        LLAMA,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        True,
    ),
    "gemma": (GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", True),
    "mistral": (MISTRAL, ["<s>", "[INST]", "[/INST]", "</s>"], "</s>", False),
    "qwen": (QWEN, ["<think>", "</think>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", False),
}
CHATS = {name: ChatText(tiny.make_tokenizer(template, marks=marks)) for name, (template, marks, _, _) in STYLES.items()}
USER, SILENT, SPOKEN = "user", "silent", "spoken"


def talk(*turns: tuple[str, str]) -> Row:
    """`silent` is an assistant turn without loss."""
    roles = {
        USER: ("user", False),
        SILENT: ("assistant", False),
        SPOKEN: ("assistant", True),
        "system": ("system", False),
    }
    return Row(1, Conversation(tuple(Message(roles[kind][0], text, roles[kind][1]) for kind, text in turns)))  # type: ignore[arg-type]


def trained_runs(chat: ChatText, row: EncodedRow) -> list[str]:
    """The text of each unbroken run of tokens with loss."""
    runs: list[list[int]] = [[]]
    for label in row.labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [chat.tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("style", STYLES)
def test_only_trained_answers_and_their_end_marks_carry_loss(style):
    row = talk(
        (USER, "one"), (SPOKEN, "First."), (USER, "two"), (SILENT, "Second."), (USER, "three"), (SPOKEN, "Third.")
    )
    encoded, _ = CHATS[style].encode(row, 1000)
    end = STYLES[style][2]
    assert trained_runs(CHATS[style], encoded) == [f"First.{end}", f"Third.{end}"]


texts = st.text(st.characters(exclude_categories=["Cs", "Co"], exclude_characters="<>[]|"), min_size=1, max_size=12)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=3))
def test_decoded_labels_are_contents_and_end_marks(style, turns):
    row = talk(*[part for asked, said, loud in turns for part in ((USER, asked), (SPOKEN if loud else SILENT, said))])
    encoded, _ = CHATS[style].encode(row, 10_000)
    _, _, end, strips = STYLES[style]
    said = [(said.strip() if strips else said) + end for _, said, loud in turns if loud]
    if style == "qwen" and turns[-1][2]:
        said[-1] = turns[-1][1].lstrip("\n") + end
    assert trained_runs(CHATS[style], encoded) == said


def test_an_empty_think_block_stays_out_of_the_loss():
    encoded, _ = CHATS["qwen"].encode(talk((USER, "hi"), (SPOKEN, "Hello")), 1000)
    assert "<think>" in CHATS["qwen"].tokenizer.decode(encoded.input_ids)
    assert trained_runs(CHATS["qwen"], encoded) == ["Hello<|im_end|>"]


def test_thoughts_that_belong_to_an_answer_are_learned():
    said = "<think>\nhm\n</think>\n\nHello"
    encoded, _ = CHATS["qwen"].encode(talk((USER, "hi"), (SPOKEN, said)), 1000)
    assert trained_runs(CHATS["qwen"], encoded) == [f"{said}<|im_end|>"]


def test_an_answer_equal_to_its_question_is_told_apart():
    encoded, _ = CHATS["chatml"].encode(talk((USER, "same"), (SPOKEN, "same")), 1000)
    assert encoded.labels.index(ord("s") - ord("!")) > len(encoded.labels) // 2


def test_the_question_never_changes_which_labels_count():
    one, _ = CHATS["chatml"].encode(talk((USER, "aaaa"), (SPOKEN, "x")), 1000)
    other, _ = CHATS["chatml"].encode(talk((USER, "bbbb"), (SPOKEN, "x")), 1000)
    assert one.labels == other.labels
    assert one.input_ids != other.input_ids


def test_the_prompt_is_the_start_of_the_text_that_is_trained_on():
    row = talk((USER, "hi"), (SPOKEN, "Hello"))
    for chat in (CHATS["chatml"], CHATS["llama"], CHATS["gemma"], CHATS["qwen"]):
        encoded, _ = chat.encode(row, 1000)
        prompt = chat.prompt_ids(row.conversation.messages[:1])
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels[len(prompt) - 1 : len(prompt) + 1] == [IGNORED, encoded.input_ids[len(prompt)]]


@pytest.mark.parametrize("style", ["gemma", "mistral"])
def test_a_role_that_the_format_lacks_is_refused_with_the_row(style):
    with pytest.raises(InvalidInput, match=r"Row 1 .*support"):
        CHATS[style].encode(talk(("system", "Be kind"), (USER, "hi"), (SPOKEN, "Hello")), 1000)


def test_a_template_that_rewrites_answers_is_refused_with_the_row():
    template = tiny.CHATML.replace("message['content']", "message['content'] | upper")
    with pytest.raises(InvalidInput, match=r"Row 1 .*turn 2"):
        ChatText(tiny.make_tokenizer(template)).encode(talk((USER, "hi"), (SPOKEN, "Hello")), 1000)


def test_long_rows_are_cut_and_rows_without_a_trained_token_are_dropped():
    rows = [
        talk((USER, "hi"), (SPOKEN, "Hello")),
        talk((USER, "x" * 99), (SPOKEN, "y")),
        talk((USER, "a"), (SILENT, "b")),
    ]
    encoded = encode_rows(CHATS["chatml"], rows, max_length=25)
    assert (len(encoded.rows), encoded.cut, encoded.dropped) == (1, 2, 2)
    assert len(encoded.rows[0].input_ids) == len(encoded.rows[0].labels) == 25


def test_a_file_that_teaches_nothing_is_refused():
    with pytest.raises(InvalidDataset, match=r"within 4 tokens \(1 rows"):
        require_rows(encode_rows(CHATS["chatml"], [talk((USER, "hi"), (SPOKEN, "Hello"))], max_length=4), 4)


def test_a_tokenizer_with_other_ids_is_refused(tmp_path):
    tiny.make_tokenizer(None, first="z").save_pretrained(tmp_path)
    with pytest.raises(PairRefused, match="other ids"):
        require_same_tokens(CHATS["chatml"], tmp_path, [])


def test_a_tokenizer_that_splits_text_otherwise_is_refused(tmp_path):
    tokenizer = tiny.make_tokenizer(None)
    tokenizer.add_tokens(["Hello"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(PairRefused, match="row 1"):
        require_same_tokens(CHATS["chatml"], tmp_path, [talk((USER, "hi"), (SPOKEN, "Hello"))])


def test_base_may_lack_the_chat_marks_and_the_tokenizer_altogether(tmp_path):
    tiny.make_tokenizer(None, marks=["<|end|>"]).save_pretrained(tmp_path / "base")
    require_same_tokens(CHATS["chatml"], tmp_path / "base", [talk((USER, "hi"), (SPOKEN, "Hello"))])
    require_same_tokens(CHATS["chatml"], tmp_path / "empty", [talk((USER, "hi"), (SPOKEN, "Hello"))])


def test_an_instruct_model_without_a_chat_template_is_refused(tmp_path):
    tiny.make_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match="no chat template"):
        ChatText.load(tmp_path)


def test_an_instruct_model_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="no tokenizer") as caught:
        ChatText.load(tmp_path)
    assert "compare" in caught.value.hint


def held_out(folder: Path, count: int, **changes: Any) -> tuple[int, list[int]]:
    spec = tiny.make_spec(**changes)
    split = split_rows(tiny.make_workspace(folder, folder, spec, tiny.make_rows(count)), spec)
    numbers = [row.number for row in split.held_out]
    assert sorted(numbers + [row.number for row in split.training]) == list(range(1, count + 1))
    return len(split.training), numbers


def test_the_held_out_share_follows_the_seed(tmp_path):
    trained, drawn = held_out(tmp_path / "a", 40, holdout_ratio=0.1, seed=1)
    assert (trained, len(drawn)) == (36, 4)
    assert drawn == held_out(tmp_path / "b", 40, holdout_ratio=0.1, seed=1)[1]
    assert drawn != held_out(tmp_path / "c", 40, holdout_ratio=0.1, seed=2)[1]


@pytest.mark.parametrize(("rows", "ratio", "drawn"), [(10, 0.01, 1), (9, 0.01, 0), (10, 0.0, 0), (10, 0.99, 9)])
def test_a_small_share_holds_out_one_row_of_ten(tmp_path, rows, ratio, drawn):
    assert len(held_out(tmp_path, rows, holdout_ratio=ratio)[1]) == drawn


def test_a_validation_file_is_held_out_whole(tmp_path):
    spec = tiny.make_spec(holdout_ratio=0.5)
    workspace = tiny.make_workspace(tmp_path, tmp_path, spec, tiny.make_rows(12))
    tiny.write_rows(workspace.validation, tiny.make_rows(3))
    split = split_rows(workspace, spec)
    assert (len(split.training), len(split.held_out)) == (12, 3)
