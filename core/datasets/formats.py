"""One decoded row of any known format becomes a Conversation, or is refused: the field, the value, the remedy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

from core.datasets.conversation import Conversation, Message, Role
from core.datasets.problem import Refused, shown, shown_keys

Format = Literal["chat", "prompt_completion", "alpaca", "sharegpt"]

JsonObject = dict[str, Any]
T = TypeVar("T")


class Row(NamedTuple):
    format: Format
    conversation: Conversation
    #: Fields of the turns that hold something which is not trained on, such as `name`.
    ignored: frozenset[str]


class _Dialect(NamedTuple):
    """The words with which a chat-like format says the same thing."""

    turns: str
    role: str
    content: str
    roles: dict[str, Role]


_CHAT = _Dialect(
    "messages",
    "role",
    "content",
    {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"},
)
_SHAREGPT = _Dialect(
    "conversations",
    "from",
    "value",
    {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
)

_TOOL_ROLES = {"tool", "function", "function_call", "observation"}
_TOOL_FIELDS = {"tool_calls", "function_call", "tools", "functions"}
_PREFERENCE_FIELDS = {
    "chosen",
    "rejected",
    "preferred_output",
    "non_preferred_output",
    "preferred_completion",
    "non_preferred_completion",
}

_ROW_EXAMPLE = (
    'Write rows such as {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}; '
    "prompt/completion, Alpaca (instruction, input, output) and ShareGPT (conversations) are read too"
)
_HISTORY_EXAMPLE = 'Write a list of pairs of strings, the earlier questions and answers: [["…", "…"], ["…", "…"]]'
_NO_TOOLS = "Tool calls and functions are not supported yet: remove these fields and turns, or leave the row out"


def parse(value: Any) -> Row:
    """Read one row; its format is told by its keys, and keys that no format knows (an id, a source) are left alone."""
    if not isinstance(value, dict):
        raise Refused("not_an_object", f"a row must be a JSON object, found {shown(value)}", _ROW_EXAMPLE)
    _refuse_preference(value)
    _refuse_tools(value)
    for key, read in _READERS.items():
        if key in value:
            return read(value)
    raise Refused("unknown_format", f"no known format has {_keys_found(value)}", _ROW_EXAMPLE)


def _chat(row: JsonObject) -> Row:
    return Row("chat", Conversation(_turns(row, _CHAT, ())), _ignored(row["messages"], _CHAT))


def _sharegpt(row: JsonObject) -> Row:
    messages = _turns(row, _SHAREGPT, _system(row))
    return Row("sharegpt", Conversation(messages), _ignored(row["conversations"], _SHAREGPT))


def _prompt_completion(row: JsonObject) -> Row:
    prompt = Message("user", _text(row, "prompt"), train=False)
    return Row(
        "prompt_completion", Conversation((prompt, _answer(_text(row, "completion"), "completion"))), frozenset()
    )


def _alpaca(row: JsonObject) -> Row:
    question = "\n".join(part for part in (_text(row, "instruction"), _optional_text(row, "input")) if part)
    turn = (Message("user", question, train=False), _answer(_text(row, "output"), "output"))
    return Row("alpaca", Conversation((*_system(row), *_history(row), *turn)), frozenset())


_READERS: dict[str, Callable[[JsonObject], Row]] = {
    "messages": _chat,
    "conversations": _sharegpt,
    "instruction": _alpaca,
    "prompt": _prompt_completion,
    "completion": _prompt_completion,
}


def _refuse_preference(row: JsonObject) -> None:
    """Rows of DPO (two answers) and KTO (an answer and a verdict): to train on either answer would be a guess."""
    found = sorted(_PREFERENCE_FIELDS & row.keys())
    if isinstance(row.get("label"), bool) and "completion" in row:
        found.append("label")
    if found:
        raise Refused(
            "preference_row",
            f"this is a preference row (DPO or KTO: it has {', '.join(found)}), and this server trains supervised rows",
            "Send rows with one good answer each, for example the prompt with its preferred answer as `messages`",
            path=found[0],
        )


def _refuse_tools(row: JsonObject) -> None:
    for field in _TOOL_FIELDS & row.keys():
        if row[field]:
            raise Refused("tools_unsupported", f"found {shown(row[field])}", _NO_TOOLS, path=field)


def _turns(row: JsonObject, dialect: _Dialect, before: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns of a chat-like row after `before` (a system message of its own field), held to the policy."""
    turns = row[dialect.turns]
    if not isinstance(turns, list) or not turns:
        found = "it is an empty list" if turns == [] else f"found {shown(turns)}"
        raise Refused("no_turns", f"a list of turns is expected, {found}", _ROW_EXAMPLE, path=dialect.turns)
    messages = (*before, *_each(turns, dialect.turns, partial(_turn, dialect=dialect)))
    _check_system(messages, dialect, len(before))
    _check_something_trains(messages, dialect)
    return messages


def _each(items: list[Any], path: str, read: Callable[[Any], T]) -> list[T]:
    """Read every item of a list; a refusal learns its place only when there is one."""
    results: list[T] = []
    for index, item in enumerate(items):
        try:
            results.append(read(item))
        except Refused as refusal:
            raise refusal.under(f"{path}[{index}]") from None
    return results


