"""A config may say that head and embedding are one tensor while the file holds two."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.checkpoints import read_checkpoint
from core.errors import PairRefused
from core.graft_plan import Selection
from tests.worker.weights.made_checkpoints import draw, load_model, save_model
from worker.weights import FullDelta, graft, tied_heads
from worker.weights.tensors import Reader
from worker.weights.tied_heads import Model, untied_heads

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROLES = ("base", "tuned", "instruct")


@pytest.fixture(autouse=True)
def _many_chunks(monkeypatch):
    monkeypatch.setattr(tied_heads, "_CHUNK_BYTES", 24)


def run(folder: Path) -> None:
    graft(
        instruct=folder / "instruct",
        delta=FullDelta(folder / "base", folder / "tuned"),
        out=folder / "out",
        selection=Selection(scope="all"),
    )


def another_last_number(embedding: Tensor) -> Tensor:
    head = embedding.clone()
    head[-1, -1] += 1
    return head


@pytest.mark.parametrize("roles", [("base",), ("tuned",), ("instruct",), ROLES], ids=", ".join)
def test_a_tied_model_with_a_head_of_its_own_is_refused(tmp_path, roles):
    """transformers loads it untied, and the change of its head would be lost."""
    for number, role in enumerate(ROLES):
        tensors = draw(number)
        head = {HEAD: another_last_number(tensors[EMBEDDING])} if role in roles else {}
        save_model(tmp_path / role, tensors | head)
    with pytest.raises(PairRefused) as refusal:
        run(tmp_path)
    said = (
        f" ties its head to its embedding by its config.json, and stores a {HEAD} that differs from its {EMBEDDING}; "
        "set tie_word_embeddings to false in its config.json if the head is its own, or save the model again with "
        "transformers' save_pretrained"
    )
    assert sorted(refusal.value.reasons) == sorted(f"{role}{said}" for role in roles)
    assert {path.name for path in tmp_path.iterdir()} == set(ROLES)


def test_the_remedy_helps(tmp_path):
    """With a config that says so the head is grafted as one of its own."""
    for number, role in enumerate(ROLES):
        tensors = draw(number)
        save_model(tmp_path / role, tensors | {HEAD: tensors[EMBEDDING] + number}, tie_word_embeddings=False)
    run(tmp_path)
    base, tuned, instruct = (load_model(tmp_path / role)[HEAD] for role in ROLES)
    assert torch.equal(load_model(tmp_path / "out")[HEAD], instruct + (tuned - base))


@pytest.mark.parametrize(
    ("head", "is_another"),
    [
        (lambda embedding: embedding, False),  # whatever its bits: the same NaN is the same
        (another_last_number, True),
        (lambda embedding: embedding[:-1], True),
        (lambda embedding: embedding.double(), True),
    ],
    ids=["none", "number", "shape", "dtype"],
)
def test_what_makes_it_another_tensor(tmp_path, head, is_another):
    tensors = draw(0)
    tensors[EMBEDDING][0, 0] = float("nan")
    folder = save_model(tmp_path / "model", tensors | {HEAD: head(tensors[EMBEDDING]).clone()})
    with closing(Reader(folder)) as reader:
        assert bool(untied_heads([Model("it", read_checkpoint(folder), reader)])) == is_another
