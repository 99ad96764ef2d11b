"""A deployment's database with as many jobs as are wanted, written past the API: what the API's bench polls.

python bench/yardsticks/api_rows.py FOLDER JOBS
"""

from __future__ import annotations

import json
import secrets
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from api.routes.jobs import Hyperparameters, ShadowOptions
from core.config import Settings
from core.db import open_database
from core.ids import new_id
from core.job_spec import DataSource, Evaluation, Graft, JobSpec, ModelSource, PairSource, Tuning
from core.models import Job, PhaseTime, Team, Worker
from core.schema import prepare

PAIR = PairSource(
    name="qwen3-0.6b",
    base=ModelSource(kind="hub", location="Qwen/Qwen3-0.6B-Base", revision="0" * 40),
    instruct=ModelSource(kind="hub", location="Qwen/Qwen3-0.6B", revision="0" * 40),
)
TUNING = Tuning(
    type="lora", n_epochs=1, batch_size=32, learning_rate=2e-4, lr_scheduler="cosine", warmup_ratio=0.1,
    weight_decay=0, max_grad_norm=1, max_length=4096, precision="auto", rank=128, alpha=256, dropout=0,
)  # fmt: skip
EVALUATION = Evaluation(scales=(), exact_match="auto", max_rows=200, max_new_tokens=64, probes={})
PHASES = ("training", "grafting", "evaluating", "publishing")
#: Rows that one statement inserts.
BATCH = 5000


def fill(folder: Path, jobs: int) -> tuple[str, str, list[str]]:
    """A new data folder with so many jobs: two to be polled, one that runs and one that has succeeded, and a thousand
    (or all) of the others' ids."""
    settings = Settings(_env_file=None, data_dir=folder)
    prepare(settings)
    database = open_database(settings)
    with database.writing() as session:
        team_id = session.scalars(select(Team.id)).one()
        running, succeeded = _job(team_id), _job(team_id)
        session.add(
            Worker(id="worker-x", host="h", pid=1, queue="jobs", device="cpu", lane_memory_bytes=1, version="1")
        )
        session.add_all([Job(**running, **_running()), Job(**succeeded, **_succeeded(succeeded["id"]))])
        session.flush()
        _add_history(session, succeeded["id"])
        others = [_job(team_id) for _ in range(jobs - 2)]
        for start in range(0, len(others), BATCH):
            ended = [row | _succeeded(row["id"]) for row in others[start : start + BATCH]]
            session.execute(insert(Job), ended)
        session.commit()
    database.close()
    every = max(1, len(others) // 1000)
    return running["id"], succeeded["id"], [row["id"] for row in others[::every]]


def _job(team_id: str) -> dict[str, Any]:
    job_id = new_id("ftjob-")
    request = {
        "pair": PAIR.model_dump(mode="json"),
        "hyperparameters": Hyperparameters().model_dump(mode="json"),
        "shadow": ShadowOptions().model_dump(mode="json"),
    }
    spec = JobSpec(
        job_id=job_id, kind="fine_tune", strategy="shadow", pair=PAIR, validation=None, holdout_ratio=0.05, seed=1,
        training=DataSource(file_id="file-x", filename="rows.jsonl", storage_key="k", sha256="0" * 64),
        tuning=TUNING, graft=Graft(scale=1, scope="linear"), evaluation=EVALUATION, fine_tuned_model=_name(job_id),
    )  # fmt: skip
    return {
        "id": job_id,
        "team_id": team_id,
        "kind": "fine_tune",
        "model": PAIR.name,
        "training_file_id": "file-x",
        "seed": secrets.randbelow(2**31),
        "labels": {"experiment": "a"},
        "request": request,
        "spec": spec.model_dump(mode="json"),
        "pair_check": {"verdict": "ok", "findings": [], "similarity": {"sigma_mean": 0.02}},
        "attempt": 1,
    }


def _name(job_id: str) -> str:
    return f"ft:{PAIR.name}:default::{job_id[-8:]}"


def _running() -> dict[str, Any]:
    now = datetime.now(UTC)
    return {
        "status": "running",
        "phase": "training",
        "worker_id": "worker-x",
        "lease_until": now + timedelta(days=1),
        "started_at": now,
        "phase_started_at": now,
        "progress": {"step": 10, "total_steps": 1000, "loss": 1.25},
    }


def _succeeded(job_id: str) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {
        "status": "succeeded",
        "fine_tuned_model": _name(job_id),
        "started_at": now,
        "finished_at": now,
        "trained_tokens": 1_000_000,
        "result_file_ids": ["file-y"],
        "graft_result": {"fidelity": 0.98, "discarded_share": 0.0},
        "evaluation": {"verdict": "better"},
    }


def _add_history(session: Session, job_id: str) -> None:
    """What ten earlier jobs tell about the time that the running one still takes."""
    shared = {"job_id": job_id, "pair": PAIR.name, "tuning": "lora", "device": "cpu", "parameters": 600_000_000}
    for number in range(10):
        for phase in PHASES:
            session.add(PhaseTime(phase=phase, seconds=100.0 + number, busy_seconds=90.0, work=1_000_000, **shared))


if __name__ == "__main__":
    print(json.dumps(fill(Path(sys.argv[1]), int(sys.argv[2]))))
