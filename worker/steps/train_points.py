"""Resume points: the whole state of a training at a step, from which it goes on as if it had never stopped.

    model.safetensors     what is trained, by the model's own names
    optimizer.pt          these four are transformers' own: its Trainer reads them back, with `weights_only=True`,
    scheduler.pt          and finds from the step which rows of which epoch come next (their order depends on nothing
    rng_state.pth         but seed and epoch)
    trainer_state.json
    so_far.json           what was told and kept until then
    metrics.jsonl         the lines of the steps until then
    epoch-N.NAME          the adapter of the end of an earlier epoch that is still kept
    manifest.json         sha256 of each, written last

A point is made aside, synced and renamed: it is whole or it does not exist. One that damage or another training made is
refused before anything of it is loaded. The state at the very end is no point: the training's result comes next.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from core.durable import sync_folder
from core.job_spec import JobSpec
from worker.failpoints import failpoint
from worker.progress import EXIT_SAVED, ProgressWriter, Saved
from worker.resume_manifest import Manifest, PointRefused, seal, verify
from worker.steps import child
from worker.steps.train_watch import SoFar
from worker.workspace import Workspace

WEIGHTS_FILE = "model.safetensors"
SO_FAR_FILE = "so_far.json"
METRICS_FILE = "metrics.jsonl"

#: A save is followed by so many times its own time without one: saving stays a small share of the run.
REST = 20
#: Points that stay in the workspace. The supervisor may still be storing the one before the newest.
KEPT = 2


class Conditions(msgspec.Struct, frozen=True):
    """How a training is to go here and now; its numbers depend on none of it but for the order of summation."""

    save_seconds: float = 600.0
    #: How often the micro-batch is halved.
    oom_level: int = 0


def conditions_of(workspace: Workspace) -> Conditions:
    """As the supervisor wrote them; the defaults for a step that is run by hand."""
    if not workspace.conditions_file.exists():
        return Conditions()
    return msgspec.json.decode(workspace.conditions_file.read_bytes(), type=Conditions)


def find_point(workspace: Workspace, spec: JobSpec) -> Manifest | None:
    """What the point says of itself from which the training is to go on. Raises PointRefused."""
    point = workspace.resume_from
    # A link that leads nowhere is a point, too: the storage is away for a moment.
    return verify(point, spec=spec.training_sha256) if point.is_symlink() or point.exists() else None


#: What libraries raise over a state that another version of them wrote. Any other error may be this machine's fault.
_STRANGE_STATE = (
    "AttributeError",
    "IndexError",
    "KeyError",
    "TypeError",
    "UnpicklingError",
    "ValidationError",
    "ValueError",
)


@contextmanager
def loading() -> Iterator[None]:
    """Raises PointRefused where a point that is whole cannot be loaded by what is installed here."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ not in _STRANGE_STATE:
            raise
        why = f"{type(error).__name__}: {child.first_line(error)}"
        raise PointRefused(f"The resume point cannot be loaded by the libraries that are here ({why}).") from error


def restore(workspace: Workspace) -> SoFar:
    """Put back what had been told and kept at the point."""
    point = workspace.resume_from
    with loading():
        so_far = msgspec.json.decode((point / SO_FAR_FILE).read_bytes(), type=SoFar)
        TrainerState.load_from_json(str(point / TRAINER_STATE_NAME))
    shutil.copyfile(point / METRICS_FILE, workspace.metrics)
    for path in point.glob("epoch-*"):
        epoch, name = path.name.removeprefix("epoch-").split(".", 1)
        folder = workspace.checkpoint(int(epoch))
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    return so_far


def save_weights(model: Any, folder: Path) -> None:
    save_file({name: weight.detach() for name, weight in _trained(model)}, folder / WEIGHTS_FILE)


def load_weights(model: Any, folder: Path) -> None:
    """Bit by bit, and nothing left out. Raises PointRefused where the model has other weights to train."""
    trained = dict(_trained(model))
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file, torch.no_grad():
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        if shapes != {name: tuple(weight.shape) for name, weight in trained.items()}:
            raise PointRefused("The resume point holds other weights than those that are trained here.")
        for name, weight in trained.items():
            weight.copy_(file.get_tensor(name))


