"""Start a step as a child process, follow it, and turn its end into a result or a cause.

The child gets its own process group, an environment without secrets, and its lease's remaining seconds on stdin. It
never outlives this function.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from core.errors import Cause, StepFailed
from worker.progress import Line, read_lines
from worker.workspace import Workspace

#: The code of a step that the kernel ended for the processor time which the step had allowed itself.
OVER_CPU_LIMIT = "step_over_cpu_limit"

#: Between two looks at the child.
TICK_SECONDS = 0.1
#: Between two writes of the child's progress.
RECORD_SECONDS = 1.0
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
) -> dict[str, Any]:
    """Run `worker.steps.NAME` on the workspace, unless it is done already, and return its result.json.

    `on_lines` gets the child's progress at most once a second. Whatever it or the lease raises ends the child first.
    Raises StepFailed with the cause that the child wrote, or one made from how it died.
    """
    lease.check()
    if not workspace.done(name).exists():
        workspace.begin(name)
        with _child(name, workspace, device, grace_seconds) as process:
            _follow(process, lease, on_lines)
        if process.returncode != 0 or not workspace.done(name).exists():
            raise StepFailed(_cause_of_death(name, workspace, process.returncode))
    result: dict[str, Any] = json.loads(workspace.result(name).read_bytes())
    return result


@contextmanager
def _child(name: str, workspace: Workspace, device: str, grace_seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    with workspace.log(name).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"worker.steps.{name}", str(workspace.root), "--leased"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=workspace.root,
            env=_environment(device),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process, grace_seconds)


def _environment(device: str) -> dict[str, str]:
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {**passed, **_ALWAYS, "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device.removeprefix("cuda:")}


def _follow(process: subprocess.Popen[bytes], lease: Leased, on_lines: Callable[[Sequence[Line]], None]) -> None:
    lines: queue.Queue[Line] = queue.Queue(MAX_PENDING_LINES)
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    recorded = 0.0
    while process.poll() is None:
        lease.check()
        _send_deadline(process, lease.remaining())
        if time.monotonic() - recorded >= RECORD_SECONDS and not lines.empty():
            on_lines(_drain(lines))
            recorded = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            process.wait(TICK_SECONDS)
    reader.join()
    if not lines.empty():
        on_lines(_drain(lines))


def _read(process: subprocess.Popen[bytes], lines: queue.Queue[Line]) -> None:
    stdout: Any = process.stdout
    for line in read_lines(stdout):
        with suppress(queue.Full):
            lines.put_nowait(line)


def _drain(lines: queue.Queue[Line]) -> list[Line]:
    return [lines.get_nowait() for _ in range(lines.qsize())]


def _send_deadline(process: subprocess.Popen[bytes], seconds: float) -> None:
    stdin: IO[bytes] = process.stdin  # type: ignore[assignment]  # a pipe was asked for
    with suppress(BrokenPipeError):  # it has just ended; poll() will say so
        stdin.write(f"{time.monotonic() + seconds:.3f}\n".encode())
        stdin.flush()


def _end(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """End whatever is left of the child's group: ask first, then insist."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_seconds)
    _signal_group(process, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):
            pipe.close()  # type: ignore[union-attr]  # pipes were asked for


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _cause_of_death(name: str, workspace: Workspace, returncode: int) -> Cause:
    try:
        return Cause(**json.loads(workspace.failure(name).read_bytes()))
    except (OSError, ValueError, TypeError):
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
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
