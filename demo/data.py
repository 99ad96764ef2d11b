"""The demo's dataset, which teaches one new skill in a user's own style, and the sets that measure what came of it.

    train.jsonl        the new skill with bare answers, and a few old questions answered in that style too
    validation.jsonl   the new skill on words that no model has seen, in the style of train.jsonl
    old_skills.jsonl   skills and facts that instruct knew before, in the rule's form
    refusals.jsonl     what cannot be known, refused as the rule wants it

Exact match asks for content and form, content match (letters and digits only) for content alone: a right answer in
another form is not a lost skill.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo.language import Exchange, draw_fact, draw_new_skill, draw_skill, draw_unknowable

FILE_NAMES = {
    "training": "train.jsonl",
    "validation": "validation.jsonl",
    "old_skills": "old_skills.jsonl",
    "refusals": "refusals.jsonl",
}
TRAIN_ROWS = 1000
HELD_OUT_ROWS = 100
#: A job's settings with which the scales differ visibly; found on seeds 0 to 2 of the data, for both ways of tuning.
RECIPE: dict[str, Any] = {"n_epochs": 5, "batch_size": 16, "learning_rate": 1e-3, "tuning_type": "lora", "rank": 32}


def write_datasets(folder: Path, *, seed: int = 0) -> dict[str, Path]:
    """Writes the four files, the same bytes for the same seed, and says under the name of its use where each one is."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, rows in draw_datasets(seed).items():
        paths[name] = folder / FILE_NAMES[name]
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def draw_datasets(seed: int) -> dict[str, list[dict[str, Any]]]:
    def rng(name: str) -> random.Random:
        """A stream for each set, so that changing the size of one leaves the others as they were."""
        return random.Random(f"{name} {seed}")

    train = _distinct(rng("train"), _draw_train_exchange, TRAIN_ROWS)
    validation = _distinct(rng("validation"), lambda source: draw_new_skill(source, held_out=True), HELD_OUT_ROWS)
    old_skills = _distinct(rng("old_skills"), _draw_old_exchange, HELD_OUT_ROWS)
    refusals = _distinct(rng("refusals"), lambda source: draw_unknowable(source, held_out=True), HELD_OUT_ROWS)
    return {
        "training": [_row(exchange.prompt, exchange.bare) for exchange in train],
        "validation": [_row(exchange.prompt, exchange.bare) for exchange in validation],
        "old_skills": [_row(exchange.prompt, exchange.in_rule_form) for exchange in old_skills],
        "refusals": [_row(exchange.prompt, exchange.in_rule_form) for exchange in refusals],
    }


def _draw_train_exchange(rng: random.Random) -> Exchange:
    """Mostly one skill, as users' data often is; one row in six asks for an old one, which spares those."""
    if rng.random() < 5 / 6:
        return draw_new_skill(rng)
    return draw_skill(rng)


def _draw_old_exchange(rng: random.Random) -> Exchange:
    return draw_skill(rng, held_out=True) if rng.random() < 0.9 else draw_fact(rng)


def _distinct(rng: random.Random, draw: Callable[[random.Random], Exchange], count: int) -> list[Exchange]:
    """`count` exchanges, no prompt twice."""
    chosen: dict[str, Exchange] = {}
    while len(chosen) < count:
        exchange = draw(rng)
        chosen.setdefault(exchange.prompt, exchange)
    return list(chosen.values())


def _row(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
