"""Tune the start model on the job's rows: base for Shadow-FT, instruct for direct tuning.

TRL's SFTTrainer trains and PEFT holds the adapter; both are called here and nowhere else. What they get is already
decided: token ids and labels from `worker.chat_text`, one effective batch, float32 trainable weights. Those weights are
float32 whatever the precision of the arithmetic, because bfloat16 storage swallows most of a small update.

Out comes `train/adapter` (LoRA, with `train/checkpoints/step-N` for the ends of earlier epochs) or `train/model` (full
tuning, float32 and named like the start checkpoint, so that the two can be subtracted tensor by tensor), and
`train/metrics.jsonl`. Where base has never trained the rows of the chat format's marks, the tuning begins with
Instruct's, and those lie beside what was tuned.

On the way it leaves resume points (`worker.steps.train_points`), by the clock and at SIGUSR1, which also ends it.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import constants as hub_constants
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from transformers.trainer import TRAINER_STATE_NAME
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from core.errors import StepFailed
from core.estimate import MICRO_BATCH_TOKENS
from core.graft_plan import is_linear
from core.job_spec import JobSpec
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
from worker.failpoints import failpoint
from worker.progress import ProgressWriter
from worker.start_rows_in_model import put_rows
from worker.steps import child
from worker.steps.train_output import save
from worker.steps.train_points import (
    PointSaver,
    conditions_of,
    find_point,
    load_weights,
    loading,
    restore,
    save_weights,
)
from worker.steps.train_watch import EpochKeeper, SoFar, Watcher
from worker.weights.special_rows import StartRows, row_numbers, rows_for_untrained
from worker.weights.tied_heads import refuse_untied_folders
from worker.workspace import Workspace

# TRL reports every trainer that is made to its makers unless told not to; a customer's run is nobody's business.
hub_constants.HF_HUB_DISABLE_TELEMETRY = True

#: Held-out rows measured while training; the evaluation step measures more.
VALIDATION_ROWS = 200
SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
#: Mamba's kernels take these weights bare and go around an adapter; PEFT refuses the first in some of its families.
_TAKEN_BARE = tuple(f".{mixer}.{name}" for mixer in ("mamba", "mixer") for name in ("out_proj", "x_proj"))


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
    spec, conditions = workspace.spec(), conditions_of(workspace)
    # A pair whose weights came after its admission has been looked at by its headers alone.
    start = {"base": workspace.base} if spec.tunes_base else {}
    refuse_untied_folders({"instruct": workspace.instruct, **start})
    point = find_point(workspace, spec)
    so_far = restore(workspace) if point else SoFar()
    chat = ChatText.load(workspace.instruct, base=workspace.base if spec.tunes_base else None)
    plan = make_plan(workspace, spec, chat, conditions.oom_level)
    model = load_start(workspace.start(spec), spec, plan)
    rows = lend_rows(model, workspace, chat, plan) if spec.tunes_base else {}
    watcher = Watcher(workspace.metrics, progress, plan.held_out.rows[:VALIDATION_ROWS], chat.pad_id, spec, so_far)
    keeper = EpochKeeper(so_far, workspace, spec, rows)
    saver = PointSaver(workspace, spec, progress, so_far, conditions.save_seconds)
    trainer = make_trainer(model, spec, chat, plan, watcher, keeper, saver, workspace.step("train"))
    if point:
        announce_resumed(progress, plan, point.step)
    else:
        announce_rows(progress, chat, rows)
        announce(progress, plan, spec, trainer.model)
    seconds = so_far.seconds + run_trainer(trainer, plan, workspace.resume_from if point else None)
    save(trainer.model, rows, spec, workspace)
    return {
        "steps": trainer.state.global_step,
        "trained_tokens": plan.labelled_tokens * spec.tuning.n_epochs,
        "input_tokens": plan.input_tokens * spec.tuning.n_epochs,
        "checkpoints": so_far.checkpoints,
        "rows": len(plan.training.rows),
        "rows_held_out": len(plan.held_out.rows),
        "final_train_loss": so_far.train_loss,
        "final_valid_loss": so_far.valid_loss,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(plan.input_tokens * spec.tuning.n_epochs / seconds, 1),
        "device": plan.device,
        "micro_batch_size": plan.micro_batch,
        "peak_memory_bytes": peak_memory_bytes(plan.device),
    }


def make_plan(workspace: Workspace, spec: JobSpec, chat: ChatText, oom_level: int) -> Plan:
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
    fitting = largest_micro_batch(tuning.batch_size, longest, MICRO_BATCH_TOKENS[device])
    micro_batch = largest_divisor(tuning.batch_size, fitting // 2**oom_level)
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
    return largest_divisor(batch_size, token_budget // longest)


def largest_divisor(number: int, most: int) -> int:
    """That is no larger than `most`, or else 1."""
    return next((size for size in range(min(most, number), 1, -1) if number % size == 0), 1)


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


def lend_rows(model: Any, workspace: Workspace, chat: ChatText, plan: Plan) -> StartRows:
    """Put Instruct's rows where base has never trained those of the marks in the training rows; which ones."""
    marks = chat.marks_in(plan.training.rows)
    return put_rows(model, rows_for_untrained(workspace.base, workspace.instruct, marks))