def _trained(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


class PointSaver(TrainerCallback):
    """Decides when a point is due, by the clock or because the supervisor asks for one, and makes it whole.

    It comes after the watcher and the keeper: their lines and files of the step belong to its point.
    """

    def __init__(
        self, workspace: Workspace, spec: JobSpec, progress: ProgressWriter, so_far: SoFar, save_seconds: float
    ) -> None:
        self._workspace = workspace
        self._spec = spec
        self._progress = progress
        self._so_far = so_far
        self._save_seconds = save_seconds
        #: Once it is, the training ends with the next point.
        self._asked = False
        self._began = self._due = 0.0
        self._disk_was_full = False

    def listen(self) -> None:
        """From now on take SIGUSR1 as the wish to save and leave; until now it just ended the process.

        Behind the last step it changes nothing: the result is as near as a point would be.
        """

        def ask(*_: Any) -> None:
            self._asked = True

        signal.signal(signal.SIGUSR1, ask)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.monotonic()
        self._due = self._began + self._save_seconds

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not _ends_epoch(state):
            control.should_save = self._is_due()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step < state.max_steps:
            control.should_save = self._is_due()

    def _is_due(self) -> bool:
        return self._asked or time.monotonic() >= self._due

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Make the point of `step`, with what `write` puts into the folder. Leaves the process if it was asked to.

        A disk without room ends nothing while the training can go on: the next point may find some.
        """
        started = time.monotonic()
        try:
            self._make(step, write)
        except Exception as error:
            if self._asked or not child.is_disk_full(error):
                raise
            self._tell_of_full_disk(step)
        else:
            self._disk_was_full = False
            self._progress.write(Saved(step=step))
            if self._asked:
                sys.exit(EXIT_SAVED)
        ended = time.monotonic()
        self._due = ended + max(self._save_seconds, REST * (ended - started))

    def _make(self, step: int, write: Callable[[Path], None]) -> None:
        folder = self._workspace.resume_points
        aside = folder / f".step-{step}.tmp"
        aside.mkdir(parents=True)
        try:
            write(aside)
            self._write_own(aside)
            failpoint(f"train.save.{step}")
            seal(aside, step=step, spec=self._spec.training_sha256)
        except Exception as error:
            full = _is_full(aside)
            shutil.rmtree(aside)
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise
        aside.rename(folder / f"step-{step}")
        sync_folder(folder)
        for older in sorted(folder.glob("step-*"), key=_step_of)[:-KEPT]:
            shutil.rmtree(older, ignore_errors=True)

    def _write_own(self, folder: Path) -> None:
        seconds = self._so_far.seconds + time.monotonic() - self._began
        so_far = msgspec.structs.replace(self._so_far, seconds=seconds)
        (folder / SO_FAR_FILE).write_bytes(msgspec.json.encode(so_far))
        shutil.copyfile(self._workspace.metrics, folder / METRICS_FILE)
        for kept in self._workspace.checkpoints.glob("step-*"):
            for path in kept.iterdir():
                _link(path, folder / f"epoch-{_step_of(kept)}.{path.name}")

    def _tell_of_full_disk(self, step: int) -> None:
        if not self._disk_was_full:
            self._progress.note(
                f"No resume point could be saved at step {step}: the worker's disk is full. The training goes on; if "
                "it is interrupted, it goes on from the point before.",
                level="warn",
            )
        self._disk_was_full = True


def _ends_epoch(state: TrainerState) -> bool:
    """Then its point is made later: after the keeper has kept the epoch's end, and before the next epoch begins."""
    return state.global_step % (state.max_steps // state.num_train_epochs) == 0


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _link(source: Path, target: Path) -> None:
    """A copy that costs nothing; a real one where the file system or an older kernel's sandbox has no links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _is_full(folder: Path) -> bool:
    """Whether the disk takes no more: torch's writer does not say why it failed."""
    try:
        with (folder / "room").open("wb") as file:
            file.write(bytes(64 * 1024))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return child.is_disk_full(error)
    return False
