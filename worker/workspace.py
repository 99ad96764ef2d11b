"""The names of every file in a job's folder.

job.json            JobSpec
inputs/             training, validation, probes/NAME; base and instruct are links, never copies
train/              adapter/ (LoRA) or model/ (full), metrics.jsonl, result.json
graft/SCALE/        one model folder for each scale
evaluate/           report.json, report.md
logs/STEP.log       what a step printed
STEP/failure.json   why a step gave up, when it knows
STEP/done.json      the completion mark, written last: a step that has one is not run again
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from core.durable import sync_folder
from core.job_spec import JobSpec


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
    def adapter(self) -> Path:
        return self.step("train") / "adapter"

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
        """An empty folder for the step: what a killed run left there is worth nothing without its mark."""
        folder = self.step(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
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
