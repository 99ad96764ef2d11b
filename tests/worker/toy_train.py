"""A training without a model: what the steps do towards their supervisor, in milliseconds and with faults on demand.

It stands in for the interpreter (`sys.executable`): `worker.steps.train` and `worker.steps.graft` become what PLAN, a
JSON file, says; every other command runs as it is.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from core.errors import Cause, StepFailed
from worker.progress import EXIT_SAVED, ProgressWriter, Saved
from worker.resume_manifest import PointRefused, seal, verify
from worker.steps import child
from worker.workspace import Workspace


def train(plan: dict[str, Any], workspace: Workspace, progress: ProgressWriter) -> dict[str, Any]:
    """Counts to `steps`, each `pace` seconds long, and saves a point of one file at each step of `saves`."""
    asked = []
    if not plan.get("deaf"):
        signal.signal(signal.SIGUSR1, lambda *_: asked.append(True))
    else:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    spec, conditions = workspace.spec(), json.loads(workspace.conditions_file.read_bytes())
    begin = verify(workspace.resume_from, spec=spec.training_sha256).step if workspace.resume_from.exists() else 0
    if begin in plan["refuses"]:
        raise PointRefused("The toy does not like it.")
    micro_batch = max(1, plan["micro_batch"] // 2 ** conditions["oom_level"])
    progress.note(f"Beginning behind step {begin}", micro_batch_size=micro_batch)
    for step in range(begin + 1, plan["steps"] + 1):
        time.sleep(plan["pace"])
        meet(plan["faults"].get(str(step)), plan, micro_batch)
        progress.step(step, plan["steps"], 1.0)
        if plan.get("notes"):
            progress.note(f"Made step {step}")
        if asked or step in plan["saves"]:
            save(workspace, spec.training_sha256, step)
            progress.write(Saved(step=step))
        if asked:
            sys.exit(EXIT_SAVED)
    return {"seconds": 1.0, "input_tokens": 1}


def meet(fault: str | None, plan: dict[str, Any], micro_batch: int) -> None:
    if fault == "disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if fault == "stall":
        time.sleep(1000)
    if micro_batch <= plan["fits"]:
        return
    if fault == "memory":
        raise StepFailed(child.out_of_memory(MemoryError("toy"), retryable=micro_batch > 1))
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


def save(workspace: Workspace, spec: str, step: int) -> None:
    aside = workspace.resume_points / f".step-{step}.tmp"
    aside.mkdir(parents=True)
    (aside / "state").write_bytes(os.urandom(100_000))
    seal(aside, step=step, spec=spec)
    aside.rename(workspace.resume_points / f"step-{step}")
    for older in sorted(workspace.resume_points.glob("step-*"), key=lambda path: path.stat().st_mtime)[:-2]:
        shutil.rmtree(older)


def graft(plan: dict[str, Any], workspace: Workspace, progress: ProgressWriter) -> dict[str, Any]:
    if plan["grafting"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(plan["grafting"])
    raise StepFailed(Cause(code="toy_end", message="The toy has nothing to graft."))


STEPS = {"worker.steps.train": ("train", train), "worker.steps.graft": ("graft", graft)}


def main() -> None:
    plan_file, *arguments = sys.argv[1:]
    module = next((name for name in STEPS if f'"{name}"' in arguments[-1]), None)
    if module is None:
        os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - the command that was asked for
    command = json.loads(arguments[-1])["command"]
    sys.argv = [module, *command[command.index(module) + 1 :]]
    name, work = STEPS[module]
    child.run(name, partial(work, json.loads(Path(plan_file).read_bytes())))


if __name__ == "__main__":
    main()
