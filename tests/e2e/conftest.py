"""A tiny real pair, and the whole service as its users start it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from openai import OpenAI

from tests.servers import Running
from tests.worker.steps.tiny import make_model, make_rows, save_model, write_rows

ROWS = 60
#: Of the job that most tests look at.
EPOCHS = 5
TUNING = {"learning_rate": 1e-2, "rank": 4}
FULL_GRAFT = {"scale": 0.7, "exclude": ["*.o_proj.weight"]}


class Tiny(NamedTuple):
    folder: Path
    base: Path
    instruct: Path
    rows: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Base and instruct a light touch apart, and rows to tune on."""
    folder = tmp_path_factory.mktemp("models")
    base = save_model(folder / "base", make_model(0), template=None, dtype=torch.float32)
    model = make_model(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    instruct = save_model(folder / "instruct", model, dtype=torch.float32)
    return Tiny(folder, base, instruct, write_rows(folder / "rows.jsonl", make_rows(ROWS)))


class Ready(NamedTuple):
    """A running service in which the tiny pair is registered and its rows are uploaded."""

    url: str
    data_dir: Path
    process: Any
    client: OpenAI
    file_id: str


@pytest.fixture(scope="session")
def make_ready(running_service: Callable[..., Running], tiny: Tiny) -> Callable[..., Ready]:
    def make(env: dict[str, str] | None = None) -> Ready:
        return prepare(running_service({**roots(tiny), **(env or {})}), tiny)

    return make


def roots(tiny: Tiny) -> dict[str, str]:
    """The setting with which a service may read the tiny pair."""
    return {"SHADOWFT_MODEL_ROOTS": str(tiny.folder)}


def prepare(ran: Running, tiny: Tiny) -> Ready:
    client = OpenAI(base_url=f"{ran.url}/v1", api_key=ran.key, max_retries=0)
    names = [pair["name"] for pair in client.get("/pairs", cast_to=dict[str, Any])["data"]]
    if "tiny" not in names:
        pair = {"name": "tiny", "base": str(tiny.base), "instruct": str(tiny.instruct)}
        client.post("/pairs", body=pair, cast_to=dict[str, Any])
    with tiny.rows.open("rb") as rows:
        file = client.files.create(file=rows, purpose="fine-tune")
    return Ready(ran.url, Path(ran.data_dir), ran.process, client, file.id)


@pytest.fixture
def ready(make_ready: Callable[..., Ready], service_env: dict[str, str]) -> Ready:
    """Once on the embedded parts and once on PostgreSQL and Redis."""
    return make_ready(service_env)


@pytest.fixture
def embedded(make_ready: Callable[..., Ready]) -> Ready:
    return make_ready()


@pytest.fixture(scope="session")
def shadow_job(make_ready: Callable[..., Ready]) -> tuple[Ready, Any]:
    """A LoRA over several epochs that has ended."""
    ready = make_ready()
    shadow = {"tuning": TUNING, "evaluation": {"scales": [0.5], "holdout_ratio": 0.2}}
    job = submit(ready, shadow, suffix="own", hyperparameters={"n_epochs": EPOCHS})
    return ready, follow(ready, job.id, has_ended)


@pytest.fixture(scope="session")
def full_job(make_ready: Callable[..., Ready]) -> tuple[Ready, Any]:
    """A full tuning that has ended and published what it learned."""
    ready = make_ready()
    tuning = {"type": "full", "learning_rate": 1e-3}
    job = submit(ready, {"tuning": tuning, "graft": FULL_GRAFT, "publish": {"delta": True}})
    return ready, follow(ready, job.id, has_ended)


def submit(ready: Ready, shadow: dict[str, Any], **fields: Any) -> Any:
    fields.setdefault("training_file", ready.file_id)
    return ready.client.fine_tuning.jobs.create(model="tiny", extra_body={"shadow": shadow}, **fields)


def follow(ready: Ready, job_id: str, until: Callable[[Any], bool], seconds: float = 120) -> Any:
    """The job once `until` holds for it; the test fails with its events where that takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job = ready.client.fine_tuning.jobs.retrieve(job_id)
        if until(job):
            return job
        time.sleep(0.1)
    pytest.fail(f"{job}\n" + "\n".join(messages(ready, job_id)))


def graft(ready: Ready, source: str, **fields: Any) -> dict[str, Any]:
    """A graft onto the tiny pair's instruct model, once it has ended."""
    body = {"target": "tiny", "source": source, **fields}
    made: dict[str, Any] = ready.client.post("/grafts", body=body, cast_to=dict[str, Any])
    follow(ready, made["id"], has_ended)
    ended: dict[str, Any] = ready.client.get(f"/grafts/{made['id']}", cast_to=dict[str, Any])
    return ended


def command_line(process: psutil.Process) -> list[str]:
    """Empty for a process that has just ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def has_ended(job: Any) -> bool:
    return job.status in {"succeeded", "failed", "cancelled"}


def messages(ready: Ready, job_id: str) -> list[str]:
    """The job's events, oldest first."""
    return [event.message for event in ready.client.fine_tuning.jobs.list_events(job_id, limit=100)][::-1]


def artifacts(ready: Ready, job_id: str) -> list[dict[str, Any]]:
    path = f"/fine_tuning/jobs/{job_id}/artifacts"
    found: list[dict[str, Any]] = ready.client.get(path, cast_to=dict[str, Any], options={"params": {"limit": 1000}})[
        "data"
    ]
    return found


def download(ready: Ready, job_id: str, folder: Path) -> dict[str, bytes]:
    """Every artifact by its path, written below `folder` too."""
    contents = {}
    for artifact in artifacts(ready, job_id):
        content = ready.client.get(f"/artifacts/{artifact['id']}/content", cast_to=bytes)
        path = folder / artifact["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        contents[artifact["path"]] = content
    return contents
