"""Puts the rows that a tuning begins with into a loaded model; what they are for: `weights.special_rows`."""

from __future__ import annotations

from typing import Any

import torch

from core.graft_plan import is_head
from worker.weights.kernels import Array
from worker.weights.special_rows import StartRows


def put_rows(model: Any, rows: StartRows) -> StartRows:
    """Write the rows into a loaded model of transformers. Returns them as the model holds them in its own dtype."""
    return {name: {row: _put(model, name, row, values) for row, values in some.items()} for name, some in rows.items()}


def _put(model: Any, name: str, row: int, values: Array) -> Array:
    table = model.get_output_embeddings() if is_head(name) else model.get_input_embeddings()
    with torch.no_grad():
        table.weight[row] = torch.from_numpy(values).to(table.weight)
        held: Array = table.weight[row].to("cpu", torch.float32, copy=True).numpy()
    return held
