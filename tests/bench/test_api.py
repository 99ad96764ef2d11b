"""The bench works, at a size that takes seconds. No time is asserted: those are for a quiet machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[2] / "bench" / "api.py"


def test_polls_are_measured_against_a_bare_route(tmp_path: Path):
    options = ["--pairs", "1", "--seconds", "0.5", "--jobs", "1000", "--folder", str(tmp_path / "bench")]
    done = subprocess.run([sys.executable, BENCH, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {(line["bench"], line.get("job")): line for line in map(json.loads, done.stdout.splitlines())}
    assert lines.keys() >= {("api-poll", "running"), ("api-poll", "succeeded"), ("api-304", None), ("api-many", None)}
    assert all(line["ratio"] > 0 for line in lines.values() if "ratio" in line)
    assert lines["api-memory", None]["mebibytes"]["HWM"] > 0
    assert not (tmp_path / "bench").exists()
