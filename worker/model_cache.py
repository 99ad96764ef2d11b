"""The models of this machine: one cache under the data folder, shared by all of its processes.

What lies there whole is used without a request. What does not is fetched by a child (worker/hub_download.py), one at a
time for each repository; workspaces hold links into the cache. A cache below its limit keeps everything; one that
needs room lets go what was unused longest (worker/cache_room.py), never what somebody holds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import structlog

from core.config import Settings
from core.errors import Cause, InvalidInput, ShadowError, StepFailed, Unavailable
from core.hub import snapshot_at_hand
from core.job_spec import ModelSource
from worker.cache_room import touch, using

#: Between two looks at the child and at the lease.
TICK_SECONDS = 0.1
#: Between two log lines about one download.
PROGRESS_SECONDS = 30.0

#: What the download may know of this process's environment: how to reach the Hub, and nothing of the deployment's.
_PASSED_ON = frozenset(
    {
        *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "TRANSFORMERS_OFFLINE"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"),
    }
)
_ALWAYS = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # A blob is a file of its own here: room is counted and made by deleting blobs.
    "HF_HUB_DISABLE_SHARED_BLOBS": "1",
    "HF_HUB_VERBOSITY": "error",
    # With it the client would write requests down, signed addresses among them.
    "HF_DEBUG": "0",
}

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ModelCache:
    root: Path
    #: Bytes of all models together; None for no limit.
    limit_bytes: int | None = None
    #: Bytes of the disk that a download leaves free.
    reserve_bytes: int = 0
    #: Fields of `worker.hub_download.Patience`, where they are not its own.
    patience: dict[str, float] = field(default_factory=dict)

    def fetch(self, source: ModelSource, check: Callable[[], None]) -> Path:
        """The folder of a pinned snapshot, whole and verified.

        `check` is asked several times a second; whatever it raises ends the download, which a later one resumes.
        Raises InvalidInput where the model cannot be had, Unavailable where trying again helps, StepFailed where what
        the Hub sends is damaged.
        """
        return self._folder(source, check, small=False)

    def fetch_small(self, source: ModelSource, check: Callable[[], None]) -> Path:
        """Config, tokenizer and templates without the weights; raises as `fetch` does."""
        return self._folder(source, check, small=True)

    def weights_at_hand(self, source: ModelSource) -> Path | None:
        """The model's folder if nothing of it would have to be fetched."""
        if source.kind == "local":
            return Path(source.location)
        there = snapshot_at_hand(self.root, source.location, str(source.revision))
        return there.folder if there else None

    @contextmanager
    def hold(self, source: ModelSource) -> Iterator[None]:
        """While this is open no process of this machine removes the snapshot, which need not be there yet."""
        if source.kind == "local":
            yield
            return
        with using(self.root, source.location, str(source.revision)):
            yield

    def _folder(self, source: ModelSource, check: Callable[[], None], *, small: bool) -> Path:
        if source.kind == "local":
            return Path(source.location)
        if there := snapshot_at_hand(self.root, source.location, str(source.revision), small=small):
            touch(self.root, source.location, str(source.revision))
            return there.folder
        log.info("model_fetch", repository=source.location, revision=source.revision, small=small)
        request = {
            "root": str(self.root),
            "repo_id": source.location,
            "revision": source.revision,
            "small": small,
            "limit_bytes": self.limit_bytes,
            "reserve_bytes": self.reserve_bytes,
            "patience": self.patience,
        }
        return _download(request, check)


def make_cache(settings: Settings) -> ModelCache:
    return ModelCache(
        settings.model_cache_dir,
        limit_bytes=settings.model_cache_bytes,
        reserve_bytes=settings.model_cache_reserve_bytes,
    )


# --- the child ------------------------------------------------------------------------------------------------------


def _download(request: dict[str, Any], check: Callable[[], None]) -> Path:
    with tempfile.TemporaryFile() as said, _child(said) as process:
        stdin: IO[bytes] = process.stdin  # type: ignore[assignment]  # a pipe was asked for
        with suppress(BrokenPipeError):  # it has ended already; its last words say why
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        answer = _follow(process, request["repo_id"], check)
        if "folder" in answer:
            return Path(answer["folder"])
        if "cause" in answer:
            raise _error(Cause(**answer["cause"]))
        said.seek(0)
        raise _crashed(process.returncode, said.read().decode(errors="replace"))


@contextmanager
def _child(said: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.hub_download"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        env=_environment(),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()  # what it has fetched stays, and its locks go with it
            process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]  # pipes were asked for


def _environment() -> dict[str, str]:
    passed = {name: value for name, value in os.environ.items() if name.upper() in _PASSED_ON or name.startswith("HF_")}
    return {**passed, **_ALWAYS}


def _follow(process: subprocess.Popen[bytes], repo_id: str, check: Callable[[], None]) -> dict[str, Any]:
    """The child's last line, once it has ended; empty where it said nothing."""
    lines: list[dict[str, Any]] = [{}]
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    logged = time.monotonic()
    while reader.is_alive():
        check()
        reader.join(TICK_SECONDS)
        if time.monotonic() - logged > PROGRESS_SECONDS and "done" in lines[-1]:
            logged = time.monotonic()
            log.info("model_fetch_progress", repository=repo_id, **lines[-1])
    process.wait()
    return lines[-1]


def _read(stdout: IO[bytes], lines: list[dict[str, Any]]) -> None:
    for line in stdout:
        lines[:] = [json.loads(line)]
        if "removed" in lines[-1]:
            log.info("model_cache_freed", **lines[-1])


def _error(cause: Cause) -> ShadowError:
    if cause.fault == "user":
        return InvalidInput(cause.message, code=cause.code, param=cause.param, hint=cause.hint)
    if cause.retryable:
        return Unavailable(cause.message, code=cause.code, param=cause.param, hint=cause.hint)
    return StepFailed(cause)


def _crashed(returncode: int, said: str) -> Unavailable:
    """The token is in no line of the child's own; that it is in none of a library's is made sure of here."""
    token = os.environ.get("HF_TOKEN", "")
    words = (said.replace(token, "…") if token else said).strip()
    log.error("download_crashed", returncode=returncode, said=words[-3000:])
    last = words.rpartition("\n")[2][:300]
    return Unavailable(
        f"The download of a model ended with exit status {returncode}. {last}".strip(),
        code="download_crashed",
        hint="The operator finds more in the worker's log.",
    )
