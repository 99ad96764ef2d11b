"""What every step does around its work: speak, obey its lease, say why it failed, and leave its mark last.

A step is a program: `python -m worker.steps.train FOLDER` runs one by hand. The supervisor adds `--leased` and writes
to the step's stdin, over and over, when the lease ends. The kernel's alarm clock enforces it, so a step ends even when
its supervisor is frozen and its own interpreter is stuck; the end of stdin means that the supervisor is gone.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.errors import Cause, ShadowError
from worker.progress import ProgressWriter
from worker.workspace import Workspace, write_durably

#: A step does its work in the workspace and returns what belongs in its result.json.
StepMain = Callable[[Workspace, ProgressWriter], dict[str, Any]]

EXIT_FAILED = 1

#: All that a pipe holds.
_PIPE_BYTES = 64 * 1024


def run(name: str, main: StepMain) -> None:
    """Run `main` as the step `name` of the workspace given on the command line. Does not return on failure."""
    workspace = Workspace(Path(sys.argv[1]).resolve())
    workspace.step(name).mkdir(parents=True, exist_ok=True)
    progress = ProgressWriter(_own_stdout())
    if "--leased" in sys.argv[2:]:
        threading.Thread(target=_obey_lease, daemon=True).start()
    try:
        result = main(workspace, progress)
    except Exception as error:  # noqa: BLE001 - the one place where a step's failure becomes a cause
        traceback.print_exc()
        write_durably(workspace.failure(name), json.dumps(cause_of(error).as_dict()).encode())
        sys.exit(EXIT_FAILED)
    write_durably(workspace.result(name), json.dumps(result).encode())
    write_durably(workspace.done(name), b"{}")


def cause_of(error: Exception) -> Cause:
    """Put a step's exception into words for the job's owner."""
    if isinstance(error, ShadowError):
        return error.cause
    if _is_out_of_memory(error):
        return Cause(
            code="out_of_memory",
            message=f"The step ran out of memory: {_first_line(error)}",
            hint="Use a smaller batch_size, max_length or rank, or LoRA instead of full tuning.",
            fault="memory",
        )
    return Cause(
        code="step_crashed",
        message=f"The step stopped on an unexpected {type(error).__name__}: {_first_line(error)}",
        hint="The step's log has the details; the operator finds it in the job's workspace.",
        retryable=True,
        fault="infrastructure",
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _own_stdout() -> io.RawIOBase:
    """Keep the real stdout for progress lines; whatever libraries print goes to stderr, which is the step's log."""
    descriptor = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return io.FileIO(descriptor, "wb")


def _obey_lease() -> None:
    """Set the alarm anew at each line of stdin: the moment of the lease's end, by the clock that all processes of this
    machine share, so that a line read late gives no time away. SIGALRM is not handled: the kernel ends the process."""
    # Unbuffered: a thread that waits inside a buffered reader holds its lock and makes the interpreter abort at exit.
    pending = b""
    while piece := os.read(sys.stdin.fileno(), _PIPE_BYTES):
        *lines, pending = (pending + piece).split(b"\n")
        if lines:  # only the newest counts: the others waited here while this process was busy importing
            signal.setitimer(signal.ITIMER_REAL, max(float(lines[-1]) - time.monotonic(), 0.001))
    os.kill(os.getpid(), signal.SIGKILL)
