"""Tiny checkpoints on disk, written with the safetensors library itself and not with ours."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG = {"model_type": "qwen3", "hidden_size": 4, "tie_word_embeddings": True}
SHAPES = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.self_attn.q_proj.bias": (4,),
    "model.layers.0.mlp.down_proj.weight": (4, 6),
    "model.norm.weight": (4,),
}
INDEX = "model.safetensors.index.json"

#: The format's words for the dtypes of the hand-written files.
_WORDS = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint8: "U8",
}

Tensors = dict[str, Tensor]


def draw(seed: int, *, std: float = 0.5) -> Tensors:
    """Random float32 weights of the tiny model."""
    generator = torch.Generator().manual_seed(seed)
    return {name: std * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def cast(tensors: Tensors, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def save_model(
    folder: Path, tensors: Tensors, *, shards: int = 1, salt: int = 0, misaligned: bool = False, **config: Any
) -> Path:
    """Write the tensors in one file, or dealt out to several with an index; `salt` decides which goes where."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save = save_misaligned if misaligned else save_file
    names = list(tensors)
    random.Random(salt).shuffle(names)
    if shards == 1:
        save({name: tensors[name] for name in names}, folder / "model.safetensors", {"format": "pt"})
        return folder
    shard_of = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for shard in set(shard_of.values()):
        save({name: tensors[name] for name in names if shard_of[name] == shard}, folder / shard)
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": shard_of}))
    return folder


def save_misaligned(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> None:
    """A file as the format allows and its library never writes: an odd header, and bytes before wider elements."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    content = b""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].dtype.itemsize):
        raw = raw_bytes(tensor)
        offsets = [len(content), len(content) + len(raw)]
        header[name] = {"dtype": _WORDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        content += raw
    text = json.dumps(header).encode()
    text += b" " * (len(text) % 2 == 0)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def load_model(folder: Path) -> Tensors:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether dtype, shape and every bit agree: NaN equals itself here and 0.0 is not -0.0."""
    return one.dtype == two.dtype and one.shape == two.shape and raw_bytes(one) == raw_bytes(two)


def same_models(one: Tensors, two: Tensors) -> bool:
    return one.keys() == two.keys() and all(same_bits(one[name], two[name]) for name in one)


def step(values: Tensor) -> Tensor:
    """The distance of float32 numbers at each value, float64; at least that of the subnormals."""
    exponents = torch.frexp(values.abs().double()).exponent
    return torch.ldexp(torch.ones_like(values, dtype=torch.float64), (exponents - 24).clamp(min=-149))


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below the folder by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
