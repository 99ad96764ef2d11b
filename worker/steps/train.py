"""Tune the start model on the job's rows: base for Shadow-FT, instruct for direct tuning.

TRL's SFTTrainer trains and PEFT holds the adapter; both are called here and nowhere else. What they get is already
decided: token ids and labels from `worker.chat_text`, one effective batch, float32 trainable weights. Those weights are
float32 whatever the precision of the arithmetic, because bfloat16 storage swallows most of a small update.

Out comes `train/adapter` (LoRA, with `train/checkpoints/step-N` for the ends of earlier epochs) or `train/model` (full
tuning, float32 and named like the start checkpoint, so that the two can be subtracted tensor by tensor), and
`train/metrics.jsonl`. Where base has never trained the rows of the chat format's marks, the tuning begins with
Instruct's, and those lie beside what was tuned.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch
from datasets import Dataset
from huggingface_hub import constants as hub_constants
from peft import LoraConfig
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from core.durable import sync_files, sync_folder
from core.errors import Cause, StepFailed
from core.estimate import MICRO_BATCH_TOKENS
from core.graft_plan import is_linear
from core.job_spec import JobSpec, ModelSource
from worker.chat_text import (
    ChatText,
    EncodedRow,
    EncodedRows,
    encode_rows,
    read_set,
    require_known_ids,
    require_rows,
    require_same_tokens,
    split_rows,
)
from worker.progress import Metrics, ProgressWriter
from worker.scoring import Score, score_rows, total
from worker.start_rows_in_model import put_rows
from worker.steps import child
from worker.weights.special_rows import StartRows, row_numbers, rows_for_untrained, save_start_rows
from worker.workspace import Workspace

# TRL reports every trainer that is made to its makers unless told not to; a customer's run is nobody's business.
hub_constants.HF_HUB_DISABLE_TELEMETRY = True

#: Held-out rows measured while training; the evaluation step measures more.
VALIDATION_ROWS = 200
#: How often at most, so that many epochs over few rows stay training.
MEASUREMENTS = 10
#: Epochs' ends that are kept, counted from the last; the best one is kept besides.
LAST_EPOCHS = 3
#: What a checkpoint tells of its step: the keys of the fine-tuning contract.
CHECKPOINT_METRICS = (
    "step",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)
SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Plan:
    """What is trained on, and how it is cut into steps."""

    training: EncodedRows
    held_out: EncodedRows
    device: str
    autocast: bool
    micro_batch: int
    accumulation: int
    total_steps: int

    @property
    def input_tokens(self) -> int:
        """Tokens of one epoch, padding not counted."""
        return sum(len(row.input_ids) for row in self.training.rows)

    @property
    def labelled_tokens(self) -> int:
        """Tokens of one epoch that carry loss."""
        return sum(row.labelled for row in self.training.rows)


def main(workspace: Workspace, progress: ProgressWriter) -> dict[str, Any]:
    spec = workspace.spec()
    chat = ChatText.load(workspace.instruct, base=workspace.base if spec.tunes_base else None)
    plan = make_plan(workspace, spec, chat)
    model = load_start(workspace.start(spec), spec, plan)
    rows = lend_rows(model, workspace, chat, plan, progress) if spec.tunes_base else {}
    watcher = Watcher(workspace.metrics, progress, plan.held_out.rows[:VALIDATION_ROWS], chat.pad_id, spec)
    keeper = EpochKeeper(watcher, workspace, spec, rows)
    trainer = make_trainer(model, spec, chat, plan, [watcher, keeper], workspace.step("train"))
    announce(progress, plan, spec, trainer.model)
    seconds = run_trainer(trainer)
    save(trainer.model, rows, spec, workspace)
    return {
        "steps": trainer.state.global_step,
        "trained_tokens": plan.labelled_tokens * spec.tuning.n_epochs,
        "input_tokens": plan.input_tokens * spec.tuning.n_epochs,
        "checkpoints": keeper.checkpoints,
        "rows": len(plan.training.rows),
        "rows_held_out": len(plan.held_out.rows),
        "final_train_loss": watcher.train_loss,
        "final_valid_loss": watcher.valid_loss,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(plan.input_tokens * spec.tuning.n_epochs / seconds, 1),
        "device": plan.device,
        "micro_batch_size": plan.micro_batch,
        "peak_memory_bytes": peak_memory_bytes(plan.device),
    }


def make_plan(workspace: Workspace, spec: JobSpec, chat: ChatText) -> Plan:
    tuning = spec.tuning
    split = split_rows(workspace, spec)
    if spec.tunes_base:
        require_same_tokens(chat, workspace.base, split.training)
    training = encode_rows(chat, split.training, tuning.max_length)
    held_out = encode_rows(chat, split.held_out, tuning.max_length)
    require_rows(training, tuning.max_length)
    if spec.tunes_base:
        require_known_ids(chat, workspace.base, chain(training.rows, held_out.rows, _probed(workspace, spec, chat)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    longest = max(len(row.input_ids) for row in training.rows)
    micro_batch = largest_micro_batch(tuning.batch_size, longest, MICRO_BATCH_TOKENS[device])
    return Plan(
        training=training,
        held_out=held_out,
        device=device,
        autocast=tuning.precision == "bfloat16" or (tuning.precision == "auto" and device == "cuda"),
        micro_batch=micro_batch,
        accumulation=tuning.batch_size // micro_batch,
        total_steps=math.ceil(len(training.rows) / tuning.batch_size) * tuning.n_epochs,
    )


def _probed(workspace: Workspace, spec: JobSpec, chat: ChatText) -> Iterator[EncodedRow]:
    """What the tuned base will be measured on."""
    for name in spec.evaluation.probes:
        rows = read_set(workspace.probe(name))[: spec.evaluation.max_rows]
        yield from encode_rows(chat, rows, spec.tuning.max_length).rows


def largest_micro_batch(batch_size: int, longest: int, token_budget: int) -> int:
    """The most rows for one forward pass. A divisor of the batch, so that the effective batch stays what was asked."""
    divisors = (size for size in range(batch_size, 1, -1) if batch_size % size == 0)
    return next((size for size in divisors if size * longest <= token_budget), 1)


def load_start(folder: Path, spec: JobSpec, plan: Plan) -> Any:
    """The model in float32. Where only an adapter is trained on a GPU, the frozen weights stay as they are stored."""
    stored = spec.tuning.type == "lora" and plan.device == "cuda" and spec.tuning.precision != "float32"
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto" if stored else torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    return model


def lend_rows(model: Any, workspace: Workspace, chat: ChatText, plan: Plan, progress: ProgressWriter) -> StartRows:
    """Put Instruct's rows where base has never trained those of the marks in the training rows; which ones."""
    marks = chat.marks_in(plan.training.rows)
    rows = put_rows(model, rows_for_untrained(workspace.base, workspace.instruct, marks))
    if rows:
        numbers = row_numbers(rows)
        tokens = chat.tokenizer.convert_ids_to_tokens(sorted({row for some in numbers.values() for row in some}))
        progress.note(
            f"The base model has never trained the rows of {', '.join(tokens)} in {' and '.join(numbers)}; the tuning "
            "begins with the instruct model's rows for them.",
            tokens=tokens,
            start_rows=numbers,
        )
    return rows


