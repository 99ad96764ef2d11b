"""How well a model foretells the labelled tokens of rows. Used while training and to compare models afterwards.

B rows, L tokens of the longest of them, V the vocabulary, N labelled positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from core.estimate import SCORED_LOGITS
from worker.chat_text import IGNORED, EncodedRow


@dataclass(frozen=True)
class Score:
    """One row's sums over its labelled tokens."""

    #: Natural logarithm.
    loss: float
    tokens: int
    #: Tokens that the model would have chosen itself.
    correct: int

    @property
    def mean_loss(self) -> float:
        return self.loss / self.tokens


def score_rows(model: Any, rows: Sequence[EncodedRow], pad_id: int) -> Iterator[tuple[int, Score]]:
    """Each row's index and score, longest rows first: a batch too large for the memory fails at once."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids), reverse=True)
    per_batch = max(1, SCORED_LOGITS // (len(rows[order[0]].input_ids) * model.config.get_text_config().vocab_size))
    for first in range(0, len(order), per_batch):
        indices = order[first : first + per_batch]
        yield from zip(indices, _score_batch(model, [rows[index] for index in indices], pad_id), strict=True)


def total(scores: Iterable[Score]) -> Score:
    """One score over all tokens, so that a long row weighs more than a short one, as in training."""
    listed = list(scores)
    return Score(
        loss=sum(score.loss for score in listed),
        tokens=sum(score.tokens for score in listed),
        correct=sum(score.correct for score in listed),
    )


@torch.no_grad()
def _score_batch(model: Any, rows: Sequence[EncodedRow], pad_id: int) -> list[Score]:
    ids = _padded([row.input_ids for row in rows], pad_id)  # (B, L)
    labels = _padded([row.labels for row in rows], IGNORED)[:, 1:].to(model.device)  # (B, L-1)
    mask = _padded([[1] * len(row.input_ids) for row in rows], 0)  # (B, L)
    output = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    counted = labels != IGNORED  # (B, L-1)
    logits = output.logits[:, :-1][counted].float()  # (N, V)
    losses = torch.zeros(labels.shape, device=labels.device)
    losses[counted] = cross_entropy(logits, labels[counted], reduction="none")
    correct = torch.zeros_like(counted)
    correct[counted] = logits.argmax(-1) == labels[counted]
    sums = zip(losses.sum(1).tolist(), counted.sum(1).tolist(), correct.sum(1).tolist(), strict=True)
    return [Score(*row) for row in sums]


def _padded(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    """(B, L). Padding on the right, where causal attention never sees it."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])
