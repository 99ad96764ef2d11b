"""The bench works, at a size that takes seconds. No time is asserted: those are for a quiet machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[2] / "bench" / "similarity.py"


def test_ours_is_measured_against_reading_both_models(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, BENCH, "--quick", "--folder", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert lines.keys() == {"machine", "whole-process", "pass-alone"}
    assert 0 < lines["pass-alone"]["sigma"] < 0.1
    assert lines["pass-alone"]["ratio"] < lines["whole-process"]["ratio"]
    assert list(tmp_path.iterdir()) == []  # the models are gone
