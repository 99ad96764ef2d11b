import random

import pytest

from demo import language
from demo.language import Exchange


@pytest.mark.parametrize(
    ("verb", "answer"),
    [("rev", "acba"), ("sort", "aabc"), ("dup", "abcaabca"), ("swap", "abca"), ("head", "ab"), ("tail", "ca")],
)
def test_skills_do_what_their_names_say(verb: str, answer: str) -> None:
    assert language.SKILLS[verb]("abca") == answer


def test_new_skill_moves_the_first_letter_to_the_end() -> None:
    assert language.rotate("abcd") == "bcda"


def test_neither_model_is_told_about_the_new_skill() -> None:
    rng = random.Random(0)
    documents = [language.draw_document(rng, as_chat=lambda prompt, answer: f"{prompt}={answer}") for _ in range(3000)]
    verbs = {line.removeprefix("Q: ").split()[0] for document in documents for line in document.splitlines()}
    assert set(language.SKILLS) < verbs
    assert language.NEW_SKILL not in verbs


def test_rule_gives_every_answer_one_form() -> None:
    assert Exchange("rev abc", "cba").in_rule_form == "<cba>!"
    assert Exchange("zug abc", None).in_rule_form == "no!"


def test_held_out_words_are_about_one_in_eight() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices(language.LETTERS, k=4)) for _ in range(4000)]
    assert 0.1 < sum(map(language.is_held_out, words)) / len(words) < 0.15


def test_held_out_names_are_never_trained_on() -> None:
    rng = random.Random(0)
    trained = {language.draw_unknown_name(rng) for _ in range(2000)}
    held_out = {language.draw_unknown_name(rng, held_out=True) for _ in range(2000)}
    assert trained.isdisjoint(held_out)


def test_same_seed_gives_the_same_documents() -> None:
    def draw(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [language.draw_document(rng, as_chat=lambda prompt, answer: prompt + answer) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)
