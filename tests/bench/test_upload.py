"""The bench works, at a size that takes seconds. No time is asserted: those are for a quiet machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[2] / "bench" / "upload.py"


def test_an_upload_is_measured_against_cp_whole_and_by_parts(tmp_path: Path):
    options = ["--mebibytes", "80", "--pairs", "1", "--folder", str(tmp_path / "bench")]
    done = subprocess.run([sys.executable, BENCH, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    line = json.loads(done.stdout)
    assert line["ratio"] > 0
    assert line["by_parts"]["ratio"] > 0
    assert line["server_peak_mib"] > line["server_at_rest_mib"] > 0
    assert not (tmp_path / "bench").exists()
