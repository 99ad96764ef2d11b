"""Whether the OpenAPI page tells the truth: Schemathesis asks every route what it says that it takes, and what it says
that it does not, and compares the answers with the page."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from sqlalchemy import update

from core.ids import new_id
from core.models import Checkpoint, File
from tests import fake_hub
from tests.api.talk import MODEL, ROW, Client
from tests.core.test_pairs import write_model
from tests.servers import run_api

PROGRAM = Path(sys.executable).with_name("schemathesis")
FILES = {"model/config.json": b"{}", "model/w.safetensors": b"w" * 100, "adapter/adapter_model.safetensors": b"a"}

CONFIG = """
# A schema cannot say everything that is wrong with a request (a file of another purpose, a page of another list), and
# such a request is answered with a 400, too.
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", 400, 401, 403, 404, 409, 413, 416, 429]

# These two lie below a path whose last part is an id, so that `Allow` names the methods of that as well.
[[operations]]
include-path = ["/v1/fine_tuning/jobs/estimate", "/v1/pairs/check", "/v1/pairs/check/{check_id}"]
checks.allow_header_conformance.enabled = false
"""


@pytest.fixture(scope="module")
def client(fresh_settings, tmp_path_factory) -> Iterator[Client]:
    """An admin of a team that has one of everything. The only models on the Hub are those of one pair."""
    folder = tmp_path_factory.mktemp("schemathesis")
    for name in ("Qwen2.5-0.5B", "Qwen2.5-0.5B-Instruct"):
        write_model(folder / "hub" / "Qwen" / name)
    limits = {"max_file_bytes": 100_000, "max_json_bytes": 50_000, "log_level": "error"}
    with (
        pytest.MonkeyPatch.context() as patch,
        fake_hub.serve(folder / "hub") as url,
        fresh_settings("sqlite", folder / "data", **limits) as settings,
        run_api(settings) as api,
    ):
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        made = Client(api, api.member(is_admin=True))
        with made.http:
            yield made


def known_ids(client: Client) -> dict[str, list[str]]:
    """What the routes' ids can name, by the parameter's place."""
    file_id = client.upload()
    report = {"ok": True, "rows": 1, "characters": 7, "longest_row": {"row": 1, "characters": 7}, "warnings": {}}
    with client.api.database.writing() as session:
        session.execute(update(File).where(File.id == file_id).values(status="processed", report=report))
        session.commit()
    job_id, waiting_id = client.submit(file_id), client.submit(file_id)
    client.finish(job_id, FILES)
    checkpoint_id, metrics = new_id("ftckpt_"), {"step": 1, "train_loss": 1.5}
    with client.api.database.writing() as session:
        session.add(Checkpoint(id=checkpoint_id, job_id=job_id, step=1, metrics=metrics, folder="adapter"))
        session.commit()
    model = client.http.get(f"/fine_tuning/jobs/{job_id}").json()["fine_tuned_model"]
    artifacts = client.http.get(f"/fine_tuning/jobs/{job_id}/artifacts").json()["data"]
    events = client.http.get(f"/fine_tuning/jobs/{job_id}/events").json()["data"]
    declared = {"bytes": len(ROW), "filename": "rows.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    upload_id = client.http.post("/uploads", json=declared).json()["id"]
    part_id = client.http.post(f"/uploads/{upload_id}/parts", files={"data": ROW}).json()["id"]
    checked = client.http.post("/pairs/check", json={"pair": MODEL, "depth": "headers"}).json()
    assert checked["status"] == "completed", checked
    return {
        "path.file_id": [file_id, client.upload()],
        # A stream of a job that waits would not end.
        "path.job_id": [job_id],
        "path.graft_id": [client.graft(job_id)],
        "path.artifact_id": [artifact["id"] for artifact in artifacts],
        "path.upload_id": [upload_id],
        "path.pair_id": [MODEL],
        "path.check_id": [checked["id"]],
        "path.model": [model, f"{model}:ckpt-step-1", MODEL, "Qwen/Qwen2.5-0.5B"],
        "query.after": [file_id, job_id, waiting_id, checkpoint_id, events[-1]["id"], artifacts[0]["id"]],
        "header.Last-Event-ID": [events[-1]["id"]],
        "body.training_file": [file_id],
        "body.model": [MODEL],
        "body.target": [MODEL],
        "body.source": [job_id, model, checkpoint_id],
        "body.pair": [MODEL],
        "body.part_ids[*]": [part_id],
    }


def write_config(path: Path, known: dict[str, list[str]]) -> None:
    """Every second id is a known one."""
    dictionaries = [f"d{number} = {{ values = {values!r} }}" for number, values in enumerate(known.values())]
    parameters = [f'"{name}" = {{ dictionary = "d{number}", probability = 0.5 }}' for number, name in enumerate(known)]
    path.write_text("\n".join(["[dictionaries]", *dictionaries, "[parameters]", *parameters, CONFIG]))


def run(client: Client, folder: Path, *options: str) -> str:
    """What it says in the end, where it has found nothing."""
    write_config(folder / "schemathesis.toml", known_ids(client))
    program = [PROGRAM, "--config-file", folder / "schemathesis.toml", "run", f"{client.api.url}/openapi.json"]
    header = f"Authorization: {client.member.headers['authorization']}"
    fixed = ["--header", header, "--generation-deterministic", "--seed", "1"]
    plain = ["--no-color", "--warnings", "off", "--continue-on-failure"]
    done = subprocess.run([*program, *fixed, *plain, *options], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    return done.stdout.partition("= SUMMARY =")[2]


def test_every_answer_to_a_few_requests_stands_on_the_page(client, tmp_path, record_property):
    said = run(client, tmp_path, "--phases", "examples,fuzzing,stateful", "--max-examples", "4")
    record_property("summary", f"schemathesis, short: {cases(said)}")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_answer_to_thousands_of_requests_stands_on_the_page(client, tmp_path, record_property):
    said = run(client, tmp_path, "--phases", "examples,coverage,fuzzing,stateful", "--max-examples", "60")
    record_property("summary", f"schemathesis, long: {cases(said)}")


def cases(said: str) -> str:
    return next(line.strip() for line in said.splitlines() if "generated" in line)
