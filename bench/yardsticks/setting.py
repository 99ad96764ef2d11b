"""What the benches share: the models that they work on, the machine, and where their lines go."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from shutil import disk_usage, rmtree
from typing import Any, TextIO

import psutil

PROGRAMS = Path(__file__).resolve().parent
ROOT = PROGRAMS.parent.parent
BUILD = ROOT / "build"
GIB = 1 << 30

#: What a model of each size weighs, to ask for room before anything is written.
MODEL_BYTES = {"tiny": 1 << 20, "50m": 111 << 20, "350m": 718 << 20, "1.3b": 2632 << 20, "5b": 10120 << 20}


class Unavailable(Exception):
    """A yardstick cannot be had here; the message says why."""


@dataclass
class Models:
    """The pairs in one folder; what this run has made, it takes away."""

    folder: Path
    keep: bool
    made: list[Path] = field(default_factory=list)

    def pair(self, size: str) -> Path:
        """Unavailable: there is no room. A pair that an earlier run has left is used."""
        pair = self.folder / size
        if pair.exists():
            return pair
        part = pair.with_name(f"{size}.part")
        rmtree(part, ignore_errors=True)
        wanted = int(4.6 * MODEL_BYTES[size])
        if disk_usage(self.folder).free < wanted + GIB:
            raise Unavailable(f"a pair of {size} parameters and its graft need {wanted / 1e9:.0f} GB of disk")
        self.made += [part, pair]
        program("synthetic.py", size, part)
        part.rename(pair)
        return pair

    def discard(self) -> None:
        if not self.keep:
            for path in self.made:
                rmtree(path, ignore_errors=True)


@contextmanager
def models_in(folder: Path | None, *, keep: bool) -> Iterator[Models]:
    """None: a temporary folder under build/."""
    BUILD.mkdir(exist_ok=True)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    place = folder or Path(tempfile.mkdtemp(prefix="bench-", dir=BUILD))
    models = Models(place.resolve(), keep)
    try:
        yield models
    finally:
        models.discard()
        if not folder and not keep:
            rmtree(place)


@contextmanager
def sink(bench: str, *, save: bool) -> Iterator[TextIO | None]:
    """A file of its own in bench/results, where that is asked for."""
    if not save:
        yield None
        return
    results = ROOT / "bench" / "results"
    results.mkdir(exist_ok=True)
    with (results / f"{bench}-{time.strftime('%Y-%m-%d-%H%M')}.jsonl").open("w") as opened:
        yield opened


def machine() -> dict[str, Any]:
    return {
        **_processor(),
        "cores": os.cpu_count(),
        "sha256_gb_per_second": _hash_speed(),
        "memory_gib": round(psutil.virtual_memory().total / GIB),
        "disk_free_gb": round(disk_usage(BUILD).free / 1e9),
        "load": [round(value, 2) for value in os.getloadavg()],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "numba", "torch", "transformers", "peft")},
    }


def _processor() -> dict[str, Any]:
    """Which of the instructions it has that matter here."""
    lines = dict(line.split("\t", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if "\t" in line)
    flags = lines.get("flags", "").split()
    wanted = ("avx512f", "avx512_bf16", "amx_bf16", "sha_ni")
    return {"processor": lines.get("model name", "")[2:], "has": [flag for flag in wanted if flag in flags]}


def _hash_speed() -> float:
    """One core's, best of five, over a block that leaves this process small."""
    block = bytes(1 << 23)

    def seconds() -> float:
        started = time.process_time()
        hashlib.sha256(block)
        return time.process_time() - started

    return round(len(block) / min(seconds() for _ in range(5)) / 1e9, 2)


def program(name: str, *arguments: str | Path) -> str:
    """What a program of ours prints last. Apart from this process, which has to stay small."""
    done = subprocess.run([sys.executable, PROGRAMS / name, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()[-1500:]}")
    return (done.stdout.strip().splitlines() or [""])[-1]