def make_trainer(
    model: Any, spec: JobSpec, chat: ChatText, plan: Plan, callbacks: list[TrainerCallback], folder: Path
) -> SFTTrainer:
    trainer = SFTTrainer(
        model=model,
        args=trainer_config(spec, plan, folder),
        train_dataset=Dataset.from_dict(
            {
                "input_ids": [row.input_ids for row in plan.training.rows],
                "labels": [row.labels for row in plan.training.rows],
            }
        ),
        processing_class=chat.tokenizer,
        peft_config=adapter_config(spec, model) if spec.tuning.type == "lora" else None,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trainer_config(spec: JobSpec, plan: Plan, folder: Path) -> SFTConfig:
    tuning, on_gpu = spec.tuning, plan.device == "cuda"
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=tuning.n_epochs,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        optim="adamw_torch_fused",
        learning_rate=tuning.learning_rate,
        lr_scheduler_type=SCHEDULERS[tuning.lr_scheduler],
        # A number below 1 is a share of all steps, and 1 would be one step.
        warmup_steps=min(tuning.warmup_ratio, 1 - 1e-9),
        weight_decay=tuning.weight_decay,
        max_grad_norm=tuning.max_grad_norm,
        seed=spec.seed,
        data_seed=spec.seed,
        use_cpu=not on_gpu,
        bf16=plan.autocast,
        activation_checkpointing=on_gpu,
        max_length=None,  # rows are cut already
        packing=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=on_gpu,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN must reach the watcher, not an average
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def adapter_config(spec: JobSpec, model: Any) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.tuning.rank,
        lora_alpha=spec.tuning.alpha,
        lora_dropout=spec.tuning.dropout,
        target_modules=linear_modules(model),
    )


def linear_modules(model: torch.nn.Module) -> list[str]:
    """The modules that the graft's scope `linear` takes, by name: PEFT's own "all-linear" would take routers too, and
    turn fused experts into a kind of adapter that has no plain product."""
    kinds = (torch.nn.Linear, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and is_linear(f"{name}.weight")]


def untrained_experts(model: torch.nn.Module) -> list[str]:
    """Experts that the model keeps as one fused parameter, which LoRA does not reach."""
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    return [name for name in frozen if "experts" in name.split(".") and ".base_layer." not in name and is_linear(name)]


