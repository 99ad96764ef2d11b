"""How cheap it is to ask for a job's status, against the least that a FastAPI server can be.

The yardstick (`yardsticks/bare_api.py`) is a bare `def` route with one prepared select, the same check of the key and
the same bytes, under the same uvicorn. Ours is the API as `shadowft api` runs it: one process, SQLite, the default
settings, its log into a file. Both are asked over connections that stay open, by a process of its own that is several
times as fast; they take turns, and the medians of the turns are compared. Wall time of a machine that does other things
at once says little, so each line has the server's processor seconds a request as well, whose ratio is not so easily
disturbed. Prints JSON lines:

    api-poll        a running job, and one that has succeeded: rate and ratio (target 0.5 of the yardstick's)
    api-304         the running one asked for with its ETag (target 0.75)
    api-many        a thousand of 100,000 jobs in turn, against one of two jobs (target: at least 0.8)
    api-clients     the 99th of a hundred answers to 200 clients, against the median (target: at most 10 times)
    api-start       from the start of the process until its first answer, beside the import of fastapi and sqlalchemy
                    (target 2 s), and the memory after all of that (target 150 MiB)

    python bench/api.py
    python bench/api.py --pairs 1 --seconds 0.5 --jobs 1000       # does the bench itself work?
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import psutil
from yardsticks.servers import free_port, server_process
from yardsticks.setting import BUILD, PROGRAMS, ROOT

CLIENTS = 8
MANY_CLIENTS = 200
STARTS = 5
IMPORTS = [sys.executable, "-c", "import fastapi, sqlalchemy"]
STATUS = "/v1/fine_tuning/jobs"


# --- servers ----------------------------------------------------------------------------------------------------------


class Server:
    """A process that answers on a port of the loopback."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, key: str) -> None:
        self.process = psutil.Process(process.pid)
        self.port = port
        self.headers = {"authorization": f"Bearer {key}"}

    def get(self, path: str) -> tuple[bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", path, headers=self.headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        assert answer.status == 200, body
        return body, {name.lower(): value for name, value in answer.getheaders()}

    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def mebibytes(self) -> dict[str, int]:
        """Resident now, and at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return {name: round(int(status.partition(f"Vm{name}:")[2].split()[0]) / 1024) for name in ("RSS", "HWM")}


@contextmanager
def running(command: list[Any], port: int, key: str, folder: Path) -> Iterator[Server]:
    """The server, once it answers."""
    env = {"SHADOWFT_DATA_DIR": str(folder), "SHADOWFT_PORT": str(port), "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("wb") as log, server_process(command, port, env, folder, stderr=log) as process:
        yield Server(process, port, key)


def our_api(folder: Path) -> Any:
    return running(["-m", "cli", "api"], free_port(), (folder / "admin.key").read_text().strip(), folder)


def bare_api(folder: Path, key: str, pages: dict[str, bytes]) -> Any:
    """The yardstick, with these pages by the jobs' ids."""
    folder.mkdir()
    database = sqlite3.connect(folder / "bare.db")
    database.executescript(
        "PRAGMA journal_mode = WAL; CREATE TABLE job (id TEXT PRIMARY KEY, body BLOB);"
        "CREATE TABLE api_key (digest BLOB PRIMARY KEY, team TEXT);"
    )
    database.executemany("INSERT INTO job VALUES (?, ?)", pages.items())
    database.execute("INSERT INTO api_key VALUES (?, 'default')", (hashlib.sha256(key.encode()).digest(),))
    database.commit()
    database.close()
    port = free_port()
    return running([PROGRAMS / "bare_api.py", folder / "bare.db", str(port)], port, key, folder)


# --- turns ------------------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """What is asked, and what came of it in each turn."""

    server: Server
    paths: list[str]
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    clients: int = CLIENTS
    turns: list[dict[str, Any]] = field(default_factory=list)

    def take_turn(self, seconds: float) -> None:
        asked = {
            "port": self.server.port,
            "paths": self.paths,
            "headers": {**self.server.headers, **self.headers},
            "clients": self.clients,
            "seconds": seconds,
        }
        before = self.server.cpu_seconds()
        command = [sys.executable, PROGRAMS / "http_load.py", json.dumps(asked)]
        turn = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        answers = turn.pop("statuses")
        assert set(answers) == {str(self.status)}, answers
        turn["server_cpu_us"] = round((self.server.cpu_seconds() - before) / answers[str(self.status)] * 1e6)
        self.turns.append(turn)

    def median(self, name: str) -> float:
        return round(statistics.median(turn[name] for turn in self.turns), 3)

    def summary(self) -> dict[str, Any]:
        return {name: self.median(name) for name in self.turns[0]} | {"rates": [turn["rate"] for turn in self.turns]}


def take_turns(ways: list[Way], turns: int, seconds: float) -> None:
    for way in ways:
        way.take_turn(min(seconds, 1.0))  # every thread has its connection, every cache is warm
        way.turns.clear()
    for _ in range(turns):
        for way in ways:
            way.take_turn(seconds)


def ratios(ours: Way, yardstick: Way) -> dict[str, Any]:
    """Of the rates' medians, with the spread of the pairs, and of the processor seconds a request; 1 is as fast."""
    pairs = [left["rate"] / right["rate"] for left, right in zip(ours.turns, yardstick.turns, strict=True)]
    return {
        "ratio": round(ours.median("rate") / yardstick.median("rate"), 3),
        "spread": [round(min(pairs), 3), round(max(pairs), 3)],
        "cpu_ratio": round(yardstick.median("server_cpu_us") / ours.median("server_cpu_us"), 3),
    }


def fill(folder: Path, jobs: int) -> tuple[str, str, list[str]]:
    """By a child: in here `api` is this file."""
    command = [sys.executable, PROGRAMS / "api_rows.py", folder, str(jobs)]
    return tuple(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


# --- the lines --------------------------------------------------------------------------------------------------------


def polls(folder: Path, pairs: int, seconds: float, jobs: int) -> Iterator[dict[str, Any]]:
    few, many = folder / "few", folder / "many"
    live, ended, _ = fill(few, 2)
    _, _, others = fill(many, jobs)
    with our_api(few) as server, our_api(many) as crowded:
        key = server.headers["authorization"].removeprefix("Bearer ")
        pages = {job_id: server.get(f"{STATUS}/{job_id}") for job_id in (live, ended)}
        etag = {"if-none-match": pages[live][1]["etag"]}
        with bare_api(folder / "bare", key, {job_id: page for job_id, (page, _) in pages.items()}) as bare:
            way = {
                "bare": Way(bare, [f"{STATUS}/{live}"]),
                "live": Way(server, [f"{STATUS}/{live}"]),
                "ended": Way(server, [f"{STATUS}/{ended}"]),
                "304": Way(server, [f"{STATUS}/{live}"], etag, 304),
                "many": Way(crowded, [f"{STATUS}/{job_id}" for job_id in others]),
                "clients": Way(server, [f"{STATUS}/{live}"], clients=MANY_CLIENTS),
                "bare clients": Way(bare, [f"{STATUS}/{live}"], clients=MANY_CLIENTS),
            }
            take_turns(list(way.values()), pairs, seconds)
        yardstick = {"yardstick": way["bare"].summary(), "pairs": pairs}
        for name, job in (("live", "running"), ("ended", "succeeded")):
            ours = ratios(way[name], way["bare"]) | {"target": 0.5, "ours": way[name].summary()}
            yield {"bench": "api-poll", "job": job, "bytes": len(pages[live][0]), **ours, **yardstick}
        ours = ratios(way["304"], way["bare"]) | {"target": 0.75, "ours": way["304"].summary()}
        yield {"bench": "api-304", **ours, **yardstick}
        ours = ratios(way["many"], way["ended"]) | {"target": 0.8, "ours": way["many"].summary()}
        yield {"bench": "api-many", "jobs": jobs, "polled": len(others), **ours, "few": way["ended"].summary()}
        yield {
            "bench": "api-clients",
            "clients": MANY_CLIENTS,
            "p99_to_median": round(way["clients"].median("ms_p99") / way["clients"].median("ms_p50"), 2),
            "target": 10,
            "ours": way["clients"].summary(),
            "yardstick": way["bare clients"].summary(),
        }
        yield {
            "bench": "api-memory",
            "mebibytes": server.mebibytes(),
            "with_many_jobs": crowded.mebibytes(),
            "target": 150,
        }


def starts(folder: Path) -> dict[str, Any]:
    """Each a fresh process, in turns; the first of each is not counted."""
    taken: dict[str, list[float]] = {"ours": [], "yardstick": []}
    for _ in range(STARTS + 1):
        taken["ours"].append(_start(folder))
        taken["yardstick"].append(_import())
    medians = {name: round(statistics.median(values[1:]), 3) for name, values in taken.items()}
    ratio = round(medians["ours"] / medians["yardstick"], 2)
    return {"bench": "api-start", "seconds": medians["ours"], "target": 2, "times_the_import": ratio, **medians}


def _start(folder: Path) -> float:
    """Seconds until the first answer; its end is not counted."""
    started = time.perf_counter()
    with our_api(folder) as server:
        server.get("/healthz")
        return time.perf_counter() - started


def _import() -> float:
    started = time.perf_counter()
    subprocess.run(IMPORTS, check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=BUILD / "api", help="emptied")
    options = parser.parse_args()
    rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    try:
        machine = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
        for line in polls(options.folder, options.pairs, options.seconds, options.jobs):
            print(json.dumps(line | machine), flush=True)
        print(json.dumps(starts(options.folder / "few") | machine), flush=True)
    finally:
        rmtree(options.folder)


if __name__ == "__main__":
    main()
