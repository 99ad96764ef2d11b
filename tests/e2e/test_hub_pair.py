"""A pair of the catalogue, fetched from a Hub (a small one of the loopback), tuned and grafted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests import fake_hub
from tests.e2e.conftest import Tiny, command_line
from tests.servers import wait_until

#: What fetching from a Hub must do is in tests/worker/test_inputs.py; this is the whole demo on top of it.
pytestmark = [pytest.mark.xdist_group("e2e-hub"), pytest.mark.slow]

INSTRUCT = "Qwen/Qwen3-0.6B"


@pytest.fixture
def hub(tiny: Tiny, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Models of the catalogue's names, with what lies beside the weights in real repositories."""
    for source, name in ((tiny.base, f"{INSTRUCT}-Base"), (tiny.instruct, INSTRUCT)):
        folder = tmp_path / "hub" / name
        shutil.copytree(source, folder)
        (folder / "LICENSE").write_text("Apache-2.0\n")
        (folder / "pytorch_model.bin").write_bytes(b"a pickle that must never be fetched")
    with fake_hub.serve(tmp_path / "hub") as url:
        yield url, tmp_path / "hub" / "requests.log"


@pytest.fixture
def demo(hub: tuple[str, Path], tiny: Tiny, tmp_path: Path) -> Callable[[], subprocess.Popen[str]]:
    """Starts the demo on that pair, in a folder of the test's own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SHADOWFT_", "HF_"))}
    command = [sys.executable, "-m", "cli", "demo", "--pair", INSTRUCT, "--data", str(tiny.rows), "--folder", "demo"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**clean, "HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def test_the_demo_runs_on_a_pair_from_the_hub(hub: tuple[str, Path], demo, tmp_path: Path):
    said, _ = (running := demo()).communicate(timeout=240)

    assert running.returncode == 0, said
    assert "grafted instruct x 0.5" in said
    assert "directly tuned instruct" in said
    (result,) = (tmp_path / "demo" / "results").iterdir()
    shadow = json.loads((result / "model" / "shadow.json").read_bytes())
    assert INSTRUCT in json.dumps(shadow)
    assert (result / "model" / "LICENSE").read_text() == "Apache-2.0\n"
    assert "pytorch_model.bin" not in hub[1].read_text()


def test_a_second_demo_is_told_so_and_an_interrupted_one_leaves_no_process(demo, tmp_path: Path):
    first = demo()
    wait_until(lambda: training(first), seconds=120)
    family = psutil.Process(first.pid).children(recursive=True)

    second = demo()
    said, _ = second.communicate(timeout=60)
    first.send_signal(signal.SIGINT)
    last_words, _ = first.communicate(timeout=90)

    assert second.returncode == 1
    assert "Another demo is running" in said
    assert first.returncode == 130
    assert "nothing is left running" in last_words
    assert psutil.wait_procs(family, timeout=1)[1] == []


def training(demo: subprocess.Popen[str]) -> bool:
    family = psutil.Process(demo.pid).children(recursive=True)
    return any("worker.steps.train" in " ".join(command_line(process)) for process in family)
