"""Whether a pair's tokenizers and chat format do what a training asks of them.

Text is written in instruct's chat format and read with instruct's tokenizer, for base as well (worker/chat_text.py). So
an id must mean the same to both models, the template must write the chats that rows hold, and it must end an answer in
a way that stops instruct. The files come from strangers, and the libraries that read them raise whatever they like:
whatever is raised here is a finding. What loops is ended from outside, by the processor time that the step allows
itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from core.checkpoints import CONFIG_FILE, PASSING_ERRORS, read_side_file
from core.datasets import Conversation, Message
from core.errors import InvalidInput, ShadowError
from core.own_files import require_own_files
from core.verdict import GENERATION_CONFIG_FILE, Finding, Role, end_ids, unusable
from worker.chat_text import ChatText, Row

#: Texts on which tokenizers differ when they differ at all.
SAMPLES = {
    "Latin": "The quick brown fox, élève à Żółć, naïve façade; ﬁne — don’t!",
    "Cyrillic": "Съешь ещё этих мягких французских булок, ґедзь їжак.",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "Arabic": "نصٌّ عربيٌّ مُشَكَّل، وأرقام ١٢٣٤٥.",
    "Hebrew": "דג סקרן שט בים, שָׁלוֹם עֲלֵיכֶם.",
    "Devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा।",
    "Chinese": "天地玄黄，宇宙洪荒。繁體字與简体字。",
    "Japanese": "いろはにほへと、カタカナ、漢字まじり文。",
    "Korean": "키스의 고유조건은 입술끼리 만나야 하고.",
    "Thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "emoji": "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 ❤️‍🔥 🇺🇳",
    "code": "def f(x):\n\tif x  >=  10:\n\t\treturn {'a': [1, 2]}\n\n\n    # done\r\n",
    "digits": "0 12 345 6789 1234567890 3.14159e-10 1,000,000 ½ ² ⅷ",
    "combining marks": "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢ e\u0301 \u0041\u030a \u1e9b\u0323",
    "blanks": "  two  spaces \u00a0 no-break \u200b zero \u3000 wide \n\n\n end ",
}
_QUESTION, _ANSWER, _RULE = "What is the capital of France?", "It is Paris.", "Answer in one sentence."
_MORE_QUESTION, _MORE_ANSWER = "And of Italy?", "That one is Rome."

#: Named at most in a message.
_EXAMPLES = 3

#: What Rust's libraries say of an error of the operating system.
_RUST_ERROR = re.compile(r"\(os error (\d{1,4})\)")


@dataclass(frozen=True)
class Chats:
    findings: list[Finding] = field(default_factory=list)
    #: The ids of special tokens that every chat holds: what base has to know, and to have been trained on.
    marks: tuple[int, ...] = ()
    #: Their texts, by id.
    names: dict[int, str] = field(default_factory=dict)


class Broken(Exception):
    """A stranger's file made a library stop."""


@contextmanager
def _guarded() -> Iterator[None]:
    try:
        yield
    except BaseException as error:  # a library may raise anything here, and a panic in Rust is no Exception
        if _is_passing(error):  # of the machine, which says nothing about the files
            raise
        if isinstance(error, ShadowError):  # our own words for it stand around what was raised
            raise Broken(_first_line(error.__cause__ or error)) from error
        raise Broken(f"{type(error).__name__}: {_first_line(error)}") from error


def _is_passing(error: BaseException | None) -> bool:
    """Whether anything in the chain may be otherwise at the next try, with the very same files.

    Want of memory is not: a check's is capped far above what honest files need, and a machine that has none kills.
    """
    while error is not None:
        in_rust = _RUST_ERROR.search(str(error)) if type(error) is Exception else None
        number = error.errno if isinstance(error, OSError) else int(in_rust.group(1)) if in_rust else None
        if number in PASSING_ERRORS:
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def check_chats(instruct: Path, base: Path | None) -> Chats:
    """Every finding on the small files of the two folders. Without `base`, instruct is tuned itself."""
    if foreign := [*_foreign("instruct", instruct), *(_foreign("base", base) if base is not None else [])]:
        return Chats(foreign)
    own = _Side("instruct", instruct)
    other = _Side("base", base) if base is not None else None
    findings = [*own.findings, *(other.findings if other else [])]
    if own.tokenizer is None:
        return Chats(findings)
    if other is not None and other.tokenizer is not None:
        findings += _compare(own.chat, other.chat)
    if own.tokenizer.chat_template is None:
        return Chats([*findings, _no_template()])
    try:
        ids = _Template(own, findings).judge()
    except Broken as error:
        return Chats([*findings, _broken_template(error)])
    findings += _padding(own.chat)
    if other is not None and other.tokenizer is not None:
        findings += _compare_chats(own.chat, other.chat)
    findings += _unknown_ids(own, other, ids)
    special = {*own.tokenizer.all_special_ids, *own.tokenizer.get_added_vocab().values()}
    marks = tuple(sorted(special.intersection(ids)))
    names = dict(zip(marks, own.tokenizer.convert_ids_to_tokens(list(marks)), strict=True))
    return Chats(findings, marks, names)


