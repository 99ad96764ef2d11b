"""`make demo`: the main job from end to end, over HTTP, on a service of its own, and what came of it.

Acts: the pair is made (once), the service is started, the data is uploaded, a Shadow-FT job and a direct one run, the
grafted model is downloaded and asked, and everything that was started is stopped, whatever happened on the way.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cli.serve import die_with_parent
from core.errors import Conflict, InvalidInput, ShadowError
from demo.client import Client, free_port
from demo.data import RECIPE, write_datasets
from demo.results import show_answers, show_comparison, show_next_steps

#: The scales of one training's three grafts; the first is published.
PUBLISHED_SCALE = 0.75
OTHER_SCALES = [0.5, 1.0]
PAIR_NAME = "demo"
#: The service must answer within this time; a loaded machine takes its time to import.
START_SECONDS = 120.0
STOP_SECONDS = 60.0
POLL_SECONDS = 0.3
#: Tokens of a row (bytes, for the demo's tokenizer): what is longer costs minutes on a CPU.
MAX_LENGTH = 512

console = Console()


@dataclass(frozen=True)
class Plan:
    """What this run trains, and on what."""

    model: str
    base: str | None
    instruct: str | None
    files: dict[str, Path]
    request: dict[str, Any]


def run(folder: Path, *, data: Path | None, pair: str | None) -> int:
    """Run the demo in `folder`; its exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _only_one(folder):
            _play(folder, data, pair)
    except KeyboardInterrupt:
        console.print("\nStopped; nothing is left running.", style="yellow")
        return 130
    except ShadowError as error:
        console.print(f"\n[red]The demo failed:[/] {error.message} {error.hint}".rstrip(), highlight=False)
        return 1
    return 0


def _play(folder: Path, data: Path | None, pair: str | None) -> None:
    started = time.monotonic()
    plan = _own_plan(folder) if data is None and pair is None else _other_plan(folder, data, pair)
    with _service(folder) as client:
        _register(client, plan)
        uploads = {name: _upload(client, path) for name, path in plan.files.items()}
        shadow = _run_job(client, "shadow", _request(plan, uploads, "shadow"))
        direct = _run_job(client, "direct", _request(plan, uploads, "direct"))
        results = folder / "results" / shadow["id"]
        client.download(shadow["id"], results)
        evaluation = client.evaluation(shadow["id"])
        show_comparison(console, evaluation, client.evaluation(direct["id"]))
        if evaluation["samples"]:  # of fewer than ten rows none is held out
            show_answers(console, *_one_question(plan, evaluation, results / "model"))
        show_next_steps(console, client, shadow, uploads["training"], results)
    console.print(f"Done in {time.monotonic() - started:.0f} s; the service is stopped.")


# --- plans ----------------------------------------------------------------------------------------------------------


def _own_plan(folder: Path) -> Plan:
    models = _make_pair(folder / "pair")
    files = write_datasets(folder / "data")
    return Plan(
        model=PAIR_NAME,
        base=str(models / "base"),
        instruct=str(models / "instruct"),
        files=files,
        request=_job_request(RECIPE, exact_match="on"),
    )


def _other_plan(folder: Path, data: Path | None, pair: str | None) -> Plan:
    """The user's data, the user's pair, or both. Rows are held out of the data; losses are compared."""
    if data is not None and not data.is_file():
        raise InvalidInput(f"There is no file {data}; DATA names a JSONL file or a JSON array.")
    training = {"training": data} if data else {"training": write_datasets(folder / "data")["training"]}
    if pair is not None:
        # A real model, and the paper's recipe.
        return Plan(pair, None, None, training, {"shadow": {"evaluation": {"scales": OTHER_SCALES}}})
    models = _make_pair(folder / "pair")
    recipe = {**RECIPE, "n_epochs": 1}
    request = _job_request(recipe, exact_match="off")
    return Plan(PAIR_NAME, str(models / "base"), str(models / "instruct"), training, request)


def _job_request(recipe: dict[str, Any], *, exact_match: str) -> dict[str, Any]:
    tuning = {"type": recipe["tuning_type"], "learning_rate": recipe["learning_rate"], "max_length": MAX_LENGTH}
    if recipe["tuning_type"] == "lora":
        tuning["rank"] = recipe["rank"]
    return {
        "method": {
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": recipe["n_epochs"], "batch_size": recipe["batch_size"]},
            },
        },
        "seed": 0,
        "shadow": {
            "tuning": tuning,
            "graft": {"scale": PUBLISHED_SCALE},
            "evaluation": {"scales": OTHER_SCALES, "exact_match": exact_match, "max_new_tokens": 24},
        },
    }


def _request(plan: Plan, uploads: dict[str, str], strategy: str) -> dict[str, Any]:
    shadow = {**plan.request["shadow"], "strategy": strategy}
    probes = {name: file_id for name, file_id in uploads.items() if name not in {"training", "validation"}}
    evaluation = {**shadow["evaluation"], "probes": probes}
    if strategy == "direct":
        del evaluation["scales"]
        shadow.pop("graft", None)
    request = {
        **plan.request,
        "model": plan.model,
        "training_file": uploads["training"],
        "suffix": "demo",
        "shadow": {**shadow, "evaluation": evaluation},
    }
    return {**request, "validation_file": uploads["validation"]} if "validation" in uploads else request


# --- acts -----------------------------------------------------------------------------------------------------------


