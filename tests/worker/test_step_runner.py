"""The step runner with real children: the `inspect` step, real signals, and a file that never begins to hold it up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from core.errors import LeaseLost, StepFailed
from tests.servers import wait_until
from worker.lease import Cancelled, Draining, Lease
from worker.progress import Note, Step
from worker.step_runner import TICK_SECONDS, Pulse, _unexplained, run_step
from worker.workspace import Workspace

ROOT = Path(__file__).parents[2]
ROW = b'{"prompt": "Hi", "completion": "Hello"}\n'


@pytest.fixture
def workspace(tmp_path):
    made = Workspace(tmp_path / "job")
    made.inputs.mkdir(parents=True)
    return made


@pytest.fixture
def draining():
    return threading.Event()


@pytest.fixture
def cancelled():
    return threading.Event()


@pytest.fixture
def lease(draining, cancelled):
    """A lease that nobody contests."""

    def beat():
        return "cancel" if cancelled.is_set() else "run"

    with Lease(beat, lease_seconds=30, beat_seconds=0.1, draining=draining) as held:
        yield held


def put(workspace, content):
    (workspace.inputs / "file").write_bytes(content)


def stall(workspace):
    """An input that can be opened only once somebody writes to it: the step waits in its first read."""
    os.mkfifo(workspace.inputs / "file")


def run(workspace, lease, on_lines=lambda lines: None):
    return run_step("inspect", workspace, lease=lease, device="cpu", grace_seconds=0.5, on_lines=on_lines)


class Running:
    """`run` in a thread; `result` gives what it returned or raises what it raised."""

    def __init__(self, workspace, lease) -> None:
        self.workspace = workspace
        self._raised = self._returned = None
        self._thread = threading.Thread(target=self._run, args=(workspace, lease))
        self._thread.start()
        self.child = wait_until(lambda: child_of(os.getpid(), workspace))

    def _run(self, workspace, lease):
        try:
            self._returned = run(workspace, lease)
        except Exception as error:  # noqa: BLE001 - it is raised again below
            self._raised = error

    def result(self):
        self._thread.join(20)
        assert not self._thread.is_alive()
        if self._raised:
            raise self._raised
        return self._returned


def child_of(pid, workspace):
    """The step's process, once its interpreter is past its start: it has begun to wait in `open`."""
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if str(workspace.root) in child.cmdline() and child.num_threads() > 1:
                return child
        except psutil.Error:
            continue
    return None


def gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_step_returns_its_result_and_its_lines(workspace, lease):
    put(workspace, ROW * 10)
    heard = []
    assert run(workspace, lease, heard.extend)["report"]["rows"] == 10
    assert heard[-1] == Step(step=len(ROW) * 10, total_steps=len(ROW) * 10)


def test_a_step_that_is_done_is_not_run_again(workspace, lease):
    put(workspace, ROW)
    first = run(workspace, lease)
    put(workspace, b"something else")
    assert run(workspace, lease) == first


def test_a_result_without_its_mark_is_worth_nothing(workspace, lease):
    put(workspace, ROW)
    workspace.begin("inspect")
    workspace.result("inspect").write_text('{"report": "half"}')
    assert run(workspace, lease)["report"]["rows"] == 1


def test_a_child_that_is_killed_is_a_want_of_memory(workspace, lease):
    stall(workspace)
    running = Running(workspace, lease)
    running.child.send_signal(signal.SIGKILL)
    with pytest.raises(StepFailed) as caught:
        running.result()
    assert (caught.value.cause.code, caught.value.cause.fault) == ("step_killed", "memory")


def test_a_child_that_ends_otherwise_is_a_fault_of_the_infrastructure(workspace, lease):
    stall(workspace)
    running = Running(workspace, lease)
    running.child.send_signal(signal.SIGTERM)
    with pytest.raises(StepFailed, match="signal 15") as caught:
        running.result()
    assert (caught.value.cause.code, caught.value.cause.fault) == ("step_crashed", "infrastructure")
    assert caught.value.cause.retryable


@pytest.mark.parametrize("status", [-signal.SIGKILL, -signal.SIGALRM, -signal.SIGXCPU, -signal.SIGSEGV, 74, 1])
def test_however_a_child_ends_its_cause_names_the_step_and_a_remedy(status):
    cause = _unexplained("train", status, "")
    assert "'train'" in cause.message
    assert cause.hint