def _foreign(role: Role, folder: Path) -> list[Finding]:
    """Asked once more, right before the files are loaded: a folder may have changed since the first stage."""
    try:
        require_own_files(folder)
    except InvalidInput as error:
        return [unusable(role, error)]
    return []


def _padding(chat: ChatText) -> list[Finding]:
    try:
        chat.require_padding()
    except InvalidInput as error:
        return [Finding("refuse", error.code, error.message, error.hint)]
    return []


class _Side:
    """One model's small files, as far as they can be read."""

    def __init__(self, role: Role, folder: Path) -> None:
        self.role = role
        self.folder = folder
        self.findings: list[Finding] = []
        #: Rows of the embedding, by the config.
        self.rows: int | None = self._read_rows()
        self.tokenizer: Any = self._load()

    @property
    def chat(self) -> ChatText:
        return ChatText(self.tokenizer)

    def _read_rows(self) -> int | None:
        try:
            with _guarded():
                config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)
                rows: int = config.get_text_config().vocab_size
                return rows
        except Broken as error:
            self.findings.append(
                Finding(
                    "refuse",
                    "unknown_architecture",
                    f"transformers cannot read the {self.role} model's {CONFIG_FILE} ({error}).",
                    "Only architectures that this server's transformers knows can be trained.",
                )
            )
            return None

    def _load(self) -> Any:
        if not any((self.folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.json")):
            self.findings.append(_no_tokenizer(self.role))
            return None
        try:
            with _guarded():
                tokenizer = AutoTokenizer.from_pretrained(
                    self.folder, use_fast=True, trust_remote_code=False, local_files_only=True
                )
                ids = ChatText(tokenizer).ids(SAMPLES["Latin"])
            if not getattr(tokenizer, "is_fast", False):
                raise Broken("it is none of those that tell where a token stands in the text")
            if not ids or set(ids) == {tokenizer.unk_token_id}:
                raise Broken("it knows no token of an English sentence")
        except Broken as error:
            self.findings.append(
                Finding(
                    "refuse",
                    "broken_tokenizer",
                    f"The {self.role} model's tokenizer cannot be used ({error}).",
                    "Copy or download the model's small files again, whole; a tokenizer.json has to be among them.",
                )
            )
            return None
        return tokenizer


# --- two tokenizers ---------------------------------------------------------------------------------------------------


def _compare(own: ChatText, other: ChatText) -> list[Finding]:
    """What the vocabularies say, and plain text in many scripts."""
    findings = [*_vocabularies(own, other), *_special_tokens(own, other)]
    differing: dict[str, str] = {}
    for script, text in SAMPLES.items():
        try:
            with _guarded():
                if own.ids(text) != other.ids(text):
                    differing[script] = text
        except Broken as error:
            return [*findings, _unreadable_text(script, error)]
    return [*findings, _other_ids(differing, own, other)] if differing else findings


def _vocabularies(own: ChatText, other: ChatText) -> list[Finding]:
    known, theirs = own.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    moved = [token for token, position in known.items() if theirs.get(token, position) != position]
    words, their_words = ({position: token for token, position in one.items()} for one in (known, theirs))
    renamed = [position for position, token in words.items() if their_words.get(position, token) != token]
    added = {*own.tokenizer.get_added_vocab().values(), *other.tokenizer.get_added_vocab().values()}
    foreign = [position for position in renamed if position not in added]
    findings = []
    if moved:
        findings.append(_refuse_tokens(f"{len(moved)} tokens have another id in base, {_listed(moved)} among them."))
    elif foreign:
        at = foreign[0]
        findings.append(
            _refuse_tokens(
                f"{len(foreign)} ids mean other tokens in base: {at} is {words[at]!r} in instruct and "
                f"{their_words[at]!r} in base."
            )
        )
    elif renamed:
        at = renamed[0]
        findings.append(
            Finding(
                "note",
                "renamed_tokens",
                f"{len(renamed)} special tokens have other names in base: {at} is {words[at]!r} in instruct and "
                f"{their_words[at]!r} in base.",
            )
        )
    if lacking := sorted(token for token in known if token not in theirs and known[token] not in their_words):
        findings.append(
            Finding(
                "note",
                "tokens_of_instruct_alone",
                f"{len(lacking)} tokens are in instruct's tokenizer alone: {_listed(lacking)}.",
            )
        )
    return findings


def _refuse_tokens(message: str) -> Finding:
    return Finding(
        "refuse",
        "other_tokens",
        message,
        "Name the base model that this instruct model was made from: to this one instruct's ids mean other text.",
    )


def _special_tokens(own: ChatText, other: ChatText) -> list[Finding]:
    findings = []
    if own.tokenizer.pad_token is None and own.tokenizer.eos_token is not None:
        findings.append(
            Finding("note", "no_pad_token", "Instruct's tokenizer has no pad token; its end-of-text token pads.")
        )
    differing = [
        f"{kind} is {theirs!r} in base and {ours!r} in instruct"
        for kind in ("bos", "eos", "pad")
        if (ours := getattr(own.tokenizer, f"{kind}_token")) != (theirs := getattr(other.tokenizer, f"{kind}_token"))
    ]
    if differing:
        said = f"The tokenizers' special tokens differ: {'; '.join(differing)}. Instruct's are used for both."
        findings.append(Finding("note", "other_special_tokens", said))
    return findings


def _compare_chats(own: ChatText, other: ChatText) -> list[Finding]:
    """Whole chats, cut where a mark stands that base's tokenizer does not know: marks are split off before all else."""
    theirs = other.tokenizer.get_vocab()
    unknown = [token for token in own.tokenizer.get_added_vocab() if token not in theirs]
    cuts = re.compile("|".join(map(re.escape, sorted(unknown, key=len, reverse=True))) or r"(?!)")
    differing: dict[str, str] = {}
    for script, sample in SAMPLES.items():
        try:
            with _guarded():
                pieces = cuts.split(own.write([_user(sample), _assistant(sample)]))
                parted = [piece for piece in pieces if own.ids(piece) != other.ids(piece)]
                if parted and own.ids(sample) == other.ids(sample):  # else `_compare` has told it
                    differing[f"{script} in a chat"] = parted[0]
        except Broken as error:
            return [_unreadable_text(script, error)]
    return [_other_ids(differing, own, other)] if differing else []


def _other_ids(differing: Mapping[str, str], own: ChatText, other: ChatText) -> Finding:
    """`differing`: the texts by their scripts."""
    text = next(iter(differing.values()))
    ids, others = own.ids(text), other.ids(text)
    at = next((n for n, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
    return Finding(
        "refuse",
        "other_ids",
        f"The tokenizers give other ids for the same text ({', '.join(differing)}): {others[at : at + 4]} in base and "
        f"{ids[at : at + 4]} in instruct, from token {at + 1} of the first one on.",
        "Name the base model that this instruct model was made from: to this one instruct's ids mean other text.",
    )


# --- the template -----------------------------------------------------------------------------------------------------


class _Template:
    """Instruct's chat template on the chats that rows hold. Findings go to the list that it is given."""

    def __init__(self, side: _Side, findings: list[Finding]) -> None:
        self._side = side
        self._chat = side.chat
        self._findings = findings

    def judge(self) -> list[int]:
        """The ids of a plain chat. Raises Broken where not even that can be written."""
        plain = [_user(_QUESTION), _assistant(_ANSWER)]
        with _guarded():
            text, spans = self._chat.trained_spans(_row(plain))
            asked = self._chat.write(plain[:1], ask=True)
            ids = [*self._chat.ids(text), *self._chat.ids(asked)]
        if _QUESTION not in text:
            raise Broken("it leaves the user's words out")
        if not ids:
            raise Broken("its tokenizer knows no token of what it writes")
        self._try([_system(_RULE), *plain], "system_role", "a chat with a system message", _RULE)
        more = [*plain, _user(_MORE_QUESTION), _assistant(_MORE_ANSWER)]
        self._try(more, "many_turns", "a chat of more than one turn", _MORE_ANSWER)
        self._judge_end(text, spans)
        return ids

    def _try(self, messages: list[Message], what: str, words: str, content: str) -> None:
        try:
            with _guarded():
                text, _ = self._chat.trained_spans(_row(messages))
        except Broken as error:
            self._findings.append(
                Finding(
                    "warn",
                    f"{what}_refused",
                    f"Instruct's chat template does not write {words} ({error}).",
                    "Rows of that kind will be refused; leave them out of the training file.",
                )
            )
            return
        if content not in text:
            said = f"Instruct's chat template leaves words of {words} out."
            remedy = "The models will never see them; put them into a user's turn."
            self._findings.append(Finding("warn", f"{what}_ignored", said, remedy))

    def _judge_end(self, text: str, spans: list[tuple[int, int]]) -> None:
        """Answers are learned with the mark that ends them; generation stops only at what is an eos."""
        (start, end), *_ = spans
        ending = text[start:end].rpartition(_ANSWER)[2].strip()
        if not ending:
            said = "Instruct's chat template ends an answer with no mark, so no end can be learned."
            self._findings.append(Finding("warn", "turn_without_end", said, "Expect answers that run on."))
            return
        ids = self._chat.ids(ending)
        if not ids:
            said = (
                f"Instruct's chat template ends an answer with {ending[:40]!r}, of which its tokenizer knows no token."
            )
            self._findings.append(Finding("warn", "turn_without_end", said, "Expect answers that run on."))
            return
        folder, token = self._side.folder, ids[0]
        config = read_side_file(folder, CONFIG_FILE) or {}
        ends = end_ids(read_side_file(folder, GENERATION_CONFIG_FILE), config)
        if ends and token not in ends:
            self._findings.append(
                Finding(
                    "warn",
                    "turn_end_is_no_eos",
                    f"Instruct's chat template ends an answer with {ending[:40]!r} ({token}), which is none of the end "
                    f"ids of its generation config ({', '.join(map(str, ends))}).",
                    f"Add {token} to eos_token_id in the model's {GENERATION_CONFIG_FILE}, or answers run on.",
                )
            )


def _unknown_ids(own: _Side, other: _Side | None, ids: Sequence[int]) -> list[Finding]:
    """Ids of a plain chat without a row in an embedding: every row of a training file would hold them."""
    findings = []
    for side in filter(None, (own, other)):
        rows = side.rows
        if rows is None or max(ids) < rows:
            continue
        token = max(ids)
        remedy = "Choose a pair whose base knows every token of instruct's chats, or the strategy 'direct'."
        findings.append(
            Finding(
                "refuse",
                f"token_unknown_to_{side.role}",
                f"Every chat holds the token {token} ({own.tokenizer.convert_ids_to_tokens(token)!r}), and the "
                f"{side.role} model has only the tokens 0 to {rows - 1}, so it cannot be trained on any row.",
                remedy if side.role == "base" else "Copy or download the model again, whole.",
            )
        )
    highest = max(own.tokenizer.get_vocab().values())
    if other is not None and other.rows is not None and max(ids) < other.rows <= highest:
        findings.append(
            Finding(
                "note",
                "tokens_beyond_base",
                f"Instruct's tokenizer has tokens up to {highest} and base rows up to {other.rows - 1}: a row that "
                "holds one of the others will be refused. Plain chats hold none.",
            )
        )
    return findings


# --- words ------------------------------------------------------------------------------------------------------------


def _no_tokenizer(role: Role) -> Finding:
    if role == "base":
        said = "The base model comes without a tokenizer; that it reads the ids of instruct's is taken on trust."
        return Finding("note", "base_without_tokenizer", said)
    said = "The instruct model has no tokenizer, so there is nothing to read its chats with."
    return Finding("refuse", "no_tokenizer", said, "Name an instruct model that comes with its tokenizer.")


def _no_template() -> Finding:
    return Finding(
        "refuse",
        "no_chat_template",
        "The instruct model has no chat template, so nothing tells how to write its chats.",
        "Name an instruct model that has one; base and instruct may have changed places.",
    )


def _broken_template(error: Broken) -> Finding:
    return Finding(
        "refuse",
        "broken_chat_template",
        f"Instruct's chat template does not write a plain question and answer ({error}).",
        "Take the template of the model's own release.",
    )


def _unreadable_text(where: str, error: Broken) -> Finding:
    said = f"A tokenizer stops on plain text ({where}; {error})."
    return Finding("refuse", "broken_tokenizer", said, "Copy or download the models' small files again, whole.")


def _listed(tokens: Sequence[str]) -> str:
    return ", ".join(map(repr, tokens[:_EXAMPLES]))


def _user(text: str) -> Message:
    return Message("user", text, train=False)


def _assistant(text: str) -> Message:
    return Message("assistant", text, train=True)


def _system(text: str) -> Message:
    return Message("system", text, train=False)


def _row(messages: Sequence[Message]) -> Row:
    return Row(1, Conversation(tuple(messages)))
