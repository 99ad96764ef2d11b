"""How fast and how lean an upload is, against `cp` of the same file to the same disk.

Prints one JSON line: medians of the wall times, the ratio of `cp`'s to ours (1 is as fast as `cp`) with its target and
spread, what the server's process used of processor and memory, and the same for the file by parts of 64 MiB. Both sides
end with a sync of the file; they take turns and are primed alike. `cp` makes no hash and ours does, and what a sha256
costs depends on the processor and the program (0.4 GB/s a core, or 1.3 with the instructions for it). So a third way
runs along: `cp` with `sha256sum` beside it.

    python bench/upload.py
    python bench/upload.py --mebibytes 64 --pairs 1       # does the bench itself work?
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import psutil
from yardsticks.servers import free_port, server_process
from yardsticks.setting import BUILD, ROOT
from yardsticks.timing import evict, prime

TARGET = 0.4
MEBIBYTE = 1 << 20
PART_BYTES = 64 * MEBIBYTE
BOUNDARY = "shadowft-bench"


@dataclass
class Measured:
    walls: list[float] = field(default_factory=list)
    #: Processor seconds of the server, whose hashes are the most of it.
    user: list[float] = field(default_factory=list)
    system: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        used = {"server_user": self.user, "server_system": self.system}
        cpu = {name: round(statistics.median(values), 2) for name, values in used.items() if values}
        walls = [round(wall, 2) for wall in self.walls]
        return {"wall": round(statistics.median(self.walls), 2), **cpu, "walls": walls}


# --- the server -------------------------------------------------------------------------------------------------------


class Server:
    """The API alone, as `shadowft api` runs it: one process, SQLite, the default settings but for the file's limit."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, key: str) -> None:
        self.process = psutil.Process(process.pid)
        self.port = port
        self.headers = {"authorization": f"Bearer {key}"}
        self._connection = http.client.HTTPConnection("127.0.0.1", port)

    def hang_up(self) -> None:
        """The next request connects anew; the server keeps an idle connection for five seconds."""
        self._connection.close()

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        content = None if body is None else json.dumps(body)
        self._connection.request(method, path, content, {**self.headers, "content-type": "application/json"})
        return _answer(self._connection)

    def send_form(
        self, path: str, name: str, fields: dict[str, str], file: Path, start: int, size: int
    ) -> dict[str, Any]:
        """The file's bytes go from the page cache to the socket without passing this process."""
        before = b"".join(_part(field_name, "", value.encode() + b"\r\n") for field_name, value in fields.items())
        before += _part(name, f'; filename="{file.name}"', b"")
        after = f"\r\n--{BOUNDARY}--\r\n".encode()
        self._connection.putrequest("POST", path)
        self._connection.putheader("content-type", f"multipart/form-data; boundary={BOUNDARY}")
        self._connection.putheader("content-length", str(len(before) + size + len(after)))
        for header in self.headers.items():
            self._connection.putheader(*header)
        self._connection.endheaders(before)
        with file.open("rb") as opened:
            assert self._connection.sock.sendfile(opened, start, size) == size
        self._connection.sock.sendall(after)
        return _answer(self._connection)

    def peak_mib(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return round(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def _part(name: str, more: str, content: bytes) -> bytes:
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content


def _answer(connection: http.client.HTTPConnection) -> dict[str, Any]:
    response = connection.getresponse()
    text = response.read()
    assert response.status == 200, text
    answer: dict[str, Any] = json.loads(text)
    return answer


@contextmanager
def serving(folder: Path, most_bytes: int) -> Iterator[Server]:
    port = free_port()
    ours = {"DATA_DIR": folder, "PORT": port, "MAX_FILE_BYTES": most_bytes, "LOG_LEVEL": "warning"}
    env = {f"SHADOWFT_{name}": str(value) for name, value in ours.items()} | {"PYTHONPATH": str(ROOT)}
    with server_process(["-m", "cli", "api"], port, env, folder) as process:
        yield Server(process, port, (folder / "admin.key").read_text().strip())


# --- the ways ---------------------------------------------------------------------------------------------------------


def copy(source: Path, out: Path) -> None:
    subprocess.run(["cp", source, out / "copy"], check=True)
    _sync(out / "copy")


def copy_and_hash(source: Path, out: Path) -> None:
    hashing = subprocess.Popen(["sha256sum", source], stdout=subprocess.DEVNULL)
    copy(source, out)
    assert hashing.wait() == 0


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def upload(server: Server, source: Path) -> str:
    size = source.stat().st_size
    answer = server.send_form("/v1/files", "file", {"purpose": "user_data"}, source, 0, size)
    return str(answer["id"])


def upload_by_parts(server: Server, source: Path) -> str:
    size = source.stat().st_size
    declared = {"bytes": size, "filename": source.name, "mime_type": "text/jsonl", "purpose": "user_data"}
    path = f"/v1/uploads/{server.ask('POST', '/v1/uploads', declared)['id']}"
    parts = [
        server.send_form(f"{path}/parts", "data", {}, source, start, min(PART_BYTES, size - start))["id"]
        for start in range(0, size, PART_BYTES)
    ]
    return str(server.ask("POST", f"{path}/complete", {"part_ids": parts})["file"]["id"])


def time_copy(way: Callable[[Path, Path], None], source: Path, out: Path, measured: Measured) -> None:
    out.mkdir()
    prime([source], cold=False)
    started = time.perf_counter()
    way(source, out)
    measured.walls.append(time.perf_counter() - started)
    evict(out.iterdir())
    rmtree(out)


def time_upload(way: Callable[[Server, Path], str], server: Server, source: Path, measured: Measured) -> None:
    prime([source], cold=False)
    server.hang_up()
    before = server.process.cpu_times()
    started = time.perf_counter()
    file_id = way(server, source)
    measured.walls.append(time.perf_counter() - started)
    after = server.process.cpu_times()
    measured.user.append(after.user - before.user)
    measured.system.append(after.system - before.system)
    server.ask("DELETE", f"/v1/files/{file_id}")


# --- the line ---------------------------------------------------------------------------------------------------------


def ratio(yardstick: Measured, ours: Measured) -> dict[str, Any]:
    """Of the medians; the spread is that of the pairs that ran one after the other."""
    pairs = [left / right for left, right in zip(yardstick.walls, ours.walls, strict=True)]
    middle = statistics.median(yardstick.walls) / statistics.median(ours.walls)
    return {"ratio": round(middle, 3), "spread": [round(min(pairs), 3), round(max(pairs), 3)]}


def run(folder: Path, mebibytes: int, pairs: int) -> dict[str, Any]:
    source = folder / "source.jsonl"
    with source.open("wb") as file:
        for _ in range(mebibytes):
            file.write(os.urandom(MEBIBYTE))
    data = folder / "data"
    data.mkdir()
    cp, hashed, whole, parts = Measured(), Measured(), Measured(), Measured()
    with serving(data, 2 * mebibytes * MEBIBYTE) as server:
        at_rest = server.peak_mib()
        for _ in range(pairs):
            time_copy(copy, source, folder / "out", cp)
            time_upload(upload, server, source, whole)
            time_copy(copy_and_hash, source, folder / "out", hashed)
            time_upload(upload_by_parts, server, source, parts)
        peak = server.peak_mib()
    return {
        "bench": "upload",
        "mebibytes": mebibytes,
        "pairs": pairs,
        **ratio(cp, whole),
        "target": TARGET,
        "ratio_of_cp_with_sha256sum": ratio(cp, hashed),
        "ratio_to_cp_with_sha256sum": ratio(hashed, whole),
        "by_parts": {**ratio(cp, parts), "ratio_to_cp_with_sha256sum": ratio(hashed, parts), **parts.summary()},
        "upload": whole.summary(),
        "cp": cp.summary(),
        "cp_with_sha256sum": hashed.summary(),
        "server_peak_mib": peak,
        "server_at_rest_mib": at_rest,
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=BUILD / "upload", help="emptied; on the disk that is measured")
    options = parser.parse_args()
    rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    try:
        print(json.dumps(run(options.folder, options.mebibytes, options.pairs)))
    finally:
        rmtree(options.folder)


if __name__ == "__main__":
    main()
