"""Tiny checkpoints on disk, written with the safetensors library itself and not with ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from worker.weights import Provenance

CONFIG = {"model_type": "qwen3", "hidden_size": 4, "tie_word_embeddings": True}
SHAPES = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.self_attn.q_proj.bias": (4,),
    "model.layers.0.mlp.down_proj.weight": (4, 6),
    "model.norm.weight": (4,),
}

NAMES = Provenance(instruct="o/instruct@c1", base="o/base@c2", tuned="run 1", pair="tiny")

Tensors = dict[str, Tensor]


def draw(seed: int, *, std: float = 0.5) -> Tensors:
    """Random float32 weights of the tiny model."""
    generator = torch.Generator().manual_seed(seed)
    return {name: std * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def cast(tensors: Tensors, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def save_model(folder: Path, tensors: Tensors, *, shards: int = 1, **config: Any) -> Path:
    """Write the tensors in one file, or dealt out to several with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    shard_of = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        save_file({name: tensors[name] for name in tensors if shard_of[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return folder


def load_model(folder: Path) -> Tensors:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether dtype, shape and every bit agree: NaN equals itself here and 0.0 is not -0.0."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), two.contiguous().view(-1).view(torch.uint8))