def _make_pair(folder: Path) -> Path:
    """Run demo.pair as a child: its memory comes back, and this process stays free of torch."""
    command = [sys.executable, "-m", "demo.pair", str(folder)]
    with (
        _bar() as bar,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent()) as child,
    ):
        task = bar.add_task("the demo pair", total=None, note="")
        for line in child.stdout or ():
            progress = msgspec.json.decode(line)
            note = f"{progress['phase']}  loss {progress['loss']:.3f}"
            bar.update(task, total=progress["total_steps"], completed=progress["step"], note=note)
    if child.returncode != 0:
        raise ShadowError("The demo pair could not be made; the lines above say why.")
    return folder


@contextmanager
def _service(folder: Path) -> Iterator[Client]:
    """`shadowft serve` with a data folder and a port of its own."""
    data_dir, port = folder / "service", free_port()
    log_file = folder / "service.log"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SHADOWFT_")},
        "SHADOWFT_DATA_DIR": str(data_dir),
        "SHADOWFT_PORT": str(port),
        "SHADOWFT_MODEL_ROOTS": str(folder / "pair"),
        # Nobody waits long for a cancel here, not even of a step that does not listen.
        "SHADOWFT_BEAT_SECONDS": "3",
        "SHADOWFT_CANCEL_GRACE_SECONDS": "5",
    }
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", "serve"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C stops the demo, which then stops the service in order
            preexec_fn=die_with_parent(),
        )
    try:
        yield _wait_until_ready(process, port, data_dir / "admin.key", log_file)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, key_file: Path, log_file: Path) -> Client:
    deadline = time.monotonic() + START_SECONDS
    with console.status("Starting the service"):
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ShadowError(f"The service ended with status {process.returncode}; see {log_file}.")
            if key_file.exists():
                client = Client(f"http://127.0.0.1:{port}", key_file.read_text().strip(), key_file)
                if client.is_ready():
                    console.print(f"The service runs; its page is {client.url}/docs", soft_wrap=True)
                    return client
            time.sleep(POLL_SECONDS)
    raise ShadowError(f"The service did not become ready within {START_SECONDS:.0f} s; see {log_file}.")


def _register(client: Client, plan: Plan) -> None:
    if plan.base is None or any(pair["name"] == plan.model for pair in client.get("/v1/pairs")["data"]):
        return
    client.post("/v1/pairs", {"name": plan.model, "base": plan.base, "instruct": plan.instruct})


def _upload(client: Client, path: Path) -> str:
    """The file's id; an earlier run's upload of the same bytes serves again."""
    file = client.find_file(path) or client.upload(path)
    while file["status"] == "uploaded":
        time.sleep(POLL_SECONDS)
        file = client.get(f"/v1/files/{file['id']}")
    if file["status"] == "error":
        raise InvalidInput(f"The file {path.name} cannot be used: {file['status_details']}")
    console.print(f"Uploaded {path.name}: {file['validation']['rows']} rows, {file['id']}", soft_wrap=True)
    file_id: str = file["id"]
    return file_id


def _run_job(client: Client, title: str, request: dict[str, Any]) -> dict[str, Any]:
    """Submit a job and follow it to its end."""
    job = client.post("/v1/fine_tuning/jobs", request)
    with _bar() as bar:
        task = bar.add_task(f"job {title}", total=None, note=job["status"])
        try:
            while job["status"] not in {"succeeded", "failed", "cancelled"}:
                time.sleep(POLL_SECONDS)
                job = client.get(f"/v1/fine_tuning/jobs/{job['id']}")
                _draw(bar, task, job)
        except BaseException:
            client.try_cancel(job["id"])
            raise
        bar.update(task, total=1, completed=1, note=job["status"])
    if job["status"] != "succeeded":
        reason = job["error"] or {"message": f"it was {job['status']}", "hint": ""}
        raise ShadowError(f"The job {job['id']} did not succeed: {reason['message']}", hint=reason["hint"])
    return job


def _draw(bar: Progress, task: Any, job: dict[str, Any]) -> None:
    progress = job["progress"] or {}
    loss = progress.get("loss")
    eta = progress.get("eta_seconds")
    parts = [
        job["phase"] or job["status"],
        f"step {progress['step']}/{progress['total_steps']}" if progress else "",
        f"loss {loss:.3f}" if loss is not None else "",
        f"ETA {eta:.0f} s" if eta is not None else "",
        job["waiting_for"] or "",
    ]
    note = "  ".join(part for part in parts if part)
    bar.update(task, total=progress.get("total_steps"), completed=progress.get("step", 0), note=note)


def _one_question(plan: Plan, evaluation: dict[str, Any], model: Path) -> tuple[str, str, str]:
    """A held-out question, and its answer before and after. The demo's own pair is asked through the downloaded files;
    of a large one the evaluation's sample is shown, since this machine may not hold it."""
    sample = evaluation["samples"][0]
    if plan.instruct is None:
        return sample["prompt"], sample["answers"]["instruct"], sample["answers"][evaluation["published"]]
    before, after = _ask(sample["prompt"], plan.instruct, str(model))
    return sample["prompt"], before, after


def _ask(question: str, *folders: str) -> list[str]:
    """The folders' answers, as anyone gets them who loads these with transformers."""
    command = [sys.executable, "-m", "demo.ask", question, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ShadowError(f"The downloaded model could not be asked: {done.stderr.strip().splitlines()[-1:]}")
    answers: list[str] = msgspec.json.decode(done.stdout)
    return answers


# --- around the acts ------------------------------------------------------------------------------------------------


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(
                f"Another demo is running in {folder}.", hint="Wait for it, or give this one a --folder of its own."
            ) from error
        yield


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
