"""The step as its supervisor sees it: a child process, a folder, lines on stdout, a lease on stdin."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from worker.progress import Step, read_lines
from worker.workspace import Workspace

ROOT = Path(__file__).parents[3]
ROW = b'{"prompt": "Hi", "completion": "Hello"}\n'


@pytest.fixture
def workspace(tmp_path):
    (tmp_path / "job" / "inputs").mkdir(parents=True)
    return Workspace(tmp_path / "job")


def put(workspace, content):
    """The upload lies in storage; the workspace holds a link to it."""
    upload = workspace.root.parent / "upload"
    upload.write_bytes(content)
    (workspace.inputs / "file").symlink_to(upload)


def command(workspace, *options: str):
    return [sys.executable, "-m", "worker.steps.inspect", str(workspace.root), *options]


def run(workspace):
    return subprocess.run(command(workspace), cwd=ROOT, capture_output=True, timeout=60, check=False)


def run_with(workspace, setting):
    """The step with another cap, set where the program would read its own."""
    program = f"from worker.steps import child, inspect; inspect.{setting}; child.run('inspect', inspect.main)"
    subprocess.run([sys.executable, "-c", program, str(workspace.root)], cwd=ROOT, timeout=60, check=False)


def report_of(workspace):
    return json.loads(workspace.result("inspect").read_bytes())["report"]


def failure_of(workspace):
    return json.loads(workspace.failure("inspect").read_bytes())


def test_a_good_file(workspace):
    put(workspace, ROW * 10)
    ended = run(workspace)
    assert ended.returncode == 0
    assert workspace.done("inspect").exists()
    assert report_of(workspace)["ok"] is True
    assert report_of(workspace)["rows"] == 10


def test_progress_counts_bytes(workspace):
    row = b'{"prompt": "%s", "completion": "Hello"}\n' % (b"x" * 2**20)
    put(workspace, row * 5)
    size = len(row) * 5
    lines = list(read_lines(io.BytesIO(run(workspace).stdout)))
    assert lines[-1] == Step(step=size, total_steps=size)
    assert len(lines) == 2


def test_a_bad_file_is_a_result(workspace):
    put(workspace, ROW + b"{}\n")
    assert run(workspace).returncode == 0
    assert workspace.done("inspect").exists()
    assert report_of(workspace)["ok"] is False
    assert report_of(workspace)["first_errors"][0]["number"] == 2


def test_an_array_that_outgrows_the_memory_cap_is_a_result(workspace):
    put(workspace, b"[" + b"1," * 8_000_000 + b"1]")
    run_with(workspace, "MAX_ADDRESS_BYTES = 2**29")
    assert "it is a JSON array of too many values" in report_of(workspace)["summary"]


def test_a_missing_file_is_a_failure(workspace):
    assert run(workspace).returncode == 1
    assert not workspace.done("inspect").exists()
    assert failure_of(workspace)["code"] == "step_crashed"


def test_running_out_of_processor_time_is_a_failure_in_words(workspace):
    put(workspace, ROW * 1_000_000)
    run_with(workspace, "MAX_CPU_SECONDS = 1")
    assert failure_of(workspace)["message"] == "The file is not checked within 1 seconds of processor time."


def leased(workspace, seconds):
    """A child that waits for its file, a pipe nobody has written to yet, and has so long unless it hears more."""
    os.mkfifo(workspace.inputs / "file")
    return start_leased(workspace, seconds)


def start_leased(workspace, seconds):
    deadline = f"--leased={time.monotonic() + seconds}"
    return subprocess.Popen(command(workspace, deadline), cwd=ROOT, stdin=subprocess.PIPE, bufsize=0)


def test_a_leased_child_ends_when_stdin_closes(workspace):
    child = leased(workspace, 30)
    child.stdin.close()
    assert child.wait(timeout=20) == -signal.SIGKILL
    assert not workspace.done("inspect").exists()


def test_a_leased_child_ends_past_its_deadline(workspace):
    child = leased(workspace, 30)
    child.stdin.write(f"{time.monotonic() + 30}\n".encode())
    child.stdin.write(f"{time.monotonic() + 0.2}\n".encode())
    assert child.wait(timeout=20) == -signal.SIGALRM
    child.stdin.close()


def test_a_leased_child_whose_supervisor_never_speaks_ends_past_its_first_deadline(workspace):
    child = leased(workspace, 0.2)
    assert child.wait(timeout=20) == -signal.SIGALRM
    child.stdin.close()


def test_neither_torch_nor_the_web_is_imported():
    program = "import sys, worker.steps.inspect; print(*{'torch', 'fastapi', 'sqlalchemy'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)
    assert ended.stdout.strip() == b""


def test_only_the_newest_deadline_counts_of_those_that_waited(workspace):
    """Lines pile up in the pipe while a step imports; an old one must not end it once a newer one is there."""
    put(workspace, ROW)
    child = start_leased(workspace, -5)
    child.stdin.write(f"{time.monotonic() - 5}\n{time.monotonic() + 30}\n".encode())

    assert child.wait(timeout=20) == 0
    child.stdin.close()
