"""Check an uploaded training file: inputs/file in, a report out.

The bytes come from strangers, so the step caps itself before it reads any. A file that cannot be trained on is a
result, not a failure; the step fails only when it cannot finish looking.
"""

from __future__ import annotations

import resource
import signal
from typing import Any, NoReturn

from core.datasets import check_file
from core.errors import InvalidDataset
from worker.progress import ProgressWriter
from worker.steps import child
from worker.workspace import Workspace

MAX_ADDRESS_BYTES = 2 * 2**30
#: Enough for ten gigabytes of honest rows.
MAX_CPU_SECONDS = 600
#: Between the word that time is up and the kernel's end of it.
_CPU_GRACE_SECONDS = 10


def main(workspace: Workspace, progress: ProgressWriter) -> dict[str, Any]:
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


if __name__ == "__main__":
    child.run("inspect", main)
