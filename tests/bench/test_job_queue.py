"""The bench works, at a size that takes seconds. No time is asserted: those are for a quiet machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[2] / "bench" / "job_queue.py"


def test_jobs_are_measured_against_a_bare_celery_task():
    options = ["--starts", "2", "--jobs", "50", "--recoveries", "1", "--quick"]
    done = subprocess.run([sys.executable, BENCH, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    starts, recoveries, claims = ["queue-start"] * 2, ["queue-recovery"], ["queue-claims"] * 2
    assert [line["bench"] for line in lines] == [*starts, *recoveries, *claims]
    assert all(line["claimed_twice"] == 0 for line in lines[3:])
