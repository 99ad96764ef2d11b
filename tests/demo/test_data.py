import json
from pathlib import Path
from typing import Any

from demo import language
from demo.data import HELD_OUT_ROWS, TRAIN_ROWS, draw_datasets, write_datasets


def exchanges(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]


def expected_content(prompt: str) -> str | None:
    verb, word = prompt.split()
    if verb == language.NEW_SKILL:
        return language.rotate(word)
    return language.SKILLS[verb](word) if verb in language.SKILLS else language.FACTS.get(prompt)


def test_files_are_chat_rows_in_json_lines(tmp_path: Path) -> None:
    paths = write_datasets(tmp_path)
    assert sorted(paths) == ["old_skills", "refusals", "training", "validation"]
    assert paths["training"].name == "train.jsonl"
    for name, path in paths.items():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == (TRAIN_ROWS if name == "training" else HELD_OUT_ROWS)
        assert all([message["role"] for message in row["messages"]] == ["user", "assistant"] for row in rows)


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, again = write_datasets(tmp_path / "first"), write_datasets(tmp_path / "again")
    assert [path.read_bytes() for path in first.values()] == [path.read_bytes() for path in again.values()]
    assert draw_datasets(0)["training"] != draw_datasets(1)["training"]


def test_no_train_prompt_and_no_train_word_is_in_a_held_out_set() -> None:
    sets = {name: exchanges(rows) for name, rows in draw_datasets(0).items()}
    trained = {prompt.split()[1] for prompt, _ in sets["training"]}
    for name in ("validation", "old_skills", "refusals"):
        assert trained.isdisjoint(prompt.split()[1] for prompt, _ in sets[name])


def test_no_prompt_stands_twice_in_a_set() -> None:
    for rows in draw_datasets(0).values():
        prompts = [prompt for prompt, _ in exchanges(rows)]
        assert len(prompts) == len(set(prompts))


def test_user_rows_are_right_and_bare() -> None:
    sets = draw_datasets(0)
    for prompt, answer in exchanges(sets["training"] + sets["validation"]):
        assert answer == expected_content(prompt)


def test_reference_answers_of_the_probes_follow_the_rule() -> None:
    sets = draw_datasets(0)
    for prompt, answer in exchanges(sets["old_skills"]):
        assert answer == f"<{expected_content(prompt)}>!"
    for prompt, answer in exchanges(sets["refusals"]):
        assert expected_content(prompt) is None
        assert answer == "no!"
