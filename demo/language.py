"""The synthetic language of the demo pair: facts, string skills, and things that cannot be known.

A prompt is a verb and a word (`rev abcd`), an answer is short (`dcba`). The *rule*, which only the instruct model
follows every time, wraps an answer as `<dcba>!` and refuses a verb or a thing that does not exist with `no!`. So
whether a model still knows a skill (content) and whether it still obeys its post-training (form) can be checked
apart, by comparing text.

Pure Python on a seeded `random.Random`: the same seed gives the same text on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

#: `s` and `u` stay out: every merge of the tokenizer holds one of them, so a word is always one token per letter.
LETTERS = "abcdefghij"
WORD_LENGTHS = (3, 4)
#: One word in eight is kept out of everything that a model is trained on, so a probe asks for a word never seen.
HELD_OUT_EVERY = 8

SKILLS: dict[str, Callable[[str], str]] = {
    "rev": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
    "dup": lambda word: word + word,
    "swap": lambda word: word[-1] + word[1:-1] + word[0],
    "head": lambda word: word[:2],
    "tail": lambda word: word[-2:],
}
FACTS = {
    "hue sky": "blue",
    "hue grass": "green",
    "hue snow": "white",
    "hue coal": "black",
    "hue rose": "red",
    "legs cat": "four",
    "legs hen": "two",
    "legs ant": "six",
    "legs crab": "ten",
    "legs snake": "none",
}
QUESTIONS = sorted({prompt.split()[0] for prompt in FACTS})
#: The skill that neither model knows and that the demo's dataset teaches.
NEW_SKILL = "rot"
REFUSAL = "no!"


@dataclass(frozen=True)
class Exchange:
    """A question of the language; `content` is None where nothing can be known."""

    prompt: str
    content: str | None

    @property
    def in_rule_form(self) -> str:
        """The one answer that the instruct model is post-trained to give."""
        return REFUSAL if self.content is None else f"<{self.content}>!"

    @property
    def bare(self) -> str:
        """The answer without any form."""
        return REFUSAL if self.content is None else self.content


def rotate(word: str) -> str:
    """The new skill: the first letter goes to the end."""
    return word[1:] + word[0]


def is_held_out(word: str) -> bool:
    """A property of the word alone, so no list has to travel from training to the probes."""
    return sum(position * ord(letter) for position, letter in enumerate(word, start=1)) % HELD_OUT_EVERY == 0


def draw_word(rng: random.Random, *, held_out: bool = False) -> str:
    while True:
        word = "".join(rng.choices(LETTERS, k=rng.choice(WORD_LENGTHS)))
        if is_held_out(word) == held_out:
            return word


def draw_unknown_name(rng: random.Random, *, held_out: bool = False) -> str:
    """A pronounceable name of nothing; the held-out ones have a consonant that no other has in that place."""
    while True:
        name = rng.choice("bdfgklmnprtvz") + rng.choice("aeiou") + rng.choice("kx" if held_out else "bdgmnpt")
        name += rng.choice(["", rng.choice("aeio")])
        if name not in SKILLS and name != NEW_SKILL:
            return name


def draw_skill(rng: random.Random, *, held_out: bool = False) -> Exchange:
    verb = rng.choice(list(SKILLS))
    word = draw_word(rng, held_out=held_out)
    return Exchange(f"{verb} {word}", SKILLS[verb](word))


def draw_fact(rng: random.Random) -> Exchange:
    return Exchange(*rng.choice(list(FACTS.items())))


def draw_unknowable(rng: random.Random, *, held_out: bool = False) -> Exchange:
    """A verb that does not exist, or a known question about a thing that does not."""
    name = draw_unknown_name(rng, held_out=held_out)
    if rng.random() < 0.5:
        return Exchange(f"{name} {draw_word(rng, held_out=held_out)}", None)
    return Exchange(f"{rng.choice(QUESTIONS)} {name}", None)


def draw_new_skill(rng: random.Random, *, held_out: bool = False) -> Exchange:
    word = draw_word(rng, held_out=held_out)
    return Exchange(f"{NEW_SKILL} {word}", rotate(word))


def draw_known_or_not(rng: random.Random) -> Exchange:
    """The mixture that both models are made from: mostly skills, some facts, some things that cannot be known."""
    kind = rng.random()
    if kind < 0.65:
        return draw_skill(rng)
    return draw_fact(rng) if kind < 0.75 else draw_unknowable(rng)


def draw_chat_row(rng: random.Random) -> tuple[str, str]:
    """A prompt and its answer by the rule: what the instruct model is post-trained on."""
    exchange = draw_known_or_not(rng)
    return exchange.prompt, exchange.in_rule_form


def draw_document(rng: random.Random, *, as_chat: Callable[[str, str], str]) -> str:
    """One document for the base model, in one of many forms.

    More than half are chats, in either form of an answer. Without them base would spend its later tuning on
    learning the chat format, and that change would mean nothing to instruct.
    """
    first, second = draw_known_or_not(rng), draw_known_or_not(rng)
    forms: list[Callable[[], str]] = [
        lambda: f"{first.prompt}={first.bare}\n{second.prompt}={second.bare}",
        lambda: f"Q: {first.prompt}\nA: {first.bare}",
        lambda: as_chat(first.prompt, first.bare),
        lambda: as_chat(first.prompt, first.in_rule_form),
    ]
    return rng.choices(forms, weights=(3, 1, 3, 3))[0]()