def test_a_step_that_knows_why_it_failed_is_quoted(workspace, lease):
    with pytest.raises(StepFailed) as caught:
        run(workspace, lease)  # there is no file at all
    assert "FileNotFoundError" in caught.value.cause.message
    assert "Traceback" in workspace.log("inspect").read_text()


@pytest.mark.parametrize("stop", ["cancel", "drain"])
@pytest.mark.parametrize("is_frozen", [False, True], ids=["awake", "frozen"])
def test_a_stop_ends_the_child_even_a_frozen_one(workspace, lease, cancelled, draining, stop, is_frozen):
    stall(workspace)
    running = Running(workspace, lease)
    if is_frozen:
        running.child.send_signal(signal.SIGSTOP)
    (cancelled if stop == "cancel" else draining).set()
    with pytest.raises(Cancelled if stop == "cancel" else Draining):
        running.result()
    assert gone(running.child)


def test_a_child_has_a_deadline_from_its_start_and_one_that_reads_no_more_holds_up_nobody(workspace, lease, cancelled):
    stall(workspace)
    running = Running(workspace, lease)
    first = float(running.child.cmdline()[-1].removeprefix("--leased="))
    assert 0 < first - time.monotonic() < 30

    running.child.send_signal(signal.SIGSTOP)
    fill(Path(f"/proc/{running.child.pid}/fd/0"))
    time.sleep(3 * TICK_SECONDS)
    cancelled.set()
    with pytest.raises(Cancelled):
        running.result()


def fill(pipe):
    """What a child's stdin comes to that is not read for ten minutes."""
    end = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    for piece in (b"\n" * 4096, b"\n"):
        with suppress(BlockingIOError):
            while os.write(end, piece):
                pass
    os.close(end)


def test_a_lost_lease_ends_the_child(workspace, draining):
    stall(workspace)
    taken = threading.Event()

    def beat():
        if taken.is_set():
            raise LeaseLost("taken")
        return "run"

    with Lease(beat, lease_seconds=30, beat_seconds=0.1, draining=draining) as lease:
        running = Running(workspace, lease)
        taken.set()
        with pytest.raises(LeaseLost):
            running.result()
    assert gone(running.child)


def test_what_the_listener_raises_ends_the_child_first(workspace, lease):
    put(workspace, ROW)

    def refuse(lines):
        raise LeaseLost("the write was refused")

    with pytest.raises(LeaseLost):
        run(workspace, lease, refuse)
    assert child_of(os.getpid(), workspace) is None


