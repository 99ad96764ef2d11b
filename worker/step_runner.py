"""Start a step as a child process, follow it, and turn its end into a result or a cause.

The child gets its own process group, an environment without secrets, walls around it (worker/sandbox.py), and the
moment at which its lease ends: in its command line for a start, and anew on stdin. It never outlives this function.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import IO, Any, Protocol

import structlog

from core.config import get_settings
from core.errors import Cause, StepFailed, Unavailable
from worker import sandbox
from worker.lease import Leaving, Pausing
from worker.left_files import read_left
from worker.progress import EXIT_DISK_FULL, EXIT_SAVED, Line, Note, Step, read_lines
from worker.sandbox import Walls
from worker.workspace import Workspace

#: The code of a step that the kernel ended for the processor time which the step had allowed itself.
OVER_CPU_LIMIT = "step_over_cpu_limit"

#: Between two looks at the child.
TICK_SECONDS = 0.1
#: Between two writes of the child's progress.
RECORD_SECONDS = 1.0
#: A training is stuck that takes so many times as long as its steps usually do.
STALL_STEPS = 10
#: Steps whose seconds are looked at for what is usual.
PACES = 50
#: How much longer than between two steps it may say nothing at its beginning and at its end.
STALL_EDGES = 4
#: How long a stuck child gets to write down where it is, and how much of that is kept.
STACKS_SECONDS = 2.0
MAX_STACKS_BYTES = 64 * 1024
#: How much of a step's log is kept. A longer one begins anew.
MAX_LOG_BYTES = 64 * 1024 * 1024
#: How far from its end the log's last line is looked for.
LAST_WORDS_BYTES = 64 * 1024
#: How long what a child said last may take to be read.
READ_SECONDS = 5.0
#: Lines kept for the next write; a step that says more is not worth a worker's memory.
MAX_PENDING_LINES = 10_000

#: What a child may know of this process's environment: no secret is among it.
_PASSED_ON = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "TZ",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "NUMBA_CACHE_DIR",
)

#: What every child is told.
_ALWAYS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    # Threads that have nothing to do sleep instead of spinning: several times faster where cores are shared.
    "OMP_WAIT_POLICY": "PASSIVE",
    # nvidia-smi, by which the lane was found, counts so; CUDA alone would put the fastest first.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}


log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long a step may take over things that have no end of their own."""

    #: How long it may make no step, where its steps do not usually take a good part of that.
    stall_seconds: float
    #: How long it may take to save its state, once it is told to leave. None: it saves none.
    save_grace_seconds: float | None = None


class Leased(Protocol):
    """What the runner asks of a lease."""

    def remaining(self) -> float: ...
    def check(self) -> None: ...


def run_step(
    name: str,
    workspace: Workspace,
    *,
    lease: Leased,
    device: str,
    grace_seconds: float,
    on_lines: Callable[[Sequence[Line]], None],
    patience: Patience | None = None,
) -> dict[str, Any]:
    """Run `worker.steps.NAME` on the workspace, unless it is done already, and return its result.json.

    `on_lines` gets the child's progress at most once a second. Whatever it or the lease raises ends the child first;
    a child that is only to leave, and has been granted time for it, is told to save its state, and the reason is raised
    once it has. One that makes no progress beyond its `patience` is ended.
    Raises StepFailed with the cause that the child wrote, or one made from how it died.
    """
    lease.check()
    if not workspace.done(name).exists():
        workspace.begin(name)
        with _child(name, workspace, lease, device, grace_seconds) as process:
            reason = _follow(process, lease, on_lines, workspace.log(name), workspace.step(name), patience)
        # SIGUSR1 ends a child that has not begun to listen: there was nothing to save.
        if reason is not None and process.returncode in (EXIT_SAVED, -signal.SIGUSR1):
            raise reason
        if process.returncode != 0 or not workspace.done(name).exists():
            raise StepFailed(_cause_of_death(name, workspace, process.returncode))
    result: dict[str, Any] = json.loads(read_left(workspace.result(name), below=workspace.root))
    return result


