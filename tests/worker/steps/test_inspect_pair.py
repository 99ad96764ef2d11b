"""The step on a pair, as a child with its caps: what strangers' files can make it do ends, and is told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worker.broken_pairs import copied, make_pair, write_template
from worker.workspace import Workspace

ROOT = Path(__file__).parents[3]

#: Backtracks until the library's own limit, and then its Rust part panics, which is no Exception in Python.
BACKTRACKING = {"type": "Replace", "pattern": {"Regex": r"^(?:.|.)*\z(?<=[\x01-\x02])"}, "content": ""}


@pytest.fixture(scope="module")
def whole_pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def pair(whole_pair, tmp_path):
    return copied(whole_pair, tmp_path / "models")


@pytest.fixture
def inspect(pair, tmp_path):
    """The step's exit status, and its result where it came to one."""

    def run(**asked):
        workspace = Workspace(tmp_path / "workspace")
        workspace.inputs.mkdir(parents=True)
        workspace.base.symlink_to(pair.base)
        workspace.instruct.symlink_to(pair.instruct)
        asked = {"weights": True, "texts_cpu_seconds": 60, "similarity_seconds": 60, **asked}
        workspace.pair_file.write_text(json.dumps(asked))
        command = [sys.executable, "-m", "worker.steps.inspect", str(workspace.root)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False)
        result = workspace.result("inspect")
        return done.returncode, json.loads(result.read_bytes()) if result.exists() else None

    return run


def codes(result):
    return [finding["code"] for finding in result["findings"]]


def test_a_pair_is_looked_at_whole(inspect):
    status, result = inspect()
    assert (status, codes(result)) == (0, ["similarity"])
    assert 0 < result["similarity"]["sigma_ratio"] < 0.01


@pytest.mark.slow
def test_time_that_is_too_short_for_sigma_costs_nothing_else(inspect):
    status, result = inspect(similarity_seconds=0)
    assert (status, codes(result), result["similarity"]) == (0, ["similarity_not_measured"], None)


@pytest.mark.slow
def test_a_template_that_takes_all_memory_is_a_finding(inspect, pair):
    write_template(pair.instruct, "{{ 'a' * 99999999999 }}")
    status, result = inspect()
    assert (status, codes(result)) == (0, ["broken_chat_template"])
    assert "MemoryError" in result["findings"][0]["message"]


@pytest.mark.slow
def test_a_tokenizer_that_backtracks_without_end_is_a_finding(inspect, pair):
    tokenizer = pair.base / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_bytes()) | {"normalizer": BACKTRACKING}))
    status, result = inspect()
    assert (status, codes(result)) == (0, ["broken_tokenizer"])
    assert "retry-limit" in result["findings"][0]["message"]


def test_a_template_that_loops_is_ended_by_the_kernel(inspect, pair):
    write_template(pair.instruct, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    assert inspect(texts_cpu_seconds=1) == (-signal.SIGXCPU, None)
