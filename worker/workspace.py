"""The names of every file in a job's folder, and whose folder it is.

Each attempt has a folder of its own, `JOB-aN`, and an attempt takes over what one before it left on this machine by
renaming its folder: a finished step is not run again, and to one that lost its lease and wakes up too late its own
paths lead nowhere. That holds because nothing below makes the folder itself: only `open_workspace` does.

job.json            JobSpec
inputs/             training, validation, probes/NAME; base and instruct are links, never copies; of a graft, delta/ is
                    the change that it grafts; of a check, file or pair.json says what is checked; resume/ is the point
                    from which a training goes on, conditions.json how it is to go
train/              adapter/ and checkpoints/step-N/ (LoRA) or model/ (full), metrics.jsonl, result.json
train/resume/       step-N/: the whole state of the training at that step, manifest.json in it written last
graft/SCALE/        one model folder for each scale, and its figures in SCALE.json
graft/delta/        the change of full tuning, where it is to be published
evaluate/           report.json, report.md
logs/STEP.log       what a step printed
STEP/failure.json   why a step gave up, when it knows
STEP/done.json      the completion mark, written last: a step that has one is not run again
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from core.durable import sync_folder
from core.job_spec import JobSpec

#: Their work is taken up where a killed run left it, and they tell by themselves what is worth keeping.
RESUMED_STEPS = frozenset({"graft"})


#: Behind a job's id, and before the number of the attempt.
_ATTEMPT = "-a"


def open_workspace(work_dir: Path, job_id: str, attempt: int) -> Workspace:
    """The attempt's own folder, with all in it that the newest attempt before it left; empty where none ran here."""
    work_dir.mkdir(parents=True, exist_ok=True)
    root = work_dir / f"{job_id}{_ATTEMPT}{attempt}"
    while older := [number for number in _attempts(work_dir, job_id) if number < attempt]:
        # An attempt that is waking just now, or the one whose lease follows on its, may be quicker: look again.
        with suppress(FileNotFoundError):
            (work_dir / f"{job_id}{_ATTEMPT}{max(older)}").rename(root)
            return Workspace(root)
    root.mkdir()
    return Workspace(root)


def remove_workspaces(work_dir: Path, job_id: str) -> None:
    """The job has ended: what any of its attempts left here is needed no more."""
    for attempt in _attempts(work_dir, job_id):
        shutil.rmtree(work_dir / f"{job_id}{_ATTEMPT}{attempt}", ignore_errors=True)


def job_of(folder: str) -> str:
    """The job to which a folder of this name belongs."""
    return folder.rpartition(_ATTEMPT)[0]


def _attempts(work_dir: Path, job_id: str) -> list[int]:
    return [int(folder.name.rpartition(_ATTEMPT)[2]) for folder in work_dir.glob(f"{job_id}{_ATTEMPT}*")]


@dataclass(frozen=True)
class Workspace:
    root: Path

    @property
    def spec_file(self) -> Path:
        return self.root / "job.json"

    @property
    def inputs(self) -> Path:
        return self.root / "inputs"

    @property
    def training(self) -> Path:
        return self.inputs / "training"

    @property
    def validation(self) -> Path:
        return self.inputs / "validation"

    @property
    def base(self) -> Path:
        return self.inputs / "base"

    @property
    def instruct(self) -> Path:
        return self.inputs / "instruct"

    @property
    def delta(self) -> Path:
        """What a graft grafts: a PEFT adapter or a saved delta, as an earlier job published it."""
        return self.inputs / "delta"

    @property
    def saved_delta(self) -> Path:
        """The change that full tuning made, as it is published."""
        return self.step("graft") / "delta"

    @property
    def pair_file(self) -> Path:
        """What `inspect` is to look at of a pair; without it, it looks at a file."""
        return self.inputs / "pair.json"

    @property
    def resume_points(self) -> Path:
        """Where a training leaves its points, each in the folder `step-N`."""
        return self.step("train") / "resume"

    @property
    def resume_from(self) -> Path:
        """The point from which the training goes on; absent, it begins."""
        return self.inputs / "resume"

    @property
    def conditions_file(self) -> Path:
        """How the training is to go here and now, beside its spec: `save_seconds` and `oom_level`."""
        return self.inputs / "conditions.json"

    @property
    def adapter(self) -> Path:
        return self.step("train") / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.step("train") / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The adapter as it was at the end of an epoch before the last."""
        return self.checkpoints / f"step-{step}"

    @property
    def tuned(self) -> Path:
        """The tuned start model in float32 (full tuning only)."""
        return self.step("train") / "model"

    @property
    def metrics(self) -> Path:
        return self.step("train") / "metrics.jsonl"

    @property
    def report(self) -> Path:
        return self.step("evaluate") / "report.json"

    def start(self, spec: JobSpec) -> Path:
        """The folder of the model that is tuned."""
        return self.base if spec.strategy == "shadow" else self.instruct

    def probe(self, name: str) -> Path:
        return self.inputs / "probes" / name

    def grafted(self, scale: float) -> Path:
        return self.step("graft") / f"{scale:g}"

    def figures(self, scale: float) -> Path:
        """Written once the graft at that scale stands."""
        return self.step("graft") / f"{scale:g}.json"

    def step(self, name: str) -> Path:
        return self.root / name

    def log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"

    def failure(self, name: str) -> Path:
        return self.step(name) / "failure.json"

    def done(self, name: str) -> Path:
        return self.step(name) / "done.json"

    def result(self, name: str) -> Path:
        return self.step(name) / "result.json"

    def spec(self) -> JobSpec:
        return JobSpec.model_validate_json(self.spec_file.read_bytes())

    def begin(self, name: str) -> Path:
        """An empty folder for the step, unless it resumes: what a killed run left is worth nothing without its mark."""
        folder = self.step(name)
        if name not in RESUMED_STEPS:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        self.failure(name).unlink(missing_ok=True)
        self.log(name).parent.mkdir(exist_ok=True)
        return folder


def write_durably(path: Path, content: bytes) -> None:
    """Put `content` at `path` whole or not at all, also across a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_folder(path.parent)
