"""A Hugging Face Hub of the loopback: the few routes that `huggingface_hub` needs to read models.

    python -m tests.fake_hub FOLDER PORT        then HF_ENDPOINT=http://127.0.0.1:PORT

`FOLDER/owner/name` is a model, served as it lies there at `main`; its commit is a hash of its files. Safetensors files
are kept as LFS objects: a request for one is sent on to a second port, the CDN. `hub.json` beside the files, which is
not one of them, makes trouble:

    {"gated": true}                 403 for every file, as for a licence not accepted
    {"token": "hf_x"}               401 for whoever does not send it
    {"status": 503}                 every answer about this model; {"retry_after": 2} is said with it
    {"says": "<html>"}              the body of every answer of the hub itself, with the status 200
    {"info": {"sha": null}}         what is said about the model has these fields in the place of the true ones
    {"cut": 1000}                   every file's body ends after so many bytes, though more were announced
    {"hang": true}                  every file's body stops after its first byte and never goes on
    {"silent": true}                no request is ever answered
    {"bytes_per_second": 1000}      bodies of the CDN come so slowly
    {"wrong_size": 10}              the listing claims so many bytes more than a file has
    {"wrong_bytes": true}           bodies of the CDN have their last byte changed
    {"no_ranges": true}             whoever asks for a part of a file gets the whole
    {"first": 2}                    with any of these: only the first two answers that it would spoil

`FOLDER/requests.log` gets a line for every request: its method and its path. `FOLDER/served.jsonl` tells of every
answered request: its server (`hub` or `cdn`), path, status, Authorization header, and the body's first byte and length.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TROUBLE = "hub.json"
PIECE_BYTES = 64 * 1024
#: Between two pieces of a slow body.
PAUSE_SECONDS = 0.05


class Trouble(Exception):
    def __init__(self, status: int, code: str = "", body: str | None = None, **headers: str) -> None:
        self.status = status
        self.code = code
        self.body = json.dumps({"error": code}) if body is None else body
        self.headers = headers


class Model:
    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise Trouble(404, "RepoNotFound")
        self.folder = folder
        trouble = folder / TROUBLE
        self.trouble: dict[str, Any] = json.loads(trouble.read_bytes()) if trouble.exists() else {}

    @property
    def name(self) -> str:
        return "/".join(self.folder.parts[-2:])

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

    def listing(self) -> Iterator[dict[str, Any]]:
        more = self.trouble.get("wrong_size", 0)
        for name, path in self.files().items():
            content = path.read_bytes()
            size = len(content) + more
            entry = {"path": name, "size": size, "oid": _blob_id(content)}
            if _is_lfs(name):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
            yield entry


class Hub:
    """What the two servers share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cdn = ""
        self.closed = threading.Event()
        self._spoiled: Counter[str] = Counter()
        self._lock = threading.Lock()

    def model(self, owner: str, name: str) -> Model:
        return Model(self.folder / unquote(owner) / unquote(name))

    def trouble(self, model: Model, *kinds: str) -> dict[str, Any]:
        """Those of these troubles that this answer gets."""
        found = {kind: model.trouble[kind] for kind in kinds if model.trouble.get(kind)}
        with self._lock:
            if not found or self._spoiled[model.name] >= model.trouble.get("first", sys.maxsize):
                return {}
            self._spoiled[model.name] += 1
        return found

    def note(self, file: str, line: str) -> None:
        with self._lock, (self.folder / file).open("a") as log:
            log.write(line + "\n")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    server_name: str

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.note("requests.log", f"{self.command} {path}")
        try:
            self._route([part for part in path.split("/") if part])
        except Trouble as trouble:
            said = {"x-error-code": trouble.code, "x-error-message": trouble.code} if trouble.code else {}
            self._send(trouble.status, trouble.body.encode(), {**said, **trouble.headers})
        except OSError:  # the client has gone
            self.close_connection = True

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
            case ["cdn", owner, name, *file] if self.server_name == "cdn":
                model = self.hub.model(owner, name)
                self._content(model, model.file(unquote("/".join(file))), {})
            case _:
                raise Trouble(404)

    def _model(self, owner: str, name: str) -> Model:
        model = self.hub.model(owner, name)
        if self.hub.trouble(model, "silent"):
            self.hub.closed.wait()
        if self.hub.trouble(model, "status"):
            asks = {"retry-after": str(model.trouble["retry_after"])} if "retry_after" in model.trouble else {}
            raise Trouble(model.trouble["status"], **asks)
        if self.hub.trouble(model, "says"):
            raise Trouble(200, body=model.trouble["says"])
        token = model.trouble.get("token")
        if token and self.headers.get("authorization") != f"Bearer {token}":
            raise Trouble(401, "RepoNotFound")
        return model

    def _info(self, model: Model, revision: str) -> None:
        siblings = [
            {"rfilename": entry.pop("path"), "size": entry["size"], "blobId": entry["oid"], **_lfs_info(entry)}
            for entry in model.listing()
        ]
        gated = "manual" if model.trouble.get("gated") else False
        commit = model.at(revision)
        info = {"id": model.name, "modelId": model.name, "sha": commit, "gated": gated, "siblings": siblings}
        self._json({**info, **self.hub.trouble(model, "info").get("info", {})})

    def _tree(self, model: Model, revision: str) -> None:
        model.at(revision)
        self._json([{"type": "file", **entry} for entry in model.listing()])

    def _file(self, model: Model, revision: str, name: str) -> None:
        headers = {"x-repo-commit": model.at(revision)}
        content = model.file(name)
        if not _is_lfs(name):
            self._content(model, content, {**headers, "etag": f'"{_blob_id(content)}"'})
            return
        headers["x-linked-etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        headers["x-linked-size"] = str(len(content))
        headers["location"] = f"{self.hub.cdn}/cdn/{model.name}/{name}"
        self._send(302, b"", headers)

    def _content(self, model: Model, content: bytes, headers: dict[str, str]) -> None:
        start, end = (0, len(content)) if model.trouble.get("no_ranges") else self._range(len(content))
        if start >= len(content) > 0:
            raise Trouble(416)
        headers = {**headers, "accept-ranges": "bytes"}
        status = 200 if (start, end) == (0, len(content)) else 206
        if status == 206:
            headers["content-range"] = f"bytes {start}-{end - 1}/{len(content)}"
        spoilt = self._spoilt(model)
        if "wrong_bytes" in spoilt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._send(status, content[start:end], headers, spoilt, start=start)

    def _spoilt(self, model: Model) -> dict[str, Any]:
        if self.command != "GET":
            return {}
        large = ("bytes_per_second", "wrong_bytes") if self.server_name == "cdn" else ()
        return self.hub.trouble(model, "cut", "hang", *large)

    def _range(self, size: int) -> tuple[int, int]:
        unit, _, span = self.headers.get("range", "").partition("=")
        if unit != "bytes":
            return 0, size
        first, _, last = span.partition("-")
        return int(first or 0), min(int(last) + 1 if last else size, size)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"content-type": "application/json"})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], spoilt: dict[str, Any] | None = None, start: int = 0
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = 0
        try:
            if self.command != "HEAD":
                for piece in self._pieces(body, spoilt or {}):
                    self.wfile.write(piece)
                    sent += len(piece)
                self.close_connection = self.close_connection or sent < len(body)
        finally:
            self._served(status, start, sent)

    def _pieces(self, body: bytes, spoilt: dict[str, Any]) -> Iterator[bytes]:
        if "hang" in spoilt:
            yield body[:1]
            self.hub.closed.wait()
            return
        body = body[: spoilt.get("cut")]
        pace = spoilt.get("bytes_per_second")
        step = max(1, int(pace * PAUSE_SECONDS)) if pace else PIECE_BYTES
        for at in range(0, len(body), step):
            yield body[at : at + step]
            if pace and self.hub.closed.wait(PAUSE_SECONDS):
                return

    def _served(self, status: int, start: int, sent: int) -> None:
        told = {
            "server": self.server_name,
            "method": self.command,
            "path": urlsplit(self.path).path,
            "status": status,
            "authorization": self.headers.get("authorization"),
            "start": start,
            "sent": sent,
        }
        self.hub.note("served.jsonl", json.dumps(told))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that http.server uses
        pass


def _is_lfs(name: str) -> bool:
    return name.endswith(".safetensors")


def _lfs_info(entry: dict[str, Any]) -> dict[str, Any]:
    lfs = entry.get("lfs")
    return {"lfs": {"size": lfs["size"], "sha256": lfs["oid"], "pointerSize": lfs["pointerSize"]}} if lfs else {}


def _blob_id(content: bytes) -> str:
    """As git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def serve(folder: Path, port: int = 0) -> Iterator[str]:
    """The hub and its CDN in threads of this process; the hub's URL."""
    folder.mkdir(parents=True, exist_ok=True)
    hub = Hub(folder)
    with ExitStack() as stack:
        hub.cdn = stack.enter_context(_listen(hub, "cdn", 0))
        url = stack.enter_context(_listen(hub, "hub", port))
        stack.callback(hub.closed.set)
        yield url


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that goes away in the middle is what many tests do
            super().handle_error(request, client_address)


@contextmanager
def _listen(hub: Hub, name: str, port: int) -> Iterator[str]:
    server = Server(("127.0.0.1", port), type("HandlerHere", (Handler,), {"hub": hub, "server_name": name}))
    server.daemon_threads = True
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
