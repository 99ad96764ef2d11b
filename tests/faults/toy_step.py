"""A training of nothing: a chain of hashes, one for each step, which comes out the same however often it was resumed.

It saves its state, leaves when it is told to and obeys its lease, as `worker.steps.train` does, and starts in a tenth
of the time. inputs/toy.json says what it is to do.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()

import hashlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))

from core.durable import sync_folder  # noqa: E402
from worker.progress import EXIT_SAVED, Metrics, ProgressWriter, Saved  # noqa: E402
from worker.resume_manifest import seal, verify  # noqa: E402
from worker.steps import child  # noqa: E402
from worker.workspace import Workspace  # noqa: E402


def link(digest: str, step: int) -> str:
    return hashlib.sha256(f"{digest} {step}".encode()).hexdigest()


def chain(job_id: str, steps: int) -> str:
    """What a toy job ends with, whoever ran it."""
    digest = job_id
    for step in range(1, steps + 1):
        digest = link(digest, step)
    return digest


def main(workspace: Workspace, progress: ProgressWriter) -> dict[str, Any]:
    plan = json.loads((workspace.inputs / "toy.json").read_bytes())
    if plan["act"] == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    began = Path(plan["diary"]).with_name("starts") / f"{plan['job_id']}-{plan['attempt']}"
    began.write_text(str(BEGAN))
    told = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: told.set())
    conditions = json.loads(workspace.conditions_file.read_bytes())
    done, digest = _state(workspace, plan)
    saved = time.monotonic()
    progress.note("A toy is trained", micro_batch_size=64)
    for step in range(done + 1, plan["steps"] + 1):
        _work(plan, step)
        digest = link(digest, step)
        progress.step(step, plan["steps"])
        progress.write(Metrics(step=step, total_steps=plan["steps"], train_loss=1.0))
        if told.is_set() or time.monotonic() - saved >= conditions["save_seconds"]:
            _save(workspace, plan, step, digest)
            progress.write(Saved(step=step))
            saved = time.monotonic()
        if told.is_set():
            sys.exit(EXIT_SAVED)
    return {"steps": plan["steps"], "digest": digest}


def _work(plan: dict[str, Any], step: int) -> None:
    with Path(plan["diary"]).open("a") as diary:  # one write each, appended: lines of two writers do not mix
        diary.write(f"{plan['job_id']} {plan['attempt']} {step} {time.monotonic():.3f}\n")
    if plan["act"] == "poison":
        os.kill(plan["worker"], signal.SIGKILL)
    time.sleep(plan["seconds"])


def _state(workspace: Workspace, plan: dict[str, Any]) -> tuple[int, str]:
    if not workspace.resume_from.exists():
        return 0, plan["job_id"]
    manifest = verify(workspace.resume_from, spec=workspace.spec().training_sha256)
    return manifest.step, (workspace.resume_from / "digest").read_text()


def _save(workspace: Workspace, plan: dict[str, Any], step: int, digest: str) -> None:
    workspace.resume_points.mkdir(exist_ok=True)
    aside = workspace.resume_points / f".step-{step}.tmp"
    aside.mkdir()
    (aside / "digest").write_text(digest)
    seal(aside, step=step, spec=workspace.spec().training_sha256)
    aside.rename(workspace.resume_points / f"step-{step}")
    sync_folder(workspace.resume_points)


if __name__ == "__main__":
    child.run("train", main)
