"""A worker as `shadowft worker` is one, whose jobs train nothing: `python -m tests.faults.toy jobs`.

Claims, leases, sweeps, children, storage and the broker are the service's own. Toys are: what is trained, what an
admission looks at, and how soon leftovers are removed. A job's `metadata` says how many `steps` of how many `seconds`
it takes, and how it is to `act`: `deaf` to SIGTERM, as `poison` to its worker, or to find no `memory` there at first.
A file `admit-without-memory` in the data folder lets the next admission find none.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import select

from core import jobs
from core.config import get_settings
from core.ids import new_id
from core.jobs import Outcome
from core.models import Artifact, File, Job
from tests.core.test_jobs import make_spec
from worker import cleaning, pipeline, publish, sandbox, sweep, tasks
from worker.pipeline import Context, Run
from worker.workspace import write_durably

TOY_STEP = Path(__file__).with_name("toy_step.py")
#: Where toys write down what they do, below the data folder.
TOYS = "toys"
#: Of a workspace, seconds: a test does not wait a minute for it.
LEFTOVER_SECONDS = 3.0
#: An object that nobody has written to for so long is a dead process's. A step's pauses are shorter.
UNFINISHED_SECONDS = 3.0
CLEANING_SECONDS = 1.0


def tell(run: Run) -> None:
    """A job's story without models."""
    plan = _plan(run)
    if plan["act"] == "memory" and run.claim.attempt == 1:
        raise MemoryError
    run.workspace.inputs.mkdir(exist_ok=True)
    write_durably(run.workspace.spec_file, run.spec.model_dump_json().encode())
    write_durably(run.workspace.inputs / "toy.json", json.dumps(plan).encode())
    run.enter("training", "Training a toy")
    run.train()
    run.enter("publishing", "Publishing")
    outcome = _publish(run)
    if not run.lease.write(run.context.database, lambda session: jobs.succeed(session, run.claim, outcome)):
        raise pipeline.Cancelled


class NoClock:
    """A toy's phases tell nothing about how long those of a model take."""

    def __init__(self, *_: object) -> None:
        pass

    def turn_to(self, _phase: str) -> None:
        return None

    def did_step(self, *_: object) -> None:
        return None

    def stop(self) -> None:
        return None


def _plan(run: Run) -> dict[str, Any]:
    with run.context.database.reading() as session:
        labels = session.scalars(select(Job.labels).where(Job.id == run.claim.job_id)).one() or {}
    return {
        "job_id": run.claim.job_id,
        "attempt": run.claim.attempt,
        "steps": int(labels.get("steps", "5")),
        "seconds": float(labels.get("seconds", "0.02")),
        "act": labels.get("act", ""),
        "worker": os.getpid(),
        "diary": str(run.context.settings.data_dir / TOYS / "diary"),
    }


def _publish(run: Run) -> Outcome:
    key = f"{publish.prefix(run.claim)}/result.json"
    incoming = run.context.storage.receive(key)
    incoming.write(run.workspace.result("train").read_bytes())
    stored = incoming.keep()
    shared = {"team_id": run.team_id, "bytes": stored.bytes, "sha256": stored.sha256, "storage_key": key}
    run.lease.check()
    return Outcome(
        artifacts=[Artifact(id=new_id("art_"), job_id=run.claim.job_id, kind="report", path="result.json", **shared)],
        result_files=[
            File(id=new_id("file-"), filename="r", purpose="fine-tune-results", status="processed", **shared)
        ],
        trained_tokens=1,
        evaluation={"verdict": "toy"},
        graft_result={"fidelity": 1.0},
    )


def admit_waiting(context: Context) -> int:
    order = context.settings.data_dir / "admit-without-memory"
    if order.exists():
        order.unlink()
        raise MemoryError
    with context.database.reading() as session:
        waiting = session.scalars(select(Job.id).where(jobs.admissible()).order_by(Job.id)).all()
    for job_id in waiting:
        with context.database.writing() as session:
            jobs.admit(session, job_id, make_spec(job_id), memory_bytes=0)
            session.commit()
    tasks.nudge("work")
    return len(waiting)


_real_command = sandbox.command


def command(step: Sequence[str], **where: Any) -> list[str]:
    """The toy in place of the training, behind the same walls but for a door to its diary; other steps are
    themselves."""
    *program, plan = _real_command(step, **where)
    if "worker.steps.train" not in step:
        return [*program, plan]
    told = json.loads(plan)
    told["command"] = [sys.executable, "-P", str(TOY_STEP), *step[4:]]
    told["readable"].append(str(TOY_STEP.parents[2]))
    told["writable"].append(str(get_settings().data_dir / TOYS))
    return [*program, json.dumps(told)]


if __name__ == "__main__":
    pipeline._tell = tell
    pipeline.PhaseClock = NoClock  # type: ignore[assignment, misc]
    sandbox.command = command  # type: ignore[assignment]
    tasks.admit_waiting = admit_waiting  # type: ignore[assignment]
    sweep.LEFTOVER_SECONDS, sweep.CLEANING_SECONDS = LEFTOVER_SECONDS, CLEANING_SECONDS
    cleaning.UNFINISHED_SECONDS = UNFINISHED_SECONDS
    for made in (TOYS, f"{TOYS}/starts"):
        (get_settings().data_dir / made).mkdir(exist_ok=True)
    tasks.main(sys.argv[1])
