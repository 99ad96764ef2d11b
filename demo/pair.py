"""Makes the demo's base/instruct pair from scratch on a CPU, as two ordinary Hugging Face folders.

    python -m demo.pair FOLDER        progress on stdout, one JSON object per line

Base learns the language from documents of many forms; instruct is that base after a light post-training on the rule, so
the two stay as near to each other as real pairs are. The folders carry the oddities of real pairs on purpose: base has
no chat template and another eos, weights are sharded and tied, base is stored in float32 and instruct in bfloat16.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.optimization import get_cosine_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from demo import language

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
#: A summation order of its own belongs to every thread count: only a fixed one gives the same weights again.
THREADS = 2
IGNORED = -100
PROGRESS_EVERY = 25
MAX_SHARD_SIZE = "800KB"

Progress = Callable[[str, int, int, float], None]


@dataclass(frozen=True, kw_only=True)
class PairRecipe:
    """Everything besides the seed that decides the weights."""

    hidden_size: int = 128
    layers: int = 3
    rows_per_step: int = 64
    base_steps: int = 700
    base_learning_rate: float = 4e-3
    instruct_steps: int = 120
    instruct_learning_rate: float = 3e-4


@dataclass(frozen=True)
class PairPaths:
    base: Path
    instruct: Path


def build_pair(
    folder: Path, *, seed: int = 0, recipe: PairRecipe | None = None, on_progress: Progress | None = None
) -> PairPaths:
    """Makes `folder/base` and `folder/instruct` whole or not at all; a pair of the same fingerprint stays as it is."""
    recipe = recipe or PairRecipe()
    fingerprint = _fingerprint(recipe, seed)
    if _read_fingerprint(folder) != fingerprint:
        _refuse_other_content(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            made = Path(scratch) / "pair"
            _make(made, recipe, seed, on_progress or (lambda phase, step, total_steps, loss: None))
            (made / "pair.json").write_text(json.dumps(fingerprint, indent=2) + "\n")
            _put_in_place(made, folder, aside=Path(scratch) / "replaced")
    return PairPaths(folder / "base", folder / "instruct")


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE: any text can be written, and only the chat's role words are longer than a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [pair for role in ("system", "user", "assistant") for pair in _merges_of(role)]
    words = alphabet + ["".join(pair) for pair in merges]
    vocabulary = {word: position for position, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in (END_OF_TEXT, TURN_START, TURN_END)])
    return tokenizer


def _id(tokenizer: Tokenizer, mark: str) -> int:
    return tokenizer.get_vocab()[mark]


def _merges_of(role: str) -> list[tuple[str, str]]:
    return [(role[:end], role[end]) for end in range(1, len(role))]


def chat_text(prompt: str, answer: str) -> str:
    """One exchange exactly as instruct's template renders it."""
    return f"{TURN_START}user\n{prompt}{TURN_END}\n{TURN_START}assistant\n{answer}{TURN_END}\n"


def _make(folder: Path, recipe: PairRecipe, seed: int, on_progress: Progress) -> None:
    tokenizer = make_tokenizer()
    with _reproducible(seed):
        model = Qwen3ForCausalLM(_config(recipe, tokenizer))
        documents = _document_batches(tokenizer, random.Random(f"documents {seed}"), recipe.rows_per_step)
        _train(model, documents, "base", recipe.base_steps, recipe.base_learning_rate, on_progress)
        _save(model, tokenizer, folder / "base", end=[END_OF_TEXT])
        chats = _chat_batches(tokenizer, random.Random(f"chats {seed}"), recipe.rows_per_step)
        _train(model, chats, "instruct", recipe.instruct_steps, recipe.instruct_learning_rate, on_progress)
        torch.nn.Module.bfloat16(model)
        _save(model, tokenizer, folder / "instruct", end=[TURN_END, END_OF_TEXT], template=CHAT_TEMPLATE)


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Fixed threads and a seeded torch, both put back as they were: the caller may be a larger program."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _config(recipe: PairRecipe, tokenizer: Tokenizer) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=recipe.hidden_size,
        intermediate_size=2 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=recipe.hidden_size // 4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=_id(tokenizer, END_OF_TEXT),
    )


