"""What each format says, and what is refused with which words. B-numbers are those of the reliability notes."""

from __future__ import annotations

from typing import Any

import pytest

from core.datasets import Conversation, Message, check_file, read_rows
from core.errors import InvalidDataset

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
HI = Message("user", "Hi", train=False)
HELLO = Message("assistant", "Hello", train=True)
BRIEF = Message("system", "Be brief", train=False)


def chat(*turns: Any):
    return {"messages": list(turns)}


def answer(**fields: Any):
    return chat(USER, ANSWER | fields)


def asked(content):
    return chat({"role": "user", "content": content}, ANSWER)


READ = {
    "chat": (chat(USER, ANSWER), (HI, HELLO)),
    "chat with a system message": (chat({"role": "system", "content": "Be brief"}, USER, ANSWER), (BRIEF, HI, HELLO)),
    "developer is read as system": (
        chat({"role": "developer", "content": "Be brief"}, USER, ANSWER),
        (BRIEF, HI, HELLO),
    ),
    "weight 0 turns a turn off": (
        chat(USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}),
        (HI, Message("assistant", "Hello", train=False), HI, HELLO),
    ),
    "weight 0 on a user turn changes nothing": (chat(USER | {"weight": 0}, ANSWER), (HI, HELLO)),
    "text parts are joined": (
        asked([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]),
        (HI, HELLO),
    ),
    "nulls that SDKs write": (answer(tool_calls=None, refusal=None, weight=None) | {"tools": []}, (HI, HELLO)),
    "fields of the row's owner": (chat(USER, ANSWER) | {"id": 7, "source": "wiki", "prompt": 3}, (HI, HELLO)),
    "prompt and completion": ({"prompt": "Hi", "completion": "Hello"}, (HI, HELLO)),
    "alpaca": ({"instruction": "Hi", "output": "Hello"}, (HI, HELLO)),
    "alpaca with input": (
        {"instruction": "Say", "input": "Hi", "output": "Hello"},
        (Message("user", "Say\nHi", train=False), HELLO),
    ),
    "alpaca with system and history": (
        {"instruction": "Hi", "input": None, "output": "Hello", "system": "Be brief", "history": [["Hi", "Hello"]]},
        (BRIEF, HI, HELLO, HI, HELLO),
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, (HI, HELLO)),
    "sharegpt with a system field": (
        {"system": "Be brief", "conversations": [{"from": "user", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        (BRIEF, HI, HELLO),
    ),
}


@pytest.mark.parametrize(("row", "messages"), READ.values(), ids=READ.keys())
def test_reads(row, messages, write_rows):
    assert list(read_rows(write_rows(row))) == [Conversation(messages)]


REFUSED = {
    "B34 row is a number": (3, "line 1: a row must be a JSON object, found the number 3"),
    "B34 row is a string": ("x", "line 1: a row must be a JSON object, found 'x'"),
    "B34 row is null": (None, "line 1: a row must be a JSON object, found null"),
    "B35 no messages": ({"id": 1, "text": "x"}, "line 1: no known format has the keys 'id', 'text'"),
    "B35 an empty object": ({}, "line 1: no known format has no keys"),
    "B35 messages is empty": (chat(), "line 1, messages: a list of turns is expected, it is an empty list"),
    "B35 messages is null": ({"messages": None}, "messages: a list of turns is expected, found null"),
    "B35 messages is an object": ({"messages": USER}, "found an object with the keys 'role', 'content'"),
    "B35 a turn is a string": (chat(USER, "Hello"), "messages[1]: a turn must be an object, found 'Hello'"),
    "B36 role is unknown": (chat(USER, ANSWER | {"role": "bot"}), "messages[1].role: 'bot' is not a role"),
    "B36 role in the wrong case": (chat(USER, ANSWER | {"role": "Assistant"}), "'Assistant' is not a role"),
    "B36 role is missing": (chat({"content": "Hi"}), "messages[0].role: it is missing; the turn has the keys"),
    "B36 role is a list": (chat(USER | {"role": ["user"]}), "messages[0].role: a list of 1 is not a role"),
    "B37 content is null": (asked(None), "messages[0].content: text is expected, found null"),
    "B37 content is a number": (asked(3.5), "messages[0].content: text is expected, found the number 3.5"),
    "B37 content is nested": (asked({"a": {}}), "messages[0].content: text is expected, found an object"),
    "B37 content is an empty list": (asked([]), "messages[0].content: text is expected, found a list of 0"),
    "B37 content is missing": (chat({"role": "user"}), "messages[0].content: it is missing; found the keys 'role'"),
    "B37 content is an image": (
        asked([{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]),
        "messages[0].content[1]: found a part of the kind 'image_url'. Only text is trained on",
    ),
    "B37 a part without text": (asked([{"type": "text"}]), "messages[0].content[0].text: it is missing"),
    "B38 only system": (chat({"role": "system", "content": "x"}), "messages: no turn is the assistant's"),
    "B38 no assistant": (chat(USER), "messages: no turn is the assistant's"),
    "B40 all turns have weight 0": (answer(weight=0), "messages: every assistant turn has the weight 0"),
    "B40 the answer is empty": (answer(content=" \n"), "messages[1].content: the answer to train on is empty"),
    "weight is 0.5": (answer(weight=0.5), "messages[1].weight: found the number 0.5. Write 0 (not trained) or 1"),
    "weight is true": (answer(weight=True), "messages[1].weight: found true"),
    "weight 1 on a user turn": (chat(USER | {"weight": 1}, ANSWER), "messages[0].weight: a user turn is never trained"),
    "system in the middle": (
        chat(USER, {"role": "system", "content": "x"}, ANSWER),
        "messages[1]: a system message is allowed as the first message only",
    ),
    "tool calls": (answer(tool_calls=[{"id": "a"}]), "messages[1].tool_calls: found a list of 1. Tool calls and"),
    "tool role": (chat(USER, ANSWER, {"role": "tool", "content": "x"}), "messages[2].role: found 'tool'. Tool calls"),
    "tools of the row": (chat(USER, ANSWER) | {"tools": [{}]}, "line 1, tools: found a list of 1. Tool calls and"),
    "preference, OpenAI": (
        {"input": {}, "preferred_output": [], "non_preferred_output": []},
        "this is a preference row (DPO or KTO: it has non_preferred_output, preferred_output), and this server trains",
    ),
    "preference, TRL": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "(DPO or KTO: it has chosen, rejected)"),
    "preference, KTO": ({"prompt": "a", "completion": "b", "label": False}, "(DPO or KTO: it has label)"),
    "prompt is a list": ({"prompt": [USER], "completion": "x"}, "prompt: text is expected, found a list of 1"),
    "completion is missing": ({"prompt": "x"}, "line 1, completion: it is missing; found the keys 'prompt'. Add"),
    "prompt is missing": ({"completion": "x"}, "line 1, prompt: it is missing"),
    "alpaca without output": ({"instruction": "x", "response": "y"}, "output: it is missing; found the keys"),
    "alpaca with an empty output": ({"instruction": "x", "output": ""}, "output: the answer to train on is empty"),
    "alpaca with a bad history": ({"instruction": "x", "output": "y", "history": [["a"]]}, "history[0]: found a list"),
    "alpaca with an empty past answer": (
        {"instruction": "x", "output": "y", "history": [["a", ""]]},
        "history[0]: the answer to train on is empty",
    ),
    "sharegpt role": (
        {"conversations": [{"from": "alien", "value": "x"}]},
        "conversations[0].from: 'alien' is not a role. Write one of system, human",
    ),
    "sharegpt with two systems": (
        {"system": "x", "conversations": [{"from": "system", "value": "y"}, {"from": "gpt", "value": "z"}]},
        "conversations[0]: a system message is allowed as the first message only",
    ),
    "sharegpt observation": ({"conversations": [{"from": "observation", "value": "x"}]}, "Tool calls and functions"),
    "a long value is cut": (answer(role="x" * 1000), f"'{'x' * 40}'… is not a role"),
    "control characters are escaped": (answer(role="\0"), r"'\x00' is not a role"),
}


@pytest.mark.parametrize(("row", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(row, words, write_rows):
    report = check_file(write_rows(row))
    assert not report.ok
    assert words in report.first_errors[0].sentence
    assert report.first_errors[0].remedy
    assert report.summary.startswith("1 of 1 row cannot be trained on; the first is line 1")


@pytest.mark.parametrize(("row", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_reader_and_check_agree(row, words, write_rows):
    path = write_rows(row)
    problem = check_file(path).first_errors[0]
    with pytest.raises(InvalidDataset) as raised:
        list(read_rows(path))
    assert raised.value.message == f"The training file cannot be used: {problem.located}."
    assert raised.value.hint == problem.remedy
    assert raised.value.code == "invalid_training_file"