def _turn(turn: Any, *, dialect: _Dialect) -> Message:
    if not isinstance(turn, dict):
        remedy = f"Write each turn as an object with `{dialect.role}` and `{dialect.content}`"
        raise Refused("bad_turn", f"a turn must be an object, found {shown(turn)}", remedy)
    role = _role(turn, dialect)
    _refuse_tools(turn)
    content = _content(turn, dialect)
    return _answer(content, dialect.content) if _trains(turn, role) else Message(role, content, train=False)


def _role(turn: JsonObject, dialect: _Dialect) -> Role:
    role = turn.get(dialect.role)
    if isinstance(role, str) and role in dialect.roles:
        return dialect.roles[role]
    if isinstance(role, str) and role in _TOOL_ROLES:
        raise Refused("tools_unsupported", f"found {shown(role)}", _NO_TOOLS, path=dialect.role)
    known = f"Write one of {', '.join(dialect.roles)}, in lower case"
    if dialect.role not in turn:
        raise Refused("missing_field", f"it is missing; the turn has {_keys_found(turn)}", known, path=dialect.role)
    raise Refused("bad_role", f"{shown(role)} is not a role", known, path=dialect.role)


def _content(turn: JsonObject, dialect: _Dialect) -> str:
    content = turn.get(dialect.content)
    if isinstance(content, list) and content:
        return "".join(_each(content, dialect.content, _part))
    return _text(turn, dialect.content)


def _part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        return _text(part, "text")
    kind = part.get("type") if isinstance(part, dict) else part
    raise Refused(
        "content_unsupported",
        f"found a part of the kind {shown(kind)}",
        'Only text is trained on: images, audio and files are not supported yet; write {"type": "text", "text": "…"}',
    )


def _trains(turn: JsonObject, role: Role) -> bool:
    """OpenAI's `weight`: 0 keeps an assistant turn in the context and out of the loss."""
    weight = turn.get("weight")
    if weight is None:
        return role == "assistant"
    if type(weight) is not int or weight not in (0, 1):
        raise Refused("bad_weight", f"found {shown(weight)}", "Write 0 (not trained) or 1 (trained)", path="weight")
    if weight and role != "assistant":
        raise Refused("bad_weight", f"a {role} turn is never trained", "Remove the weight of this turn", path="weight")
    return weight == 1


def _answer(content: str, path: str) -> Message:
    """An assistant turn that trains. An empty one would teach the model to say nothing."""
    if not content or content.isspace():
        remedy = "Fill it in, leave the row out, or in a chat row give the turn the weight 0"
        raise Refused("empty_answer", "the answer to train on is empty", remedy, path=path)
    return Message("assistant", content, train=True)


def _check_system(messages: tuple[Message, ...], dialect: _Dialect, before: int) -> None:
    for index, message in enumerate(messages[1:], start=1):
        if message.role == "system":
            raise Refused(
                "system_not_first",
                "a system message is allowed as the first message only",
                "Move it to the start of the row and join several into one",
                path=f"{dialect.turns}[{index - before}]",
            )


def _check_something_trains(messages: tuple[Message, ...], dialect: _Dialect) -> None:
    if any(message.train for message in messages):
        return
    if any(message.role == "assistant" for message in messages):
        raise Refused(
            "nothing_to_train",
            "every assistant turn has the weight 0, so there is nothing to train on",
            "Give at least one assistant turn the weight 1, or leave the row out",
            path=dialect.turns,
        )
    raise Refused(
        "no_assistant",
        "no turn is the assistant's, so there is nothing to train on",
        "Add the answer that the model should learn, or leave the row out",
        path=dialect.turns,
    )


def _system(row: JsonObject) -> tuple[Message, ...]:
    text = _optional_text(row, "system")
    return (Message("system", text, train=False),) if text else ()


def _history(row: JsonObject) -> list[Message]:
    pairs = row.get("history") or []
    if not isinstance(pairs, list):
        raise Refused("bad_history", f"found {shown(pairs)}", _HISTORY_EXAMPLE, path="history")
    return [message for pair in _each(pairs, "history", _past_turns) for message in pair]


def _past_turns(pair: Any) -> tuple[Message, Message]:
    if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
        raise Refused("bad_history", f"found {shown(pair)}", _HISTORY_EXAMPLE)
    return Message("user", pair[0], train=False), _answer(pair[1], "")


def _text(row: JsonObject, key: str) -> str:
    value = row.get(key)
    if isinstance(value, str):
        return _without_nul(value, key)
    if key not in row:
        raise Refused("missing_field", f"it is missing; found {_keys_found(row)}", f"Add `{key}` as text", path=key)
    raise Refused("not_text", f"text is expected, found {shown(value)}", f"Write `{key}` as a string", path=key)


def _without_nul(value: str, key: str) -> str:
    """PostgreSQL keeps no U+0000, and a job would learn so at its end, when its report quotes the row."""
    if "\0" in value:
        raise Refused("nul_character", "the text holds the character U+0000", "Take it out", path=key)
    return value


def _optional_text(row: JsonObject, key: str) -> str:
    return "" if row.get(key) is None else _text(row, key)


def _ignored(turns: list[JsonObject], dialect: _Dialect) -> frozenset[str]:
    """The fields of turns beyond the known ones that hold something."""
    known = {dialect.role, dialect.content, "weight"}
    wide = [turn for turn in turns if len(turn) > 2]
    return frozenset(key for turn in wide for key in turn.keys() - known if turn[key])


def _keys_found(row: JsonObject) -> str:
    return shown_keys(row) if row else "no keys"
