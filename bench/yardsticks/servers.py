"""Servers as children of a bench: started on a free port, waited for, ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

START_SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def server_process(
    command: list[Any], port: int, env: dict[str, str], folder: Path, *, stderr: IO[bytes] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program in `folder`, once it takes connections; ended with the block."""
    process = subprocess.Popen([sys.executable, *command], env=os.environ | env, cwd=folder, stderr=stderr)
    try:
        _wait_for(port, process)
        yield process
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.005)
    raise SystemExit("The server did not start.")