@contextmanager
def _child(
    name: str, workspace: Workspace, lease: Leased, device: str, grace_seconds: float
) -> Iterator[subprocess.Popen[bytes]]:
    step = [sys.executable, "-P", "-m", f"worker.steps.{name}", str(workspace.root), f"--leased={_deadline(lease)}"]
    with workspace.log(name).open("ab") as log:
        process = subprocess.Popen(
            sandbox.command(
                step,
                walls=walls_around(device),
                workspace=workspace.root,
                folder=workspace.step(name),
                device=device,
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=workspace.root,
            env=_environment(device),
            start_new_session=True,
        )
    # A child that is stopped, or stuck, reads no more: what it does not take must not hold up the rest of this loop.
    os.set_blocking(process.stdin.fileno(), False)  # type: ignore[union-attr]  # a pipe was asked for
    try:
        yield process
    finally:
        _end(process, grace_seconds)


@cache
def walls_around(device: str) -> Walls:
    """The walls that stand around the steps of this process's lane, as a trial showed.

    Raises Unavailable where the setting wants more than this machine offers.
    """
    setting = get_settings().sandbox
    if setting == "off":
        return Walls()
    walls = sandbox.find_walls(device)
    if walls.missing and setting == "require":
        raise Unavailable(
            f"SHADOWFT_SANDBOX=require, and not all walls stand here: {walls.missing}",
            hint="Use a Linux kernel with seccomp and Landlock (5.13 or newer), or SHADOWFT_SANDBOX=auto.",
        )
    tell = log.warning if walls.missing else log.info
    tell("sandbox", device=device, network=walls.network, files=walls.files, missing=walls.missing or None)
    return walls


def _environment(device: str) -> dict[str, str]:
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {**passed, **_ALWAYS, "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device.removeprefix("cuda:")}


def _follow(
    process: subprocess.Popen[bytes],
    lease: Leased,
    on_lines: Callable[[Sequence[Line]], None],
    log_file: Path,
    folder: Path,
    patience: Patience | None,
) -> Leaving | None:
    """Until the child has ended; why it was told to leave, if it was."""
    lines: queue.Queue[Line] = queue.Queue(MAX_PENDING_LINES)
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    recorded = 0.0
    farewell = _Farewell(process, patience, on_lines)
    pulse = Pulse(patience.stall_seconds) if patience else None
    while process.poll() is None:
        try:
            lease.check()
        except Leaving as reason:
            farewell.bid(reason)
        _send_deadline(process, lease)
        if time.monotonic() - recorded >= RECORD_SECONDS and not lines.empty():
            said = _drain(lines)
            if pulse:
                pulse.feel(said, time.monotonic())
                pulse.still_writes(folder)
            on_lines(said)
            recorded = time.monotonic()
        if pulse and not farewell.hurries and pulse.is_gone(time.monotonic()) and not pulse.still_writes(folder):
            raise StepFailed(_stalled(process, pulse, log_file))
        _keep_short(log_file)
        with suppress(subprocess.TimeoutExpired):
            process.wait(TICK_SECONDS)
    _signal_group(process, signal.SIGKILL)  # what it forked holds the pipe open
    reader.join(READ_SECONDS)
    if not lines.empty():
        on_lines(_drain(lines))
    return farewell.reason


def _bytes_below(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            found += path.lstat().st_size
    return found


class _Farewell:
    """Tells a child once that it is to save its state and leave, and waits only so long for it. A pause can wait as
    long as the child does something."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        patience: Patience | None,
        on_lines: Callable[[Sequence[Line]], None],
    ) -> None:
        self._process = process
        self._patience = patience
        self._on_lines = on_lines
        self._until = 0.0
        #: Why the child was told to leave.
        self.reason: Leaving | None = None

    @property
    def hurries(self) -> bool:
        return self.reason is not None and not isinstance(self.reason, Pausing)

    def bid(self, reason: Leaving) -> None:
        """Raises the reason where the child saves nothing, or took too long over it."""
        if self._patience is None or self._patience.save_grace_seconds is None:
            raise reason
        if self.reason is None:
            self.reason = reason
            self._until = time.monotonic() + self._patience.save_grace_seconds
            self._process.send_signal(signal.SIGUSR1)
        if self.hurries and time.monotonic() > self._until:
            seconds = self._patience.save_grace_seconds
            log.warning("save_took_too_long", seconds=seconds)
            said = f"The training did not save its state within {seconds:g} s and is ended; its last saved one counts"
            self._on_lines([Note(level="warn", message=said)])
            raise self.reason


class Pulse:
    """Tells a step that is slow from one that is stuck, by what it says. Moments are monotonic seconds."""

    def __init__(self, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._heard = time.monotonic()
        self._step: Step | None = None
        self._step_heard = 0.0
        #: Seconds that a step took.
        self._paces: deque[float] = deque(maxlen=PACES)
        #: Bytes in its folder when that was last looked at.
        self._written = 0

    def feel(self, lines: Sequence[Line], now: float) -> None:
        self._heard = now
        steps = [line for line in lines if isinstance(line, Step)]
        if not steps:
            return
        if self._step is not None:
            self._paces.append((now - self._step_heard) / len(steps))
        self._step, self._step_heard = steps[-1], now

    @property
    def limit(self) -> float:
        """How long the step may say nothing. Before its first step, and behind its last one, models are read and
        written, which takes longer."""
        between = self._step is not None and self._step.step < self._step.total_steps
        usual = STALL_STEPS * median(self._paces) if self._paces else 0.0
        return max(usual, self._stall_seconds * (1 if between else STALL_EDGES))

    def is_gone(self, now: float) -> bool:
        return now - self._heard > self.limit

    def still_writes(self, folder: Path) -> bool:
        """Whether its folder has changed since it was last looked at: what saves a large state says nothing, and is
        well."""
        written, self._written = self._written, _bytes_below(folder)
        self._heard = time.monotonic()
        return written != self._written


def _stalled(process: subprocess.Popen[bytes], pulse: Pulse, log_file: Path) -> Cause:
    """End a child that is stuck. Where it is goes from its log into the worker's own, which outlives the job."""
    before = log_file.stat().st_size
    process.send_signal(signal.SIGUSR2)  # child.py has the interpreter answer it with the stacks of all threads
    with suppress(subprocess.TimeoutExpired):
        process.wait(STACKS_SECONDS)
    _signal_group(process, signal.SIGKILL)
    stacks = _piece(log_file, before, MAX_STACKS_BYTES)
    log.error("step_stalled", seconds=round(pulse.limit), stacks=stacks)
    return Cause(
        code="step_stalled",
        message=f"The step '{log_file.stem}' made no progress for {pulse.limit:.0f} s and was ended.",
        hint="The operator finds in the worker's log where it stood. A larger SHADOWFT_STALL_SECONDS bears more.",
        retryable=True,
        fault="infrastructure",
    )


def _read(process: subprocess.Popen[bytes], lines: queue.Queue[Line]) -> None:
    """Until nobody can write to the child's stdout. Closed here: elsewhere that would wait for this thread."""
    stdout: Any = process.stdout
    with stdout:
        for line in read_lines(stdout):
            with suppress(queue.Full):
                lines.put_nowait(line)


def _drain(lines: queue.Queue[Line]) -> list[Line]:
    return [lines.get_nowait() for _ in range(lines.qsize())]


def _deadline(lease: Leased) -> str:
    """By the clock that all processes of this machine share."""
    return f"{time.monotonic() + lease.remaining():.3f}"


def _send_deadline(process: subprocess.Popen[bytes], lease: Leased) -> None:
    stdin: IO[bytes] = process.stdin  # type: ignore[assignment]  # a pipe was asked for
    # It has just ended, which poll() will say; or it has not read for so long that the pipe is full, and its alarm or
    # its end will come by what it has read.
    with suppress(BrokenPipeError, BlockingIOError):
        os.write(stdin.fileno(), f"{_deadline(lease)}\n".encode())


def _end(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """End whatever is left of the child's group: ask first, then insist."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_seconds)
    _signal_group(process, signal.SIGKILL)
    process.wait()
    with suppress(BrokenPipeError):
        process.stdin.close()  # type: ignore[union-attr]  # a pipe was asked for


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _cause_of_death(name: str, workspace: Workspace, returncode: int) -> Cause:
    try:
        return Cause(**json.loads(read_left(workspace.failure(name), below=workspace.root)))
    except (OSError, ValueError, TypeError, StepFailed):
        return _unexplained(name, returncode, _last_words(workspace.log(name)))


def _unexplained(name: str, returncode: int, last_words: str) -> Cause:
    if returncode == -signal.SIGKILL:
        return Cause(
            code="step_killed",
            message=f"The step '{name}' was killed by the operating system, most often for want of memory.",
            hint="Use a smaller batch_size, max_length or rank, or a worker with more memory.",
            retryable=True,
            fault="memory",
        )
    if returncode == -signal.SIGALRM:
        return Cause(
            code="lease_expired",
            message=f"The step '{name}' ended itself: its lease ran out before the worker renewed it.",
            hint="The database was slow or the machine overloaded; a larger SHADOWFT_LEASE_SECONDS bears more.",
            retryable=True,
            fault="infrastructure",
        )
    if returncode == -signal.SIGXCPU:
        return Cause(
            code=OVER_CPU_LIMIT,
            message=f"The step '{name}' used up the processor time that it may take.",
            hint="A sound input takes a small part of that: use the files as the models' own release has them.",
        )
    if returncode == EXIT_DISK_FULL:
        return Cause(
            code="disk_full",
            message=f"The worker's disk was full while the step '{name}' ran.",
            hint="The operator frees space where SHADOWFT_DATA_DIR lies.",
            retryable=True,
            fault="infrastructure",
        )
    how = f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
    return Cause(
        code="step_crashed",
        message=f"The step '{name}' ended with {how}. {last_words}".strip(),
        hint="The operator finds the step's log in the worker's output.",
        retryable=True,
        fault="infrastructure",
    )


def _last_words(log: Path) -> str:
    lines = _piece(log, max(0, log.stat().st_size - LAST_WORDS_BYTES), LAST_WORDS_BYTES).strip().splitlines()
    return lines[-1][:300] if lines else ""


def _piece(log: Path, start: int, size: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        return file.read(size).decode(errors="replace")


def _keep_short(log: Path) -> None:
    """The step appends: what it prints next is the first that the log holds."""
    if log.stat().st_size > MAX_LOG_BYTES:
        os.truncate(log, 0)
