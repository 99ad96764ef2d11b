"""Makes a pair and two deltas to graft: Base, Tuned (Base and a small update), Instruct (Base and a larger difference)
and a LoRA of rank 64 on all linears, in the shapes and names of a Qwen2.

Streamed, so that 5 B parameters need no more memory than 50 M. A program of its own: `bench/graft.py` must stay small,
since a child's peak memory is never reported below that of the process that started it.

    python bench/yardsticks/synthetic.py 1.3b FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

SHARDS = 3
RANK = 64
SEED = 20251121
MODELS = ("base", "tuned", "instruct")
#: How far a tuning moves a weight of size 0.02, and how far Instruct is from Base: as in published pairs, a few and
#: a few dozen steps of bfloat16.
UPDATE, DISTANCE = 1e-4, 1e-3
#: Normal numbers are drawn once and then read from a random place on: drawing 15 B of them would take minutes.
POOL, CHUNK = 1 << 24, 1 << 22


@dataclass(frozen=True)
class Size:
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for shape in shapes(self).values())


SIZES = {
    "tiny": Size(vocabulary=512, hidden=64, intermediate=176, layers=3, heads=4),
    "50m": Size(vocabulary=8192, hidden=768, intermediate=2048, layers=6, heads=12),
    "350m": Size(vocabulary=24576, hidden=1024, intermediate=2816, layers=24, heads=16),
    "1.3b": Size(vocabulary=24576, hidden=2048, intermediate=5504, layers=24, heads=16),
    "5b": Size(vocabulary=24576, hidden=4096, intermediate=11008, layers=24, heads=32),
}


def linears(size: Size) -> dict[str, tuple[int, int]]:
    """Of one layer: (out, in)."""
    square, up = (size.hidden, size.hidden), (size.intermediate, size.hidden)
    attention = {f"self_attn.{name}_proj": square for name in "qkvo"}
    return attention | {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": up[::-1]}


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Every tensor, in the order of the file."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocabulary, size.hidden)}
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}{name}_layernorm.weight": (size.hidden,) for name in ("input", "post_attention")}
        found |= {f"{prefix}{name}.weight": shape for name, shape in linears(size).items()}
        found |= {f"{prefix}self_attn.{name}_proj.bias": (size.hidden,) for name in "qkv"}
    return found | {"model.norm.weight": (size.hidden,), "lm_head.weight": (size.vocabulary, size.hidden)}


def main() -> None:
    size, folder = SIZES[sys.argv[1]], Path(sys.argv[2])
    torch.manual_seed(SEED)
    pool = torch.randn(POOL)
    for model in MODELS:
        (folder / model).mkdir(parents=True)
        _write_small_files(size, folder / model)
    layout = list(_shards(size))
    for number, names in enumerate(layout, 1):
        _write_shard(size, folder, f"model-{number:05}-of-{len(layout):05}.safetensors", names, pool)
    for model in MODELS:
        _write_index(size, folder / model, layout)
    _write_adapter(size, folder / "adapter", pool)


def _shards(size: Size) -> Iterator[list[str]]:
    """Whole tensors, cut where a third of the bytes is full."""
    limit = size.parameters / SHARDS
    names: list[str] = []
    filled = 0
    for name, shape in shapes(size).items():
        if filled + prod(shape) / 2 > limit:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += prod(shape)
    yield names


def _write_shard(size: Size, folder: Path, file: str, names: list[str], pool: Tensor) -> None:
    """The three models at once, since two of them are the first and a difference."""
    every = shapes(size)
    with ExitStack() as stack:
        targets = [stack.enter_context((folder / model / file).open("wb")) for model in MODELS]
        for target in targets:
            target.write(_header({name: every[name] for name in names}, "BF16"))
        for name in names:
            _write_tensor(name, prod(every[name]), targets, pool)


def _write_tensor(name: str, elements: int, targets: Sequence[BinaryIO], pool: Tensor) -> None:
    for start in range(0, elements, CHUNK):
        count = min(CHUNK, elements - start)
        base = (_normal(pool, count).mul_(0.02) + (1.0 if "norm" in name else 0.0)).bfloat16()  # (count,)
        tuned = base + _normal(pool, count).mul_(UPDATE)  # (count,) float32, as the next one
        instruct = base + _normal(pool, count).mul_(DISTANCE)
        for target, values in zip(targets, (base, tuned, instruct), strict=True):
            target.write(_raw(values.bfloat16()))


def _normal(pool: Tensor, count: int) -> Tensor:
    start = int(torch.randint(len(pool) - count + 1, ()))
    return pool[start : start + count].clone()


def _raw(values: Tensor) -> memoryview:
    return values.view(-1).view(torch.uint8).numpy().data


def _header(tensors: dict[str, tuple[int, ...]], dtype: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + prod(shape) * (2 if dtype == "BF16" else 4)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_index(size: Size, folder: Path, layout: list[list[str]]) -> None:
    weight_map = {
        name: f"model-{number:05}-of-{len(layout):05}.safetensors"
        for number, names in enumerate(layout, 1)
        for name in names
    }
    index = {"metadata": {"total_size": 2 * size.parameters}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_small_files(size: Size, folder: Path) -> None:
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}, indent=2))


def _write_adapter(size: Size, folder: Path, pool: Tensor) -> None:
    """float32, as PEFT stores what it has trained."""
    folder.mkdir()
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(size.layers):
        for name, (rows, columns) in linears(size).items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors |= {f"{prefix}.lora_A.weight": (RANK, columns), f"{prefix}.lora_B.weight": (rows, RANK)}
    with (folder / "adapter_model.safetensors").open("wb") as target:
        target.write(_header(tensors, "F32"))
        for shape in tensors.values():
            target.write(_raw(_normal(pool, prod(shape)).mul_(3e-3)))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(name.split(".")[1] for name in linears(size)),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
