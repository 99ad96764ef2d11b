"""Claims that hold for every input, tried on many."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from core.datasets import Conversation, Message, check_file, read_rows
from core.errors import InvalidDataset

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
ANSWER = TEXT.filter(str.strip)

systems = st.builds(Message, st.just("system"), TEXT, st.just(False))
users = st.builds(Message, st.just("user"), TEXT, st.just(False))
answers = st.builds(Message, st.just("assistant"), ANSWER, st.just(True))
muted = st.builds(Message, st.just("assistant"), TEXT, st.just(False))


@st.composite
def conversations(draw):
    """Every conversation that the policy allows."""
    turns = draw(st.lists(st.one_of(users, answers, muted), max_size=4))
    turns.insert(draw(st.integers(0, len(turns))), draw(answers))
    return Conversation((*draw(st.lists(systems, max_size=1)), *turns))


def chat_row(conversation):
    def turn(message):
        weight = {"weight": 0} if message.role == "assistant" and not message.train else {}
        return {"role": message.role, "content": message.content, **weight}

    return {"messages": [turn(message) for message in conversation.messages]}


def jsonl(rows, newline, *, ascii_only):
    return b"".join(json.dumps(row, ensure_ascii=ascii_only).encode() + newline for row in rows)


def outcome(content):
    """The rows that are read, or None where the file is refused; and the report."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "training.jsonl"
        path.write_bytes(content)
        report = check_file(path)
        try:
            return list(read_rows(path)), report
        except InvalidDataset:
            return None, report


def assert_they_agree(content):
    rows, report = outcome(content)
    assert report.ok == (rows is not None)
    assert bool(report.first_errors) == (not report.ok)
    json.dumps(report.as_dict()).encode()
    if rows is not None:
        assert len(rows) == report.rows


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_report(content):
    assert_they_agree(content)


CHAT_FIELDS = ["messages", "role", "content", "weight", "tool_calls", "tools", "type", "text"]
OTHER_FIELDS = ["conversations", "from", "value", "system", "history", "instruction", "input", "output", "chosen"]
FIELDS = st.sampled_from([*CHAT_FIELDS, *OTHER_FIELDS, "prompt", "completion", "label"])
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    TEXT,
    st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "text"]),
)
JSON = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4))


@settings(max_examples=120, deadline=None)
@given(st.lists(st.dictionaries(FIELDS, JSON, max_size=5), max_size=3), st.booleans())
def test_any_json_gives_a_report(rows, as_array):
    assert_they_agree(json.dumps(rows).encode() if as_array else jsonl(rows, b"\n", ascii_only=True))


@settings(max_examples=100, deadline=None)
@given(st.lists(conversations(), min_size=1, max_size=3), st.sampled_from([b"", b"["]), st.data())
def test_cut_or_flipped_files_give_a_report(conversations, start, data):
    content = bytearray(start + jsonl(map(chat_row, conversations), b"\n", ascii_only=False))
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert_they_agree(bytes(content[: data.draw(st.integers(0, len(content)))]))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(conversations(), min_size=1, max_size=4),
    st.sampled_from([b"\n", b"\r\n", b"\n\n \r\n"]),
    st.booleans(),
    st.booleans(),
)
def test_valid_conversations_read_back_equal_from_jsonl(conversations, newline, bom, ascii_only):
    content = jsonl(map(chat_row, conversations), newline, ascii_only=ascii_only)
    rows, report = outcome(b"\xef\xbb\xbf" * bom + content.rstrip(b"\r\n" * bom))
    assert rows == conversations
    assert report.characters == sum(row.characters for row in conversations)


@settings(max_examples=100, deadline=None)
@given(st.lists(conversations(), min_size=1, max_size=4), st.sampled_from([None, 2]), st.booleans())
def test_valid_conversations_read_back_equal_from_an_array(conversations, indent, bom):
    content = json.dumps([chat_row(row) for row in conversations], indent=indent).encode()
    assert outcome(b"\xef\xbb\xbf" * bom + content)[0] == conversations


@settings(max_examples=100, deadline=None)
@given(TEXT.filter(bool), st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=3))
def test_formats_that_say_the_same_read_the_same(system, pairs):
    turns = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    chat = {"messages": [{"role": role, "content": text} for role, text in [("system", system), *turns]]}
    sharegpt = {
        "system": system,
        "conversations": [{"from": "human" if role == "user" else "gpt", "value": text} for role, text in turns],
    }
    *history, (question, answer) = pairs
    alpaca = {"system": system, "history": history, "instruction": question, "output": answer}
    rows, report = outcome(jsonl([chat, sharegpt, alpaca], b"\n", ascii_only=False))
    assert rows is not None
    assert rows[0] == rows[1] == rows[2]
    assert report.warnings["duplicate"] == 2


@given(TEXT, ANSWER)
@settings(max_examples=50, deadline=None)
def test_prompt_and_completion_is_a_chat_of_one_pair(prompt, completion):
    chat = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}
    rows, _ = outcome(jsonl([chat, {"prompt": prompt, "completion": completion}], b"\n", ascii_only=True))
    assert rows is not None
    assert rows[0] == rows[1]
