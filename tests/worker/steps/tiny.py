"""Tiny real models, tokenizers, rows and workspaces, made from scratch in a few milliseconds."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from core.datasets import Conversation, Message
from core.job_spec import DataSource, Evaluation, Graft, JobSpec, ModelSource, PairSource, Publish, Tuning
from worker.progress import Line, ProgressWriter, read_lines
from worker.workspace import Workspace

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT_MARKS = ["<|end|>", "<|im_start|>", "<|im_end|>"]
WORDS = ("sun", "moon", "rain", "wind", "leaf")


def make_tokenizer(
    template: str | None, *, marks: Iterable[str] = CHAT_MARKS, first: str = ""
) -> PreTrainedTokenizerFast:
    """One token a byte, and the marks. Another `first` letter of the alphabet moves every id."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (letter != first, letter))
    tokenizer = Tokenizer(models.BPE(vocab={letter: position for position, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    listed = list(marks)
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in listed])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=listed[-1], pad_token=listed[0], chat_template=template
    )


def make_model(seed: int = 0, *, tied: bool = True, std: float = 0.02) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=256 + len(CHAT_MARKS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=std,
        pad_token_id=256,
        eos_token_id=258,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def make_expert_model(seed: int = 0) -> Qwen3MoeForCausalLM:
    """The same with experts, which transformers keeps as fused parameters and stores one by one."""
    torch.manual_seed(seed)
    shape = make_model().config.to_dict() | {"model_type": "qwen3_moe", "architectures": None}
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**shape, **experts}))


def save_model(folder: Path, model: PreTrainedModel, *, template: str | None = CHATML, dtype: torch.dtype) -> Path:
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return folder


def conversation(prompt: str, answer: str) -> Conversation:
    return Conversation((Message("user", prompt, False), Message("assistant", answer, True)))


def make_rows(count: int) -> list[Conversation]:
    """A word is asked for, the same word in capitals is the answer."""
    return [conversation(f"{WORDS[n % 5]} {n}", WORDS[n % 5].upper()) for n in range(count)]


def write_rows(path: Path, rows: Iterable[Conversation]) -> Path:
    lines = [
        {
            "messages": [
                {"role": one.role, "content": one.content}
                | ({"weight": int(one.train)} if one.role == "assistant" else {})
                for one in row.messages
            ]
        }
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_spec(**changes: Any) -> JobSpec:
    """A full spec; `changes` go to the part that knows their name."""
    nowhere = DataSource(file_id="file-1", filename="rows.jsonl", storage_key="k", sha256="0" * 64)
    tuning = {
        "type": "lora", "n_epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "lr_scheduler": "cosine",
        "warmup_ratio": 0.1, "weight_decay": 0.0, "max_grad_norm": 1.0, "max_length": 128, "precision": "auto",
        "rank": 4, "alpha": 8, "dropout": 0.0,
    }  # fmt: skip
    evaluation = {
        "scales": (), "exact_match": "auto", "max_rows": 50, "max_new_tokens": 8, "probes": {}, "left_out": None
    }  # fmt: skip
    graft = {"scale": 1.0, "scope": "linear", "include": (), "exclude": (), "output_dtype": "auto"}
    job = {"strategy": "shadow", "holdout_ratio": 0.2, "seed": 7, "kind": "fine_tune", "delta": None, "publish": False}
    parts = (tuning, evaluation, graft, job)
    for part in parts:
        part |= {name: value for name, value in changes.items() if name in part}
    unknown = changes.keys() - set().union(*parts)
    assert not unknown, unknown
    return JobSpec(
        job_id="ftjob-1",
        kind=job["kind"],
        strategy=job["strategy"],
        pair=PairSource(
            name="tiny",
            base=ModelSource(kind="local", location="/models/tiny-base"),
            instruct=ModelSource(kind="local", location="/models/tiny-instruct"),
        ),
        training=nowhere,
        validation=None,
        holdout_ratio=job["holdout_ratio"],
        seed=job["seed"],
        tuning=Tuning(**tuning),
        graft=Graft(**graft),
        evaluation=Evaluation(**(evaluation | {"probes": dict.fromkeys(evaluation["probes"], nowhere)})),
        publish=Publish(delta=job["publish"]),
        delta=job["delta"],
        fine_tuned_model="ft:tiny:team::1",
    )


def make_workspace(root: Path, models: Path, spec: JobSpec, rows: Iterable[Conversation]) -> Workspace:
    """A job's folder as `worker.inputs` leaves it: rows copied, the folders of `models` linked."""
    workspace = Workspace(root)
    write_rows(workspace.training, rows)
    workspace.base.symlink_to(models / "base")
    workspace.instruct.symlink_to(models / "instruct")
    workspace.spec_file.write_text(spec.model_dump_json())
    for step in ("train", "evaluate"):
        workspace.begin(step)
    return workspace


CHATML_TOKENIZER = make_tokenizer(CHATML)


def opening_ids(row: Conversation) -> list[int]:
    """The question up to where the answer starts, in ChatML, without the code under test."""
    return CHATML_TOKENIZER.encode(f"<|im_start|>user\n{row.messages[0].content}<|im_end|>\n<|im_start|>assistant\n")


def answer_losses(model: Any, row: Conversation) -> torch.Tensor:
    """The loss of each token of the answer and of its end mark, by hand."""
    opening, answer = opening_ids(row), CHATML_TOKENIZER.encode(f"{row.messages[1].content}<|im_end|>")
    logits = model(torch.tensor([opening + answer])).logits[0]  # (L, V)
    return cross_entropy(logits[len(opening) - 1 : -1], torch.tensor(answer), reduction="none")


def greedy_answer(model: Any, row: Conversation, limit: int) -> str:
    """One token after the other, each from the whole text before it."""
    ids, made = opening_ids(row), []
    while len(made) < limit and made[-1:] != [258]:
        made.append(model(torch.tensor([ids + made])).logits[0, -1].argmax().item())
    return CHATML_TOKENIZER.decode(made, skip_special_tokens=True)


def teach(model: Qwen3ForCausalLM, rows: list[Conversation], steps: int) -> Qwen3ForCausalLM:
    """Learn the answers by heart."""
    openings = [opening_ids(row) for row in rows]
    answers = [CHATML_TOKENIZER.encode(f"{row.messages[1].content}<|im_end|>") for row in rows]
    texts = [torch.tensor(opening + answer) for opening, answer in zip(openings, answers, strict=True)]
    ids = pad_sequence(texts, batch_first=True, padding_value=256)  # (B, L)
    labels = ids.masked_fill(ids == 256, -100)
    for row, opening in enumerate(openings):
        labels[row, : len(opening)] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


class Heard:
    """A progress writer's other end."""

    def __init__(self) -> None:
        self._stream = io.BytesIO()
        self.writer = ProgressWriter(self._stream)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Line]:
        return read_lines(io.BytesIO(self._stream.getvalue()))  # type: ignore[arg-type]
