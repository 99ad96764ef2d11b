"""What every step does around its work: speak, obey its lease, say why it failed, and leave its mark last.

A step is a program: `python -m worker.steps.train FOLDER` runs one by hand. The supervisor adds `--leased=DEADLINE`,
when the lease ends, and writes a new deadline to the step's stdin, over and over. The kernel's alarm clock enforces it,
so a step ends even when its supervisor is frozen and its own interpreter is stuck; the end of stdin means that the
supervisor is gone. SIGUSR2 puts the stacks of all threads into the step's log, also where the interpreter is stuck.
"""

from __future__ import annotations

import errno
import faulthandler
import io
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.durable import sync_tree
from core.errors import Cause, ShadowError
from worker.progress import EXIT_DISK_FULL, ProgressWriter
from worker.workspace import Workspace, write_durably

#: A step does its work in the workspace and returns what belongs in its result.json.
StepMain = Callable[[Workspace, ProgressWriter], dict[str, Any]]

EXIT_FAILED = 1

#: How torch, CUDA and their libraries say that memory ran out where they raise no class of its own.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
#: How safetensors says that the disk is full: its errors carry no number.
_DISK_FULL = tuple(f"(os error {number})" for number in (errno.ENOSPC, errno.EDQUOT))

#: All that a pipe holds.
_PIPE_BYTES = 64 * 1024


def run(name: str, main: StepMain) -> None:
    """Run `main` as the step `name` of the workspace given on the command line. Does not return on failure."""
    workspace = Workspace(Path(sys.argv[1]).resolve())
    workspace.step(name).mkdir(exist_ok=True)
    progress = ProgressWriter(_own_stdout())
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    for argument in sys.argv[2:]:  # by hand there is none
        _begin_to_obey(float(argument.removeprefix("--leased=")))
    try:
        result = main(workspace, progress)
        sync_tree(workspace.step(name))  # what the mark says is done must be there behind a power cut too
        write_durably(workspace.result(name), json.dumps(result).encode())
        write_durably(workspace.done(name), b"{}")
    except Exception as error:  # noqa: BLE001 - the one place where a step's failure becomes a cause
        with suppress(OSError):  # the log may lie on a full disk
            traceback.print_exc()
        sys.exit(_leave_cause(workspace.failure(name), cause_of(error)))


def _leave_cause(path: Path, cause: Cause) -> int:
    """Write the cause down; the exit status with which to go."""
    try:
        write_durably(path, json.dumps(cause.as_dict()).encode())
    except OSError as error:
        return EXIT_DISK_FULL if is_disk_full(error) else EXIT_FAILED
    return EXIT_FAILED


def cause_of(error: Exception) -> Cause:
    """Put a step's exception into words for the job's owner."""
    if isinstance(error, ShadowError):
        return error.cause
    if is_out_of_memory(error):
        return out_of_memory(error)
    if is_disk_full(error):
        return Cause(
            code="disk_full",
            message=f"The worker's disk is full: {first_line(error)}",
            hint="The operator frees space where SHADOWFT_DATA_DIR lies.",
            retryable=True,
            fault="infrastructure",
        )
    return Cause(
        code="step_crashed",
        message=f"The step stopped on an unexpected {type(error).__name__}: {first_line(error)}",
        hint="The step's log has the details; the operator finds it in the job's workspace.",
        retryable=True,
        fault="infrastructure",
    )


def out_of_memory(error: Exception, *, retryable: bool = False) -> Cause:
    """`retryable` where a smaller micro-batch would need less memory; the job itself stays what it is."""
    return Cause(
        code="out_of_memory",
        message=f"The step ran out of memory: {first_line(error)}",
        hint="Use a smaller batch_size, max_length or rank, or LoRA instead of full tuning.",
        retryable=retryable,
        fault="memory",
    )


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in _DISK_FULL)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def _own_stdout() -> io.RawIOBase:
    """Keep the real stdout for progress lines; whatever libraries print goes to stderr, which is the step's log."""
    descriptor = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return io.FileIO(descriptor, "wb")


def _begin_to_obey(deadline: float) -> None:
    """Where the supervisor has said nothing newer: it may never do so, being frozen already."""
    if not select.select([sys.stdin], [], [], 0)[0]:
        _set_alarm(deadline)
    threading.Thread(target=_obey_lease, daemon=True).start()


def _set_alarm(deadline: float) -> None:
    """`deadline` is of the clock that all processes of this machine share, so that one heard late gives no time away.
    SIGALRM is not handled: the kernel ends the process."""
    signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 0.001))


def _obey_lease() -> None:
    """Set the alarm anew at each line of stdin."""
    # Unbuffered: a thread that waits inside a buffered reader holds its lock and makes the interpreter abort at exit.
    pending = b""
    while piece := os.read(sys.stdin.fileno(), _PIPE_BYTES):
        *lines, pending = (pending + piece).split(b"\n")
        if lines:  # only the newest counts: the others waited here while this process was busy importing
            _set_alarm(float(lines[-1]))
    os.kill(os.getpid(), signal.SIGKILL)