class Trainer(SFTTrainer):
    """Saves and loads the weights of a resume point in our form; all else of the point is in transformers' own."""

    saver: PointSaver

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.saver.save(self.state.global_step, self._write_state)

    def _write_state(self, folder: Path) -> None:
        self.state.log_history.clear()  # our lines are kept instead
        save_weights(self.model, folder)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading():
            super()._load_rng_state(checkpoint)


def make_trainer(
    model: Any,
    spec: JobSpec,
    chat: ChatText,
    plan: Plan,
    watcher: Watcher,
    keeper: EpochKeeper,
    saver: PointSaver,
    folder: Path,
) -> Trainer:
    trainer = Trainer(
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
        callbacks=[Failpoints(plan), watcher, keeper, saver],
    )
    trainer.saver = saver
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
    linears = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return [name for name in linears if is_linear(f"{name}.weight") and not name.endswith(_TAKEN_BARE)]


def untrained_experts(model: torch.nn.Module) -> list[str]:
    """Experts that the model keeps as one fused parameter, which LoRA does not reach."""
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    return [name for name in frozen if "experts" in name.split(".") and ".base_layer." not in name and is_linear(name)]


def announce_resumed(progress: ProgressWriter, plan: Plan, step: int) -> None:
    progress.note(
        f"The training goes on after step {step} of {plan.total_steps}.",
        step=step,
        steps=plan.total_steps,
        micro_batch_size=plan.micro_batch,
    )


def announce_rows(progress: ProgressWriter, chat: ChatText, rows: StartRows) -> None:
    if not rows:
        return
    numbers = row_numbers(rows)
    tokens = chat.tokenizer.convert_ids_to_tokens(sorted({row for some in numbers.values() for row in some}))
    progress.note(
        f"The base model has never trained the rows of {', '.join(tokens)} in {' and '.join(numbers)}; the tuning "
        "begins with the instruct model's rows for them.",
        tokens=tokens,
        start_rows=numbers,
    )


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


def run_trainer(trainer: Trainer, plan: Plan, point: Path | None) -> float:
    """Wall seconds of the training, measuring of the held-out rows included."""
    started = time.monotonic()
    trainer.saver.listen()
    try:
        trainer.train(resume_from_checkpoint=str(point) if point else None)
    except Exception as error:
        if child.is_out_of_memory(error):
            raise StepFailed(child.out_of_memory(error, retryable=plan.micro_batch > 1)) from error
        raise
    return time.monotonic() - started


class Failpoints(TrainerCallback):
    """The places of this step where tests ask for a fault."""

    def __init__(self, plan: Plan) -> None:
        self._micro_batch = plan.micro_batch

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        failpoint(f"train.step.{state.global_step + 1}", out_of_memory=torch.OutOfMemoryError)
        failpoint(f"train.micro_batch.{self._micro_batch}", out_of_memory=torch.OutOfMemoryError)


def peak_memory_bytes(device: str) -> int:
    """Of the GPU's allocator, or else of this process: imports and inputs included."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    child.run("train", main)