def public_name(source: ModelSource) -> str:
    """What others may know a model by; a path of this machine would mean nothing to them."""
    return source.location if source.kind == "hub" else Path(source.location).name


def announce(progress: ProgressWriter, plan: Plan, spec: JobSpec, model: Any) -> None:
    rows, trainable = len(plan.training.rows), model.num_parameters(only_trainable=True)
    progress.note(
        f"Training on {rows} rows ({plan.labelled_tokens} tokens with loss) in {plan.total_steps} steps "
        f"on {plan.device}; {len(plan.held_out.rows)} rows are held out.",
        rows=rows,
        rows_held_out=len(plan.held_out.rows),
        tokens=plan.input_tokens,
        labelled_tokens=plan.labelled_tokens,
        steps=plan.total_steps,
        batch_size=spec.tuning.batch_size,
        micro_batch_size=plan.micro_batch,
        device=plan.device,
        autocast="bfloat16" if plan.autocast else None,
        trainable_parameters=trainable,
    )
    experts = untrained_experts(model)
    if experts:
        progress.note(
            f"LoRA leaves {len(experts)} fused expert weights of this model as they are, such as {experts[0]}; full "
            "tuning trains them.",
            level="warn",
            untrained=len(experts),
        )
    warn_of_losses(progress, "training", plan.training, spec.tuning.max_length)
    warn_of_losses(progress, "held-out", plan.held_out, spec.tuning.max_length)


def warn_of_losses(progress: ProgressWriter, name: str, rows: EncodedRows, max_length: int) -> None:
    if rows.cut or rows.dropped:
        progress.note(
            f"Of the {name} rows, {rows.cut} were cut at {max_length} tokens and {rows.dropped} were left out, "
            "having no answer to learn from.",
            level="warn",
            rows_cut=rows.cut,
            rows_dropped=rows.dropped,
        )


def run_trainer(trainer: SFTTrainer) -> float:
    """Wall seconds of the training, measuring of the held-out rows included."""
    started = time.monotonic()
    trainer.train()
    return time.monotonic() - started


class Watcher(TrainerCallback):
    """Tells the supervisor of every step, measures the held-out rows now and then, and stops at the first NaN."""

    def __init__(
        self, metrics_file: Path, progress: ProgressWriter, held_out: list[EncodedRow], pad_id: int, spec: JobSpec
    ) -> None:
        self.train_loss: float | None = None
        #: Over all tokens of the held-out rows, at the last measurement.
        self.valid_loss: float | None = None
        #: What was measured at the last step.
        self.last: dict[str, Any] = {}
        self._metrics_file = metrics_file
        self._progress = progress
        self._held_out = held_out
        self._pad_id = pad_id
        self._measurements = min(max(spec.tuning.n_epochs, 2), MEASUREMENTS)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._held_out:
            self._tell(Metrics(step=0, total_steps=state.max_steps, **self._measure(kwargs["model"])))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:  # the summary after the last step
            return
        step, total_steps = state.global_step, state.max_steps
        self.train_loss = logs["loss"]
        self._progress.step(step, total_steps, _finite_or_none(logs["loss"]))
        if not (math.isfinite(logs["loss"]) and math.isfinite(logs["grad_norm"])):
            refuse_to_go_on(step, total_steps, loss=logs["loss"], grad_norm=logs["grad_norm"])
        due = self._held_out and step in measuring_steps(total_steps, self._measurements)
        self._tell(
            Metrics(
                step=step,
                total_steps=total_steps,
                train_loss=logs["loss"],
                train_mean_token_accuracy=logs["mean_token_accuracy"],
                learning_rate=logs["learning_rate"],
                grad_norm=logs["grad_norm"],
                **(self._measure(kwargs["model"]) if due else {}),
            )
        )

    def _measure(self, model: Any) -> dict[str, float]:
        """All held-out rows that are measured are measured each time, so `valid` and `full_valid` are the same."""
        score = score_while_training(model, self._held_out, self._pad_id)
        self.valid_loss, accuracy = score.mean_loss, score.correct / score.tokens
        return {
            "valid_loss": self.valid_loss,
            "valid_mean_token_accuracy": accuracy,
            "full_valid_loss": self.valid_loss,
            "full_valid_mean_token_accuracy": accuracy,
        }

    def _tell(self, metrics: Metrics) -> None:
        self._progress.write(metrics)
        measured = {key: value for key, value in msgspec.structs.asdict(metrics).items() if value is not None}
        self.last = measured
        with self._metrics_file.open("ab") as file:
            file.write(msgspec.json.encode(measured) + b"\n")


