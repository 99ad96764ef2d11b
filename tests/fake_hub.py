"""A Hugging Face Hub of the loopback: the few routes that `huggingface_hub` needs to read models.

    python -m tests.fake_hub FOLDER PORT        then HF_ENDPOINT=http://127.0.0.1:PORT

`FOLDER/owner/name` is a model, served as it lies there at `main`; its commit is a hash of its files, and each commit
asked for stays known. `hub.json` beside the files, which is not one of them, makes trouble:

    {"gated": true}             403, as for a licence not accepted
    {"status": 503}             every answer about this model
    {"cut": 1000}               every file's body ends after so many bytes
    {"wrong_size": 10}          the listing claims so many bytes more than a file has

`FOLDER/requests.log` gets a line for every request: its method and its path.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TROUBLE = "hub.json"


class Trouble(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        self.status = status
        self.code = code


class Model:
    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise Trouble(404, "RepoNotFound")
        self.folder = folder
        trouble = folder / TROUBLE
        self.trouble: dict[str, Any] = json.loads(trouble.read_bytes()) if trouble.exists() else {}
        if status := self.trouble.get("status"):
            raise Trouble(status)

    def files(self) -> dict[str, Path]:
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_file() and path.name != TROUBLE)
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    @property
    def commit(self) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for name, path in self.files().items():
            digest.update(name.encode() + path.read_bytes())
        return digest.hexdigest()

    def at(self, revision: str) -> str:
        """The commit that `revision` means."""
        if unquote(revision) not in {"main", "HEAD", self.commit}:
            raise Trouble(404, "RevisionNotFound")
        return self.commit

    def file(self, name: str) -> bytes:
        if self.trouble.get("gated"):
            raise Trouble(403, "GatedRepo")
        if name not in self.files():
            raise Trouble(404, "EntryNotFound")
        return self.files()[name].read_bytes()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    log_lock = threading.Lock()

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        with self.log_lock, (self.folder / "requests.log").open("a") as log:
            log.write(f"{self.command} {path}\n")
        try:
            self._route([part for part in path.split("/") if part])
        except Trouble as trouble:
            said = {"x-error-code": trouble.code, "x-error-message": trouble.code} if trouble.code else {}
            self._send(trouble.status, json.dumps({"error": trouble.code}).encode(), said)

    def _route(self, parts: list[str]) -> None:
        match parts:
            case ["api", "models", owner, name]:
                self._info(self._model(owner, name), "main")
            case ["api", "models", owner, name, "revision", revision]:
                self._info(self._model(owner, name), revision)
            case ["api", "models", owner, name, "tree", revision]:
                self._tree(self._model(owner, name), revision)
            case [owner, name, "resolve", revision, *file]:
                self._file(self._model(owner, name), revision, unquote("/".join(file)))
            case _:
                raise Trouble(404)

    def _model(self, owner: str, name: str) -> Model:
        return Model(self.folder / unquote(owner) / unquote(name))

    def _info(self, model: Model, revision: str) -> None:
        name = "/".join(model.folder.parts[-2:])
        siblings = [{"rfilename": file} for file in model.files()]
        gated = "manual" if model.trouble.get("gated") else False
        self._json({"id": name, "modelId": name, "sha": model.at(revision), "gated": gated, "siblings": siblings})

    def _tree(self, model: Model, revision: str) -> None:
        model.at(revision)
        more = model.trouble.get("wrong_size", 0)
        self._json(
            [
                {"type": "file", "path": name, "size": path.stat().st_size + more, "oid": _blob_id(path.read_bytes())}
                for name, path in model.files().items()
            ]
        )

    def _file(self, model: Model, revision: str, name: str) -> None:
        headers = {"x-repo-commit": model.at(revision), "accept-ranges": "bytes"}
        content = model.file(name)
        headers["etag"] = f'"{_blob_id(content)}"'
        start, end = self._range(len(content))
        status = 200 if (start, end) == (0, len(content)) else 206
        if status == 206:
            headers["content-range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self._send(status, content[start:end], headers, cut=model.trouble.get("cut"))

    def _range(self, size: int) -> tuple[int, int]:
        unit, _, span = self.headers.get("range", "").partition("=")
        if unit != "bytes":
            return 0, size
        first, _, last = span.partition("-")
        return int(first or 0), min(int(last) + 1 if last else size, size)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"content-type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
            self.close_connection = self.close_connection or (cut is not None and cut < len(body))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that http.server uses
        pass


def _blob_id(content: bytes) -> str:
    """As git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def serve(folder: Path, port: int = 0) -> Iterator[str]:
    """The hub in threads of this process; its URL."""
    folder.mkdir(parents=True, exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", port), type("HandlerHere", (Handler,), {"folder": folder}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":
    with serve(Path(sys.argv[1]).resolve(), int(sys.argv[2])):
        threading.Event().wait()