def _document_batches(tokenizer: Tokenizer, rng: random.Random, rows: int) -> Iterator[dict[str, torch.Tensor]]:
    """Whole documents with their end mark, loss on every token, as in pre-training."""
    while True:
        documents = [language.draw_document(rng, as_chat=chat_text) + END_OF_TEXT for _ in range(rows)]
        ids = [tokenizer.encode(document).ids for document in documents]
        yield _batch(ids, prompt_lengths=[0] * rows, pad=_id(tokenizer, END_OF_TEXT))


def _chat_batches(tokenizer: Tokenizer, rng: random.Random, rows: int) -> Iterator[dict[str, torch.Tensor]]:
    """Chats by the rule, loss on the answer and the mark that closes it."""
    while True:
        chats = [language.draw_chat_row(rng) for _ in range(rows)]
        ids = [tokenizer.encode(chat_text(*chat).removesuffix("\n")).ids for chat in chats]
        openings = [tokenizer.encode(chat_text(prompt, "").removesuffix(f"{TURN_END}\n")).ids for prompt, _ in chats]
        yield _batch(ids, prompt_lengths=[len(opening) for opening in openings], pad=_id(tokenizer, END_OF_TEXT))


def _batch(rows: list[list[int]], *, prompt_lengths: list[int], pad: int) -> dict[str, torch.Tensor]:
    """Padding stands on the right, where causal attention never sees it: no mask is needed."""
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), IGNORED)
    for index, (row, prompt_length) in enumerate(zip(rows, prompt_lengths, strict=True)):
        input_ids[index, : len(row)] = torch.tensor(row)
        labels[index, prompt_length : len(row)] = torch.tensor(row[prompt_length:])
    return {"input_ids": input_ids, "labels": labels}


def _train(
    model: Qwen3ForCausalLM,
    batches: Iterator[dict[str, torch.Tensor]],
    phase: str,
    steps: int,
    learning_rate: float,
    on_progress: Progress,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    model.train()
    for step in range(1, steps + 1):
        loss = model(**next(batches), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % PROGRESS_EVERY == 0 or step == steps:
            on_progress(phase, step, steps, loss.item())


def _save(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path, *, end: list[str], template: str | None = None
) -> None:
    ends = [_id(tokenizer, mark) for mark in end]
    pad = _id(tokenizer, END_OF_TEXT)
    model.config.eos_token_id = ends[0]
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=ends if len(ends) > 1 else ends[0], pad_token_id=pad, do_sample=False, max_new_tokens=64
    )
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=end[0],
        pad_token=END_OF_TEXT,
        model_max_length=512,
        chat_template=template,
    )
    wrapped.save_pretrained(folder)
    for shard in folder.glob("*.safetensors"):
        shard.chmod(0o644)  # safetensors writes them for the owner alone; a worker may run as another user


def _fingerprint(recipe: PairRecipe, seed: int) -> dict[str, Any]:
    """Seed, recipe and the code that reads them: an edited language must not be served from an old folder."""
    sources = b"".join(Path(module).read_bytes() for module in (language.__file__, __file__))
    return {"seed": seed, "recipe": asdict(recipe), "code_sha256": hashlib.sha256(sources).hexdigest()}


def _read_fingerprint(folder: Path) -> object:
    try:
        return json.loads((folder / "pair.json").read_text())
    except FileNotFoundError:
        return None


def _refuse_other_content(folder: Path) -> None:
    """Said before the work: only a folder that holds an earlier pair, or nothing, may be replaced."""
    if folder.exists() and any(folder.iterdir()) and _read_fingerprint(folder) is None:
        raise FileExistsError(f"{folder} holds something other than a demo pair; name a new or empty folder")


def _put_in_place(made: Path, folder: Path, *, aside: Path) -> None:
    """Renames only, so that nobody ever sees half a pair; an earlier one steps aside first."""
    if _read_fingerprint(folder) is not None:
        folder.rename(aside)
    made.rename(folder)


def _write_progress(phase: str, step: int, total_steps: int, loss: float) -> None:
    line = {"phase": phase, "step": step, "total_steps": total_steps, "loss": round(loss, 4)}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo's base/instruct pair.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # The caller draws its own bar from the lines on stdout.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    build_pair(arguments.folder, seed=arguments.seed, on_progress=_write_progress)


if __name__ == "__main__":
    main()
