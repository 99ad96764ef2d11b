"""The console script in this process, and the same as a child."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cli.main import main
from tests.servers import die_with_parent, ended

ROOT = Path(__file__).parents[1]


class Done(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def shadowft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`shadowft …` as the console script runs it, without a process of its own."""
    monkeypatch.setenv("COLUMNS", "240")

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["shadowft", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status: Any = 0
        except SystemExit as ended:
            status = ended.code or 0
        assert isinstance(status, int)
        return Done(status, *capsys.readouterr())

    return run


def child(*arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None, **options: Any) -> Any:
    """A process of the console script; `stdout` and `stderr` are pipes of text."""
    return subprocess.Popen(
        [sys.executable, "-m", "cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": die_with_parent()}
        | options,
    )


class Terminal:
    """What a child shows to the person before it."""

    def __init__(self, process: subprocess.Popen[bytes], end: int) -> None:
        self.process = process
        self._end = end
        self._shown = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def shown(self) -> str:
        return self._shown.decode(errors="replace")

    def wait(self) -> int:
        status = self.process.wait()
        self._reader.join()
        return status

    def _read(self) -> None:
        with suppress(OSError):  # how a terminal ends whose last user has gone
            while piece := os.read(self._end, 65536):
                self._shown += piece
        os.close(self._end)


@contextmanager
def on_a_terminal(*arguments: object, env: dict[str, str] | None = None) -> Iterator[Terminal]:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "text": False}
    process = child(*arguments, env={"TERM": "xterm", **(env or {})}, **streams)
    os.close(theirs)
    with ended(process, signal.SIGTERM):
        terminal = Terminal(process, ours)
        yield terminal
    terminal.wait()