def test_a_child_knows_no_secret(workspace, lease, monkeypatch):
    for name in ("HF_TOKEN", "SHADOWFT_DATABASE_URL", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD"):
        monkeypatch.setenv(name, "canary")
    stall(workspace)
    running = Running(workspace, lease)
    environment = running.child.environ()
    running.child.kill()
    with pytest.raises(StepFailed):
        running.result()
    assert "canary" not in str(environment)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


# --- a step that is not as ours are -----------------------------------------------------------------------------------


@pytest.fixture
def becomes(monkeypatch):
    """`becomes(program)`: what every step is from here on, without walls."""

    def become(program):
        command = [sys.executable, "-c", textwrap.dedent(program)]
        monkeypatch.setattr("worker.step_runner.sandbox.command", lambda step, **plan: command)

    return become


@pytest.mark.parametrize("leaves", ["", "os.setsid()"], ids=["in its group", "in a session of its own"])
def test_a_helper_that_a_step_leaves_behind_holds_up_nobody(workspace, lease, becomes, monkeypatch, leaves):
    monkeypatch.setattr("worker.step_runner.READ_SECONDS", 0.1)
    becomes(f"""
        import os, time

        reading, writing = os.pipe()
        if os.fork() == 0:
            {leaves or "pass"}
            open("inspect/helper", "w").write(str(os.getpid()))
            os.close(writing)
            time.sleep(100)
        os.close(writing)
        os.read(reading, 1)
        os._exit(3)
    """)
    with pytest.raises(StepFailed, match="exit status 3"):
        run(workspace, lease)
    helper = int((workspace.step("inspect") / "helper").read_text())
    if leaves:
        os.kill(helper, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(helper) or gone(psutil.Process(helper)))


def test_the_log_of_a_step_that_prints_without_end_is_kept_short(workspace, lease, becomes, monkeypatch):
    monkeypatch.setattr("worker.step_runner.MAX_LOG_BYTES", 100_000)
    becomes("""
        import os, sys, time

        for _ in range(6):
            os.write(2, b"x" * 99 + b"\\n" + b"y" * 60_000 + b"\\n")
            time.sleep(0.2)
        sys.exit("That was all.")
    """)
    with pytest.raises(StepFailed, match="That was all"):
        run(workspace, lease)
    assert workspace.log("inspect").stat().st_size < 200_000


@pytest.mark.parametrize("file", ["result.json", "failure.json"])
def test_what_a_step_leaves_in_the_place_of_its_result_is_not_followed(workspace, lease, becomes, tmp_path, file):
    (tmp_path / "key.json").write_text('{"code": "secret", "message": "secret"}')
    becomes(f"""
        import os

        os.symlink({str(tmp_path / "key.json")!r}, "inspect/{file}")
        open("inspect/done.json", "w").close()
        os._exit({0 if file == "result.json" else 1})
    """)
    with pytest.raises(StepFailed) as caught:
        run(workspace, lease)
    assert "secret" not in str(caught.value.cause.as_dict())


# --- a training that makes no step ------------------------------------------------------------------------------------


@pytest.fixture
def pulse(monkeypatch):
    monkeypatch.setattr("worker.step_runner.time.monotonic", lambda: 0.0)
    return Pulse(900)


def step(number):
    return [Step(step=number, total_steps=10)]


def test_a_training_has_longer_before_its_first_step_and_after_its_last(pulse):
    assert (pulse.is_gone(3599), pulse.is_gone(3601)) == (False, True)
    pulse.feel(step(1), 10.0)
    assert (pulse.is_gone(909), pulse.is_gone(911)) == (False, True)
    pulse.feel(step(10), 20.0)
    assert (pulse.is_gone(3619), pulse.is_gone(3621)) == (False, True)


def test_a_training_of_long_steps_has_ten_of_them(pulse):
    for number in range(1, 5):
        pulse.feel(step(number), 200.0 * number)
    pulse.feel(step(5) + step(6), 1200.0)
    assert (pulse.is_gone(1200 + 1999), pulse.is_gone(1200 + 2001)) == (False, True)


def test_whatever_a_training_says_is_a_sign_of_life(pulse):
    pulse.feel(step(1), 10.0)
    pulse.feel([Note(level="info", message="Measuring")], 900.0)
    assert not pulse.is_gone(1700)


# --- a supervisor that dies or freezes --------------------------------------------------------------------------------

SUPERVISOR = """
    import sys, threading
    from pathlib import Path
    from worker.lease import Lease
    from worker.step_runner import run_step
    from worker.workspace import Workspace

    with Lease(lambda: "run", lease_seconds=float(sys.argv[2]), beat_seconds=0.1, draining=threading.Event()) as lease:
        workspace = Workspace(Path(sys.argv[1]))
        run_step("inspect", workspace, lease=lease, device="cpu", grace_seconds=1, on_lines=lambda lines: None)
"""


@pytest.fixture
def supervise(workspace):
    """`supervise(lease_seconds)`: a supervisor process and its child, which waits."""
    started = []

    def start(lease_seconds):
        stall(workspace)
        program = [sys.executable, "-c", textwrap.dedent(SUPERVISOR), str(workspace.root), str(lease_seconds)]
        started.append(subprocess.Popen(program, env={**os.environ, "PYTHONPATH": str(ROOT)}))
        return started[-1], wait_until(lambda: child_of(started[-1].pid, workspace))

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_child_ends_when_its_supervisor_is_killed(supervise):
    supervisor, child = supervise(600)
    supervisor.kill()
    wait_until(lambda: gone(child))


def test_a_child_ends_at_its_deadline_when_its_supervisor_is_frozen(supervise):
    supervisor, child = supervise(2)
    supervisor.send_signal(signal.SIGSTOP)
    wait_until(lambda: gone(child))
