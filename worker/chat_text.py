"""Conversations as the token ids and labels that both models of a pair are trained and measured on.

Text is always written in instruct's chat format and with instruct's tokenizer, for base as well: only then is the
change that base learns a change that instruct understands. Loss belongs to what a model has to produce itself: the
content of the trained assistant turns and the mark that ends each of them, never to the header before it.

Few templates say where an assistant turn's content stands, so it is found from outside: written once more with the
content replaced by a mark that occurs nowhere else, the text shows where the content starts; cut after that turn, it
shows what ends the turn. What was found is checked against the real text, so a template that plays other tricks is
refused instead of being trained on wrong tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer

from core.datasets import Conversation, Message, read_rows
from core.errors import InvalidDataset, InvalidInput, PairRefused
from core.job_spec import JobSpec
from core.own_files import require_own_files
from core.resolve import held_out_count
from worker.workspace import Workspace

#: The label of a token without loss, as torch's cross entropy has it.
IGNORED = -100
#: Stands for a turn's content. Private-use letters, so that it neither occurs in data nor is changed by a template.
_SENTINEL = "\ue5f1\ue5f2\ue5f3"
#: Rows on which two tokenizers are compared besides their whole vocabularies.
_ROWS_TO_COMPARE = 100

Span = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """A conversation with its place in its file, counted from 1."""

    number: int
    conversation: Conversation


@dataclass(frozen=True)
class Split:
    training: list[Row]
    #: Rows that no model is trained on.
    held_out: list[Row]


@dataclass(frozen=True)
class EncodedRow:
    row: Row
    input_ids: list[int]
    #: As long as `input_ids`: the id itself where it counts, IGNORED elsewhere.
    labels: list[int]

    @property
    def labelled(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class EncodedRows:
    rows: list[EncodedRow]
    #: Rows longer than the limit, cut at their end.
    cut: int
    #: Rows of which no token counts, left out.
    dropped: int


def split_rows(workspace: Workspace, spec: JobSpec) -> Split:
    """The rows to train on and those held out: the validation file, or else a seeded share of the training rows."""
    rows = read_set(workspace.training)
    if workspace.validation.exists():
        return Split(rows, read_set(workspace.validation))
    held_out = _draw(len(rows), spec.holdout_ratio, spec.seed)
    return Split(
        training=[row for row in rows if row.number not in held_out],
        held_out=[row for row in rows if row.number in held_out],
    )


def read_set(path: Path) -> list[Row]:
    """The rows of a file that is only measured on."""
    return _numbered(read_rows(path))


def _numbered(conversations: Iterable[Conversation]) -> list[Row]:
    return [Row(number, conversation) for number, conversation in enumerate(conversations, start=1)]


def _draw(rows: int, ratio: float, seed: int) -> set[int]:
    count = held_out_count(rows, ratio)
    return set(random.Random(f"holdout {seed}").sample(range(1, rows + 1), count))  # noqa: S311 - no secret


class ChatText:
    """Instruct's chat format and tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, instruct: Path, *, base: Path | None = None) -> ChatText:
        """`base` is read the same ids: where it lacks the padding's row, the end mark pads, as any id may.

        InvalidInput: the model lacks what chats are written with, or names files that are not its own.
        """
        if not _has_tokenizer(instruct):
            raise _no_chats("tokenizer")
        tokenizer = _load_tokenizer(instruct)
        if tokenizer.chat_template is None:
            raise _no_chats("chat template")
        chat = cls(tokenizer)
        chat.require_padding()
        if base is not None and chat.pad_id >= _embedding_rows(base):
            tokenizer.pad_token = tokenizer.eos_token
            chat.require_padding()
        return chat

    @property
    def pad_id(self) -> int:
        """Any id will do where attention never looks, so the end mark serves a tokenizer without padding."""
        tokenizer = self.tokenizer
        return cast(int, tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def require_padding(self) -> None:
        """InvalidInput: there is no `pad_id`."""
        if self.tokenizer.pad_token_id is None and self.tokenizer.eos_token_id is None:
            raise InvalidInput(
                "The instruct model's tokenizer has no eos token, and no pad token that the tuned model knows, so rows "
                "of several lengths cannot be trained together.",
                code="no_padding",
                param="model",
                hint="Add an eos_token to the model's tokenizer_config.json, as its own release has it.",
            )

    def write(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The conversation as text; `ask` adds the header of the answer that is to be generated.

        Thinking is off throughout: data without thoughts must not teach a hybrid model that thoughts are empty.
        """
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return cast(
            str,
            self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask, enable_thinking=False),
        )

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        return self.ids(self.write(messages, ask=True))

    def ids(self, text: str) -> list[int]:
        return cast("list[int]", self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def marks_in(self, rows: Iterable[EncodedRow]) -> list[int]:
        """The tokens in the rows that were added to the vocabulary as such: the chat format's marks."""
        used = {token for row in rows for token in row.input_ids}
        return sorted(used.intersection(self.tokenizer.added_tokens_decoder))

    def encode(self, row: Row, max_length: int) -> tuple[EncodedRow, bool]:
        """The row, cut to `max_length` tokens, and whether anything was cut off."""
        text, spans = self.trained_spans(row)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        labels = [
            token if any(start <= first < end for start, end in spans) else IGNORED
            for token, (first, _) in zip(ids, offsets, strict=True)
        ]
        return EncodedRow(row, ids[:max_length], labels[:max_length]), len(ids) > max_length

    def trained_spans(self, row: Row) -> tuple[str, list[Span]]:
        """The row's text and where in it the trained answers stand, each with the mark that ends it."""
        messages = row.conversation.messages
        try:
            text = self.write(messages)
            spans = [self._span(text, messages, turn) for turn, message in enumerate(messages) if _is_trained(message)]
        except (TemplateError, _NotFoundError) as error:
            raise InvalidInput(
                f"Row {row.number} cannot be written in the instruct model's chat format: {error}",
                code="chat_format_refused",
                hint="Check the order of roles in this row; some formats know no system role.",
            ) from error
        return text, spans

    def _span(self, text: str, messages: Sequence[Message], turn: int) -> Span:
        content = messages[turn].content
        marked = [*messages[:turn], Message(role="assistant", content=_SENTINEL, train=True), *messages[turn + 1 :]]
        marked_text = self.write(marked)
        start = _shared_start(text, marked_text)
        # A template that takes thoughts out of the content it is given parts from the marked text inside the content.
        reach = 0 if marked_text.startswith(_SENTINEL, start) else len(content)
        # Blanks after the end mark are never generated: the mark has ended the answer.
        _, found, rest = self.write(marked[: turn + 1]).rpartition(_SENTINEL)
        ending = rest.rstrip() or rest
        for written in dict.fromkeys([content, content.strip(), content.strip("\n"), content.lstrip("\n")]):
            length = len(written) + len(ending)
            at = text.rfind(written + ending, max(start - reach, 0), start + length)
            if found and at >= 0:
                return at, at + length
        raise _NotFoundError(f"the answer in turn {turn + 1} does not stand in the text as it was given.")


class _NotFoundError(Exception):
    """The template changes an answer, so its tokens cannot be told from the rest."""


def _shared_start(one: str, other: str) -> int:
    """How many letters two texts have in common before they part."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _is_trained(message: Message) -> bool:
    return message.role == "assistant" and message.train


def encode_rows(chat: ChatText, rows: Iterable[Row], max_length: int) -> EncodedRows:
    encoded, cut, dropped = [], 0, 0
    for row in rows:
        one, was_cut = chat.encode(row, max_length)
        cut += was_cut
        if one.labelled:
            encoded.append(one)
        else:
            dropped += 1
    return EncodedRows(encoded, cut, dropped)


def require_rows(encoded: EncodedRows, max_length: int) -> None:
    """Refuse a training file that teaches nothing."""
    if not encoded.rows:
        raise InvalidDataset(
            f"No row has an answer to train on within {max_length} tokens ({encoded.dropped} rows were read).",
            param="training_file",
            hint="Raise max_length, shorten the prompts, or give an assistant turn a weight of 1.",
        )


def require_same_tokens(chat: ChatText, base: Path, rows: Sequence[Row]) -> None:
    """Refuse a base model to which instruct's ids mean other text. A folder without a tokenizer is taken on trust.

    Ids that only one of the two knows are fine: base checkpoints often lack the chat marks.
    """
    if not _has_tokenizer(base):
        return
    other = ChatText(_load_tokenizer(base))
    vocabulary, known = other.tokenizer.get_vocab(), chat.tokenizer.get_vocab()
    moved = [token for token, position in known.items() if vocabulary.get(token, position) != position]
    if moved:
        raise PairRefused(
            [f"{len(moved)} tokens have other ids in the base model's tokenizer, {moved[0]!r} among them"]
        )
    for row in rows[:_ROWS_TO_COMPARE]:
        for message in row.conversation.messages:
            if chat.ids(message.content) != other.ids(message.content):
                raise PairRefused([f"their tokenizers give different ids for the text of row {row.number}"])


def require_known_ids(chat: ChatText, base: Path, rows: Iterable[EncodedRow]) -> None:
    """Refuse rows that need more of the vocabulary than base has: some base models lack the rows of the marks that were
    added to instruct, and what is not there cannot be trained. `rows` are looked at only where some id is missing."""
    known = _embedding_rows(base)
    if max(chat.tokenizer.get_vocab().values()) < known:
        return
    for row in rows:
        highest = max(row.input_ids)
        if highest >= known:
            token = chat.tokenizer.convert_ids_to_tokens(highest)
            raise InvalidInput(
                f"Row {row.row.number} needs the token {highest} ({token!r}) of the instruct model, and the base model "
                f"has only the tokens 0 to {known - 1}, so it cannot be trained on that row.",
                code="token_unknown_to_base",
                param="model",
                hint="Choose a pair whose base knows every token of instruct's chats, or the strategy 'direct', which "
                "tunes the instruct model itself.",
            )


def _embedding_rows(model: Path) -> int:
    config = AutoConfig.from_pretrained(model, trust_remote_code=False, local_files_only=True)
    rows: int = config.get_text_config().vocab_size
    return rows


def _no_chats(missing: str) -> InvalidInput:
    return InvalidInput(
        f"The instruct model has no {missing}, so nothing tells how to write its chats.",
        param="model",
        hint="Name a pair whose instruct model has one. A graft that compares nothing (evaluation.compare is false) "
        "needs none.",
    )


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").exists() or (folder / "tokenizer.json").exists()


def _load_tokenizer(folder: Path) -> Any:
    require_own_files(folder)
    return AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False, local_files_only=True)
