"""The bench works, at a size that takes seconds. No time is asserted: those are for a quiet machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[2] / "bench" / "graft.py"


def _lines(*options: str) -> dict[str, dict[str, Any]]:
    done = subprocess.run([sys.executable, BENCH, "--quick", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_ours_is_measured_against_floors_and_compared_to_the_bit(tmp_path: Path):
    lines = _lines("--cases", "full-checked", "--folder", str(tmp_path))

    assert lines["full-checked"]["against_the_sum"] == {
        "elements": 217088,
        "differ": 0,
        "signed_zeros": 0,
        "beyond_one_step": 0,
    }
    assert lines["full-checked"]["pairs"] == 1
    assert lines["full-checked"]["ours"]["peak_mib"] > 0
    assert list(tmp_path.iterdir()) == []  # the models are gone


def test_a_way_that_fails_is_said(tmp_path: Path):
    broken = tmp_path / "tiny"
    for model in ("base", "tuned", "instruct", "adapter"):
        (broken / model).mkdir(parents=True)
        (broken / model / "model.safetensors").write_bytes(b"no header")

    done = subprocess.run(
        [sys.executable, BENCH, "--quick", "--cases", "full", "--folder", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    assert "ours-weights-only: exit status" in json.loads(done.stdout.splitlines()[-1])["failed"]
