"""Look at what strangers brought: an uploaded training file (inputs/file), or a pair of models (inputs/pair.json).

The step caps itself before it reads any of it. What cannot be used is a result, not a failure; the step fails only when
it cannot finish looking.
"""

from __future__ import annotations

import math
import resource
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

from core.datasets import check_file
from core.errors import InvalidDataset
from worker.progress import ProgressWriter
from worker.steps import child
from worker.workspace import Workspace

MAX_ADDRESS_BYTES = 2 * 2**30
#: Enough for ten gigabytes of honest rows.
MAX_CPU_SECONDS = 600
#: For a pair, beyond what importing the libraries took: that is ten times as much where torch brings CUDA.
MAX_PAIR_BYTES = 4 * 2**30
#: Between the word that time is up and the kernel's end of it.
_CPU_GRACE_SECONDS = 10


def main(workspace: Workspace, progress: ProgressWriter) -> dict[str, Any]:
    if workspace.pair_file.exists():
        return _inspect_pair(workspace, progress)
    _cap_resources()
    report = check_file(workspace.inputs / "file", on_progress=progress.step)
    return {"report": report.as_dict()}


def _cap_resources() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_BYTES, MAX_ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS + _CPU_GRACE_SECONDS))
    signal.signal(signal.SIGXCPU, _time_is_up)


def _time_is_up(_signal: int, _frame: object) -> NoReturn:
    raise InvalidDataset(
        f"The file is not checked within {MAX_CPU_SECONDS} seconds of processor time.",
        hint="Split it into smaller files.",
    )


def _inspect_pair(workspace: Workspace, progress: ProgressWriter) -> dict[str, Any]:
    # Imported here: a file needs neither torch nor transformers, which cost seconds.
    from worker.pair_inspection import look_at_texts, look_at_weights, read_asked, result_of

    asked = read_asked(workspace)
    _cap_more(MAX_PAIR_BYTES)
    # The kernel itself ends the step: a library that loops would hold up any handler of ours. The comparison of weights
    # is our own, and ends by the clock.
    cpu_seconds = math.ceil(time.process_time()) + asked.texts_cpu_seconds
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, resource.RLIM_INFINITY))
    chats = look_at_texts(workspace)
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return result_of(chats, look_at_weights(workspace, asked, chats, progress))


def _cap_more(more_bytes: int) -> None:
    """Cap the address space at what is taken now, and so much more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    address = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (address, address))


if __name__ == "__main__":
    child.run("inspect", main)
