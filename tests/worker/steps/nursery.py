"""Real children that train, at the price of one import: a process imports the step once and forks for each request.

It is a program: a line of JSON comes in, the child's pid goes out, and when the child has ended, its exit status.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from worker.progress import Line, Metrics, read_lines
from worker.workspace import Workspace

ROOT = Path(__file__).parents[3]


@dataclass
class Child:
    nursery: Nursery
    workspace: Workspace
    pid: int

    @property
    def lines(self) -> list[Line]:
        """What it has said until now."""
        with spoken(self.workspace).open("rb") as file:
            return list(read_lines(file))

    @property
    def log(self) -> str:
        return self.workspace.log("train").read_text()

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Or until it has ended."""
        while not true() and Path(f"/proc/{self.pid}").exists():
            time.sleep(0.005)

    def wait_until_said(self, lines: int) -> None:
        self.wait_until(lambda: len(self.lines) >= lines)

    def wait_until_measured(self, step: int) -> None:
        self.wait_until(lambda: any(isinstance(line, Metrics) and line.step >= step for line in self.lines))

    def kill(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit status, or minus the signal that ended it."""
        return int(self.nursery.answer())


class Nursery:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        )

    def start(self, workspace: Workspace, failpoint: str = "") -> Child:
        """Begin the train step on the workspace, as the supervisor would."""
        workspace.begin("train")
        for path in (spoken(workspace), workspace.log("train")):
            path.write_bytes(b"")
        print(json.dumps([str(workspace.root), failpoint]), file=self._process.stdin, flush=True)
        return Child(self, workspace, int(self.answer()))

    def run(self, workspace: Workspace, failpoint: str = "") -> int:
        return self.start(workspace, failpoint).wait()

    def answer(self) -> str:
        return self._process.stdout.readline()  # type: ignore[union-attr]  # a pipe was asked for

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()
        self._process.stdout.close()  # type: ignore[union-attr]


def spoken(workspace: Workspace) -> Path:
    return workspace.root / "logs" / "train.lines"


def _serve() -> None:
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401 - every child would import it anew

    from worker.steps import child, train

    gc.freeze()  # nor need they look through all that was imported
    for line in sys.stdin:
        root, failpoint = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(Workspace(Path(root)), failpoint)
            sys.argv = ["train", root]
            child.run("train", train.main)
            os._exit(0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")


def _become(workspace: Workspace, failpoint: str) -> None:
    os.environ["SHADOWFT_FAILPOINT"] = failpoint
    for descriptor, path in ((1, spoken(workspace)), (2, workspace.log("train"))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.close(0)


if __name__ == "__main__":
    _serve()
