"""What a job will need, from the headers of its models. Estimates err on the high side and say what they count."""

from __future__ import annotations

import math

from core.checkpoints import Checkpoint
from core.config import GIBIBYTE
from core.graft_plan import is_linear
from core.job_spec import Tuning

#: Interpreter, torch and the allocator's slack.
PROCESS_BYTES = GIBIBYTE
#: Tokens that the trainer takes through the model at once, at most (see worker.steps.train).
TOKENS_AT_ONCE = 8192
#: Bytes that one token leaves per layer and hidden unit for the backward pass, in float32 without recomputation.
ACTIVATION_BYTES = 34
FLOAT32_BYTES = 4
#: A trainable weight, its gradient, and AdamW's two moments, all float32.
TRAINABLE_BYTES = 16


def training_memory_bytes(checkpoint: Checkpoint, tuning: Tuning, *, rows: int) -> int:
    """Bytes that training needs at its peak, weights in float32."""
    parameters = checkpoint.parameter_count
    trainable = parameters if tuning.type == "full" else lora_parameter_count(checkpoint, tuning.rank)
    frozen = 0 if tuning.type == "full" else parameters
    tokens = min(TOKENS_AT_ONCE, tuning.max_length * min(tuning.batch_size, rows))
    config = checkpoint.text_config
    activations: int = tokens * config["num_hidden_layers"] * config["hidden_size"] * ACTIVATION_BYTES
    logits: int = 2 * tokens * config["vocab_size"] * FLOAT32_BYTES
    return PROCESS_BYTES + FLOAT32_BYTES * frozen + TRAINABLE_BYTES * trainable + activations + logits


def lora_parameter_count(checkpoint: Checkpoint, rank: int) -> int:
    """Parameters of a LoRA of `rank` on every linear: rank * (rows + columns) each."""
    linears = [info for name, info in checkpoint.tensors.items() if is_linear(name) and len(info.shape) >= 2]
    return sum(rank * sum(info.shape[-2:]) * math.prod(info.shape[:-2]) for info in linears)