class EpochKeeper(TrainerCallback):
    """Keeps what was measured at the ends of epochs, and of LoRA the adapter as it was there.

    Kept are the last epochs and the one with the lowest validation loss. The state at the very end is the model that is
    published, and it is saved as such.
    """

    def __init__(self, watcher: Watcher, workspace: Workspace, spec: JobSpec, rows: StartRows) -> None:
        #: `{step, metrics}` of each that is kept, in the order of their steps.
        self.checkpoints: list[dict[str, Any]] = []
        self._watcher = watcher
        self._workspace = workspace
        self._spec = spec
        self._rows = rows

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        step, is_last = state.global_step, state.global_step == state.max_steps
        adapts = self._spec.tuning.type == "lora"
        if not adapts and not is_last:  # a whole model for each epoch would be too much
            return
        if adapts and not is_last:
            self._save(kwargs["model"], self._workspace.checkpoint(step))
        metrics = {name: self._watcher.last[name] for name in CHECKPOINT_METRICS if name in self._watcher.last}
        self.checkpoints.append({"step": step, "metrics": metrics})
        for dropped in drop_old(self.checkpoints):
            shutil.rmtree(self._workspace.checkpoint(dropped))

    def _save(self, model: Any, folder: Path) -> None:
        """Whole or not at all."""
        aside = folder.with_name(f".{folder.name}.tmp")
        save_adapter(model, self._rows, self._spec.start, aside)
        sync_files(aside)
        aside.rename(folder)
        sync_folder(folder.parent)


def drop_old(checkpoints: list[dict[str, Any]]) -> list[int]:
    """Take out of the list what is neither among the last nor the best; the steps that were taken out."""
    measured = [one for one in checkpoints if "valid_loss" in one["metrics"]]
    best = min(measured, key=lambda one: one["metrics"]["valid_loss"], default=None)
    kept = [one for one in checkpoints if one is best or one in checkpoints[-LAST_EPOCHS:]]
    dropped = [one["step"] for one in checkpoints if one not in kept]
    checkpoints[:] = kept
    return dropped


def measuring_steps(total_steps: int, measurements: int) -> set[int]:
    """Evenly spaced, the last step among them."""
    return {math.ceil(total_steps * part / measurements) for part in range(1, measurements + 1)}


def score_while_training(model: Any, rows: list[EncodedRow], pad_id: int) -> Score:
    model.eval()
    score = total(score for _, score in score_rows(model, rows, pad_id))
    model.train()
    return score


def refuse_to_go_on(step: int, total_steps: int, *, loss: float, grad_norm: float) -> NoReturn:
    raise StepFailed(
        Cause(
            code="non_finite_loss",
            message=f"Training diverged at step {step} of {total_steps}: loss {loss:g}, gradient norm {grad_norm:g}.",
            hint="Use a lower learning rate (learning_rate_multiplier), a longer warm-up or a larger batch_size.",
            fault="user",
        )
    )


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def save(model: Any, rows: StartRows, spec: JobSpec, workspace: Workspace) -> None:
    if spec.tuning.type == "lora":
        save_adapter(model, rows, spec.start, workspace.adapter)
    else:
        save_tuned(model, rows, workspace.tuned)
        require_same_tensors(workspace.tuned, workspace.start(spec))


def save_adapter(model: Any, rows: StartRows, start: ModelSource, folder: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = public_name(start)
    model.peft_config["default"].revision = start.revision
    # "auto" would ask the Hub whether the vocabulary had grown; it never has here.
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's empty card, with this machine's path in it
    save_start_rows(folder, rows)
    open_to_readers(folder)


def save_tuned(model: Any, rows: StartRows, folder: Path) -> None:
    model.save_pretrained(folder)
    save_start_rows(folder, rows)
    open_to_readers(folder)


def open_to_readers(folder: Path) -> None:
    """safetensors makes files that only their owner can read; the umask decides instead, as for any other file."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o644 & ~umask)


def require_same_tensors(tuned: Path, start: Path) -> None:
    """Refuse a saved model that cannot be subtracted from its start: transformers may convert names on the way."""
    saved, published = dict(tensor_shapes(tuned)), dict(tensor_shapes(start))
    # A tied head is the embedding over again; either checkpoint may leave it out.
    differing = {name for name, _ in saved.items() ^ published.items()} - {"lm_head.weight"}
    if differing:
        raise StepFailed(
            Cause(
                code="checkpoint_converted",
                message=f"The tuned model does not match its start checkpoint in {len(differing)} tensors, "
                f"{min(differing)} among them, so no change can be told.",
                hint="Full tuning of this architecture is not supported; LoRA is.",
                fault="user",
            )
        )


def tensor_shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes from the headers of the folder's model files alone."""
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, tuple(file.get_slice(name).get_shape())


def peak_memory_bytes(device: str) -> int:
    """Of the GPU's allocator, or else of this process: imports and inputs included."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    child.run("train", main)
