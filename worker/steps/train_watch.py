"""What is told, measured and kept while a model is trained."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from core.durable import sync_files, sync_folder
from core.errors import Cause, StepFailed
from core.job_spec import JobSpec
from worker.chat_text import EncodedRow
from worker.progress import Metrics, ProgressWriter
from worker.scoring import Score, score_rows, total
from worker.steps.train_output import save_adapter
from worker.weights.special_rows import StartRows
from worker.workspace import Workspace

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


class SoFar(msgspec.Struct):
    """What a training has told and kept until now. A resume point keeps it, and the training goes on with it."""

    #: Of training, as of the run before this one.
    seconds: float = 0.0
    train_loss: float | None = None
    #: Over all tokens of the held-out rows, at the last measurement.
    valid_loss: float | None = None
    #: What was measured at the last step.
    last: dict[str, Any] = {}
    #: `{step, metrics}` of each epoch's end that is kept, in the order of their steps.
    checkpoints: list[dict[str, Any]] = []


class Watcher(TrainerCallback):
    """Tells the supervisor of every step, measures the held-out rows now and then, and stops at the first NaN."""

    def __init__(
        self,
        metrics_file: Path,
        progress: ProgressWriter,
        held_out: list[EncodedRow],
        pad_id: int,
        spec: JobSpec,
        so_far: SoFar,
    ) -> None:
        self._metrics_file = metrics_file
        self._progress = progress
        self._held_out = held_out
        self._pad_id = pad_id
        self._so_far = so_far
        self._measurements = min(max(spec.tuning.n_epochs, 2), MEASUREMENTS)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._held_out and state.global_step == 0:
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
        self._so_far.train_loss = logs["loss"]
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
        self._so_far.valid_loss, accuracy = score.mean_loss, score.correct / score.tokens
        return {
            "valid_loss": score.mean_loss,
            "valid_mean_token_accuracy": accuracy,
            "full_valid_loss": score.mean_loss,
            "full_valid_mean_token_accuracy": accuracy,
        }

    def _tell(self, metrics: Metrics) -> None:
        self._progress.write(metrics)
        measured = {key: value for key, value in msgspec.structs.asdict(metrics).items() if value is not None}
        self._so_far.last = measured
        with self._metrics_file.open("ab") as file:
            file.write(msgspec.json.encode(measured) + b"\n")


class EpochKeeper(TrainerCallback):
    """Keeps what was measured at the ends of epochs, and of LoRA the adapter as it was there.

    Kept are the last epochs and the one with the lowest validation loss. The state at the very end is the model that is
    published, and it is saved as such.
    """

    def __init__(self, so_far: SoFar, workspace: Workspace, spec: JobSpec, rows: StartRows) -> None:
        self._so_far = so_far
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
        last, checkpoints = self._so_far.last, self._so_far.checkpoints
        checkpoints.append({"step": step, "metrics": {name: last[name] for name in CHECKPOINT_METRICS if name in last}})
        for dropped in drop_old(checkpoints):
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
