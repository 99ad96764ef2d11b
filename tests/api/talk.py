"""What the API's tests say to it, and what every answer must be."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select, update

from core import jobs
from core.ids import new_id
from core.jobs import Outcome
from core.models import Artifact, File, Job, JobEvent, Pair
from core.storage import LocalStorage
from tests.core.test_jobs import make_spec
from tests.servers import PLAIN, Api, Member

ROW = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
MODEL = "qwen2.5-0.5b"
EVALUATION = {"verdict": "better"}
#: One for each kind of id in a path.
IDS = {
    "file_id": "file-x",
    "job_id": "ftjob-x",
    "graft_id": "ftjob-y",
    "artifact_id": "art_x",
    "upload_id": "upload_x",
    "pair_id": "pair-x",
    "check_id": "pchk_x",
    "model": "ft:x",
}


class Client:
    """One team's way to the API."""

    def __init__(self, api: Api, member: Member) -> None:
        self.api = api
        self.member = member
        self.http = httpx.Client(base_url=f"{api.url}/v1", headers=member.headers, timeout=30, verify=PLAIN)

    def upload(self, content: bytes = ROW, name: str = "rows.jsonl", purpose: str = "fine-tune") -> str:
        answer = self.http.post("/files", data={"purpose": purpose}, files={"file": (name, content)})
        assert answer.status_code == 200, answer.text
        file_id: str = answer.json()["id"]
        return file_id

    def submit(self, file_id: str | None = None, **fields: Any) -> str:
        body = {"model": MODEL, "training_file": file_id or self.upload(), **fields}
        answer = self.http.post("/fine_tuning/jobs", json=body)
        assert answer.status_code == 200, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def graft(self, source: str, **fields: Any) -> str:
        answer = self.http.post("/grafts", json={"target": MODEL, "source": source, **fields})
        assert answer.status_code == 200, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def check_file(self, file_id: str, *, error: str | None = None) -> None:
        """What the light worker writes."""
        status = {"status": "error" if error else "processed", "status_details": error}
        with self.api.database.writing() as session:
            session.execute(
                update(File).where(File.id == file_id).values(report={"ok": not error, "rows": 1}, **status)
            )
            session.commit()

    def admit(self, job_id: str, *, memory_bytes: int = 0, **spec: Any) -> None:
        with self.api.database.writing() as session:
            assert jobs.admit(session, job_id, make_spec(job_id, **spec), memory_bytes=memory_bytes)
            session.commit()

    def start(self, job_id: str, **spec: Any) -> jobs.Claim:
        """Admit it, and claim it as the only job that asks for no memory."""
        self.admit(job_id, **spec)
        with self.api.database.writing() as session:
            session.execute(update(Job).where(Job.id == job_id).values(memory_bytes=-1))
            claim = jobs.claim_next(session, worker_id="worker-x", lane_memory_bytes=-1, lease_seconds=600)
            session.commit()
        assert claim is not None
        assert claim.job_id == job_id
        return claim

    def finish(
        self,
        job_id: str,
        files: dict[str, bytes] | None = None,
        *,
        evaluation: dict[str, Any] | None = EVALUATION,
        **spec: Any,
    ) -> None:
        """Bring it to its success with these artifacts, by the verbs that a worker uses."""
        claim, storage = self.start(job_id, **spec), LocalStorage(self.api.settings.storage_dir)
        artifacts = [
            self._store(storage, claim, path, content) for path, content in (files or {"model/w": b"w"}).items()
        ]
        result = File(
            id=new_id("file-"), team_id=self.member.team_id, filename="r.csv", purpose="fine-tune-results", bytes=0,
            sha256="0" * 64, storage_key="nowhere", status="processed",
        )  # fmt: skip
        with self.api.database.writing() as session:
            assert jobs.succeed(session, claim, Outcome(artifacts, [result], 7, evaluation, {"fidelity": 1.0}))
            session.commit()

    def _store(self, storage: LocalStorage, claim: jobs.Claim, path: str, content: bytes) -> Artifact:
        key = f"jobs/{claim.job_id}/a{claim.attempt}/{path}"
        incoming = storage.receive(key)
        incoming.write(content)
        stored = incoming.keep()
        return Artifact(
            id=new_id("art_"), job_id=claim.job_id, team_id=self.member.team_id, kind=path.partition("/")[0], path=path,
            bytes=stored.bytes, sha256=stored.sha256, storage_key=key,
        )  # fmt: skip


def told(
    answer: httpx.Response, status: int = 400, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """The error of an answer that must be one, in the contract's shape."""
    assert answer.status_code == status, f"{answer.status_code}: {answer.text[:500]}"
    assert answer.headers["x-request-id"]
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["code"], str)
    assert isinstance(error["type"], str)
    for leak in ("Traceback", "sqlalchemy", "psycopg", "sqlite3", "/site-packages/", "SELECT "):
        assert leak not in error["message"]
    if code is not None:
        assert error["code"] == code, error
    if param is not None:
        assert error["param"] == param, error
    return error


def traces(api: Api) -> tuple[Any, ...]:
    """Everything that a refused request might have left behind."""
    with api.database.reading() as session:
        counts = [session.scalar(select(func.count()).select_from(table)) for table in (File, Job, JobEvent, Pair)]
    stored = sorted(path for path in api.settings.storage_dir.rglob("*") if path.is_file())
    return (*counts, tuple(stored))


def announce(api: Api, key: str, path: str, size: int, *, then_send: int = 0) -> tuple[bytes, int]:
    """Announce a form of `size` bytes; the answer, and how many of `then_send` bytes the server still let through."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", f"Content-Length: {size}"]
    head = "\r\n".join([*lines, "Content-Type: multipart/form-data; boundary=b", "", ""])
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as connection:
        connection.sendall(head.encode())
        answer = b""
        while piece := connection.recv(65536):  # to its end: the server closes what it does not read on
            answer += piece
        sent = 0
        with suppress(ConnectionError):
            while sent < then_send:
                sent += connection.send(b"x" * 65536)
        return answer, sent


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def objects(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def routes(openapi: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every method and path of the OpenAPI page, ids filled in."""
    for path, methods in openapi["paths"].items():
        for method in methods:
            filled = path
            for name, value in IDS.items():
                filled = filled.replace(f"{{{name}}}", value)
            assert "{" not in filled, f"the tests do not know the ids of {path}"
            yield method.upper(), filled


def as_json(text: str) -> dict[str, Any]:
    """Keyword arguments of a request with this very text as its JSON body."""
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return {"content": content, "headers": {"content-type": "application/json"}}


def job_body(**fields: Any) -> str:
    return json.dumps({"model": MODEL, "training_file": "file-x", **fields})


@pytest.fixture
def client(api: Api) -> Iterator[Client]:
    """A new team's client."""
    made = Client(api, api.member())
    with made.http:
        yield made
