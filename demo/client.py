"""The demo's HTTP client: plain requests, as any program would send them."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from typing import Any

import httpx

from core.errors import ShadowError

REQUEST_SECONDS = 60.0
COPY_BYTES = 1024 * 1024


class Client:
    def __init__(self, url: str, key: str, key_file: Path) -> None:
        self.url = url
        self.key_file = key_file
        self._http = httpx.Client(
            base_url=url,
            headers={"authorization": f"Bearer {key}"},
            timeout=REQUEST_SECONDS,
            trust_env=False,  # a proxy has no business between this process and its own child
        )

    def is_ready(self) -> bool:
        """The API answers and both workers have said that they live."""
        try:
            answer = self._http.get("/readyz")
        except httpx.TransportError:
            return False
        return answer.status_code == 200 and answer.json()["status"] == "ok"

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        return _checked(self._http.get(path, params=query))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return _checked(self._http.post(path, json=body))

    def upload(self, path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            return _checked(self._http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": file}))

    def find_file(self, path: Path) -> dict[str, Any] | None:
        """An uploaded file of the same bytes."""
        with path.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        for file in self.get("/v1/files", purpose="fine-tune")["data"]:
            if (file["sha256"], file["status"]) == (sha256, "processed"):
                found: dict[str, Any] = file
                return found
        return None

    def evaluation(self, job_id: str) -> dict[str, Any]:
        return self.get(f"/v1/fine_tuning/jobs/{job_id}/evaluation")

    def try_cancel(self, job_id: str) -> None:
        """On the way out: the job must not go on, and nothing may hide the reason for leaving."""
        try:
            self._http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
        except httpx.TransportError:
            return

    def download(self, job_id: str, folder: Path) -> None:
        """Every artifact of the job, checked against its hash."""
        for artifact in self.get(f"/v1/fine_tuning/jobs/{job_id}/artifacts", limit=1000)["data"]:
            destination = folder / artifact["path"]
            destination.parent.mkdir(parents=True, exist_ok=True)
            if self._fetch(f"/v1/artifacts/{artifact['id']}/content", destination) != artifact["sha256"]:
                raise ShadowError(f"The download of {artifact['path']} does not have the hash that the list names.")

    def _fetch(self, path: str, destination: Path) -> str:
        digest = hashlib.sha256()
        with self._http.stream("GET", path) as answer, destination.open("wb") as file:
            if answer.is_error:
                answer.read()
                _checked(answer)
            for piece in answer.iter_bytes(COPY_BYTES):
                digest.update(piece)
                file.write(piece)
        return digest.hexdigest()


def _checked(answer: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    if answer.is_error:
        raise ShadowError(f"{answer.request.method} {answer.request.url.path}: {body['error']['message']}")
    return body


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
