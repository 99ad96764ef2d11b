"""Times a job's phases, so that later jobs can be told how long they will take (see core/history.py)."""

from __future__ import annotations

import json
import time
from functools import cached_property
from typing import Any

from core.checkpoints import Checkpoint, read_checkpoint
from core.history import device_kind
from core.job_spec import JobSpec
from core.jobs import Claim, Phase
from core.models import PhaseTime
from worker.left_files import read_left
from worker.workspace import Workspace


class PhaseClock:
    """Runs from the claim on. Only a first attempt is timed: a later one finds steps done that it would take for
    quick."""

    def __init__(self, spec: JobSpec, workspace: Workspace, claim: Claim, device: str) -> None:
        self._spec = spec
        self._workspace = workspace
        self._claim = claim
        self._device = device
        self._phase: Phase = "preparing"
        self._began = time.monotonic()
        self._busy_seconds: float | None = None
        self._work = 0
        self._is_stopped = False

    def did_step(self, name: str, result: dict[str, Any]) -> None:
        """Take from a step's result how much it did, and in what time once it had started."""
        self.did(_work_of(name, result, self._workspace), busy_seconds=result["seconds"])

    def did(self, work: int, *, busy_seconds: float | None = None) -> None:
        """How much the running phase had to do; all of its time was for that where `busy_seconds` is None."""
        self._work, self._busy_seconds = work, busy_seconds

    def turn_to(self, phase: Phase) -> PhaseTime | None:
        """Begin `phase`; what is to be kept of the one before."""
        if self._phase == "preparing":
            self.did(self._hub_bytes())
        ended = self.end()
        self._phase, self._began = phase, time.monotonic()
        self._busy_seconds, self._work = None, 0
        return ended

    def stop(self) -> None:
        """From here on nothing is kept: the work is not done from its beginning."""
        self._is_stopped = True

    def end(self) -> PhaseTime | None:
        """What is to be kept of the running phase, now that it has done its work."""
        if self._claim.attempt > 1 or self._is_stopped:
            return None
        seconds = time.monotonic() - self._began
        busy = seconds if self._busy_seconds is None else self._busy_seconds
        return PhaseTime(
            job_id=self._claim.job_id,
            pair=self._spec.pair.name,
            tuning="graft" if self._spec.kind == "graft" else self._spec.tuning.type,
            phase=self._phase,
            device=device_kind(self._device),
            seconds=seconds,
            busy_seconds=busy if self._work else 0.0,
            parameters=self._instruct.parameter_count,
            work=self._work,
        )

    def _hub_bytes(self) -> int:
        """Of the models that may have been downloaded."""
        instruct = self._instruct.total_bytes if self._spec.pair.instruct.kind == "hub" else 0
        if self._spec.delta is not None or self._spec.pair.base.kind != "hub":
            return instruct
        return instruct + read_checkpoint(self._workspace.base).total_bytes

    @cached_property
    def _instruct(self) -> Checkpoint:
        return read_checkpoint(self._workspace.instruct)


def _work_of(name: str, result: dict[str, Any], workspace: Workspace) -> int:
    if name == "train":
        return int(result["input_tokens"])
    if name == "graft":
        return sum(int(figures["bytes"]) for figures in result["scales"].values())
    report = json.loads(read_left(workspace.report, below=workspace.root))
    return len(report["variants"]) * sum(int(one["rows"]) for one in report["sets"].values())
