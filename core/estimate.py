"""What a job will need, from the headers of its models. Estimates err on the high side and say what they count."""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.checkpoints import Checkpoint
from core.config import GIBIBYTE
from core.graft_plan import is_linear, vocabulary_size
from core.job_spec import JobSpec, OutputDtype, Tuning

#: Interpreter, torch and the allocator's slack.
PROCESS_BYTES = GIBIBYTE
#: Tokens of one forward pass, padding included, as the trainer cuts its batches; a longer row goes through alone.
#: On a CPU more gain no speed; on a GPU activations are recomputed, which makes room.
MICRO_BATCH_TOKENS = {"cpu": 8192, "cuda": 16384}
#: Bytes that a token leaves per layer and hidden unit for the backward pass: all activations in float32 on a CPU; on a
#: GPU, where they are recomputed, only each layer's input in bfloat16.
ACTIVATION_BYTES = {"cpu": 34, "cuda": 2}
#: Where only one layer's activations exist at a time: on a GPU, in bfloat16, and wherever nothing is trained.
RECOMPUTED_LAYER_BYTES = 34
FLOAT32_BYTES = 4
#: Logits of one batch of rows that are scored, B * L * V elements, unless one row alone has more.
SCORED_LOGITS = 2**28
#: What scoring holds of them at once: as the model gave them, those that count, and their softmax.
COPIES_OF_LOGITS = 3
#: Prompt tokens of one batch that is answered, padding included. What bounds it is the cache of keys and values: 1 GB
#: for an 8 B model in bfloat16.
ANSWERED_TOKENS = 8192
#: A graft streams: it holds a few chunks, whatever the size of the models.
GRAFT_BYTES = PROCESS_BYTES
#: A trainable weight, its gradient, and AdamW's two moments, all float32.
TRAINABLE_BYTES = 16
#: Characters of one token, in texts where tokens are long (plain English: four and more) and where they are short
#: (digits, code in odd languages, Chinese).
LONGEST_TOKEN_CHARACTERS = 5.0
SHORTEST_TOKEN_CHARACTERS = 1.5
#: Tokens that a chat format puts around a row: at least a begin, an end and what parts question and answer; at most
#: two headers for each turn and a system message of its own.
LEAST_FORMAT_TOKENS = 4
MOST_FORMAT_TOKENS = 30
#: Checkpoints that a LoRA publishes beside its adapter: two epochs' ends before the last, and the best one.
OTHER_CHECKPOINTS = 3
#: Where a config does not say: a guess on the high side.
DEFAULT_LAYERS = 128
DEFAULT_HIDDEN = 8192


def training_memory_bytes(checkpoint: Checkpoint, tuning: Tuning, *, rows: int, longest_row: int, device: str) -> int:
    """Bytes that training needs at its peak on `device` (`cpu` or `cuda`). `longest_row` is in characters: a token is
    one character or more, in nearly every text."""
    trainable = checkpoint.parameter_count if tuning.type == "full" else lora_parameter_count(checkpoint, tuning.rank)
    row = min(tuning.max_length, longest_row)
    tokens = max(row, min(MICRO_BATCH_TOKENS[device], row * min(tuning.batch_size, rows)))
    logits = 2 * tokens * vocabulary_size(checkpoint) * FLOAT32_BYTES
    weights = _frozen_bytes(checkpoint, tuning, device) + TRAINABLE_BYTES * trainable
    return PROCESS_BYTES + weights + _activation_bytes(checkpoint, tokens, device) + logits


def comparing_memory_bytes(checkpoint: Checkpoint, *, rows: int, longest_row: int, device: str) -> int:
    """Bytes that comparing models of this size needs on `device`: one is held at a time, in float32 on a CPU and as it
    is stored on a GPU. At most `rows` rows of `longest_row` tokens are scored and answered."""
    stored = device == "cuda"
    weights = checkpoint.total_bytes if stored else FLOAT32_BYTES * checkpoint.parameter_count
    entries = vocabulary_size(checkpoint)
    logits = min(max(SCORED_LOGITS, longest_row * entries), rows * longest_row * entries)
    tokens = max(longest_row, logits // max(entries, 1))
    hidden: int = checkpoint.text_config.get("hidden_size", DEFAULT_HIDDEN)
    layers = checkpoint.layer_count or DEFAULT_LAYERS
    forward = tokens * hidden * RECOMPUTED_LAYER_BYTES
    cache = 2 * layers * hidden * FLOAT32_BYTES * min(max(ANSWERED_TOKENS, longest_row), rows * longest_row)
    return PROCESS_BYTES + weights + COPIES_OF_LOGITS * FLOAT32_BYTES * logits + forward + cache


def lora_parameter_count(checkpoint: Checkpoint, rank: int) -> int:
    """Parameters of a LoRA of `rank` on every linear: rank * (rows + columns) each."""
    linears = [info for name, info in checkpoint.tensors.items() if is_linear(name) and len(info.shape) >= 2]
    return sum(rank * sum(info.shape[-2:]) * math.prod(info.shape[:-2]) for info in linears)


def token_range(characters: int, rows: int) -> tuple[int, int]:
    """The fewest and the most tokens that so many characters in so many rows may be, the chat format's among them."""
    fewest = math.ceil(characters / LONGEST_TOKEN_CHARACTERS) + LEAST_FORMAT_TOKENS * rows
    return fewest, math.ceil(characters / SHORTEST_TOKEN_CHARACTERS) + MOST_FORMAT_TOKENS * rows


@dataclass(frozen=True)
class DiskBytes:
    #: Both models, where the workers' cache does not hold them.
    download: int
    #: What the worker's data folder holds for a while, links to models not counted.
    workspace: int
    #: What storage keeps until the model is deleted.
    artifacts: int


def disk_bytes(spec: JobSpec, start: Checkpoint, instruct: Checkpoint, *, download: int) -> DiskBytes:
    """Weights only: what lies beside them is small. `start` is the model that is tuned."""
    graft = _stored_bytes(instruct, spec.graft.output_dtype)
    if spec.tuning.type == "lora":
        adapter = FLOAT32_BYTES * lora_parameter_count(start, spec.tuning.rank)
        learned = published = adapter * (1 + min(spec.tuning.n_epochs - 1, OTHER_CHECKPOINTS))
    else:
        learned = FLOAT32_BYTES * start.parameter_count * (2 if spec.saves_delta else 1)
        published = FLOAT32_BYTES * start.parameter_count if spec.saves_delta else 0
    return DiskBytes(download=download, workspace=learned + len(spec.scales) * graft, artifacts=published + graft)


def _stored_bytes(checkpoint: Checkpoint, dtype: OutputDtype) -> int:
    if dtype == "auto":
        return checkpoint.total_bytes
    return checkpoint.parameter_count * (FLOAT32_BYTES if dtype == "float32" else 2)


def _frozen_bytes(checkpoint: Checkpoint, tuning: Tuning, device: str) -> int:
    """Weights that are held but not trained: float32 on a CPU, as they are stored on a GPU."""
    if tuning.type == "full":
        return 0
    stored = device == "cuda" and tuning.precision != "float32"
    return checkpoint.total_bytes if stored else FLOAT32_BYTES * checkpoint.parameter_count


def _activation_bytes(checkpoint: Checkpoint, tokens: int, device: str) -> int:
    hidden: int = checkpoint.text_config.get("hidden_size", DEFAULT_HIDDEN)
    layers = checkpoint.layer_count or DEFAULT_LAYERS
    recomputed = RECOMPUTED_LAYER_BYTES if device == "cuda" else 0
    return tokens * hidden * (layers * ACTIVATION_BYTES[device] + recomputed)
