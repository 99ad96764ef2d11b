"""Fill a workspace with what its steps read: the dataset files and the models. The last code with network.

Models come from one cache that all jobs of this machine share; a workspace holds links to them, never copies.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path

import structlog
from huggingface_hub import snapshot_download

from core.checkpoints import NOT_SMALL_FILE_PATTERNS, SMALL_FILE_PATTERNS
from core.config import Settings
from core.errors import Cause, InvalidInput, StepFailed, Unavailable
from core.hub import hub_errors
from core.job_spec import DataSource, DeltaFile, DeltaSource, JobSpec, ModelSource
from core.storage import COPY_BYTES, Storage
from worker.workspace import Workspace, write_durably

#: Nothing else of a repository is ever fetched: no pickles, no code.
MODEL_FILES = ["*.safetensors", *SMALL_FILE_PATTERNS]
#: Weights in other layouts that lie beside the shards, the model's card, and whatever lies in folders.
NOT_MODEL_FILES = [*NOT_SMALL_FILE_PATTERNS, "consolidated*", "adapter_*", "README.md", "*/*"]

#: Between two looks at the lease while a model is downloaded.
CHECK_SECONDS = 0.5

log = structlog.get_logger(__name__)


def fetch(
    spec: JobSpec, workspace: Workspace, *, storage: Storage, settings: Settings, check: Callable[[], None]
) -> None:
    """Raises InvalidInput where an input is gone or forbidden, Unavailable where trying again helps.

    `check` is asked while a download runs, and before anything that another attempt might rely on is replaced.
    """
    models = {workspace.instruct: spec.pair.instruct}
    if spec.delta is None:  # a graft needs no base: the change holds all that is left of it
        models[workspace.base] = spec.pair.base
    folders = {link: _model_folder(source, settings, check) for link, source in models.items()}
    check()
    workspace.inputs.mkdir(parents=True, exist_ok=True)
    write_durably(workspace.spec_file, spec.model_dump_json(indent=2).encode())
    if spec.evaluation.left_out is None:
        _fetch_rows(spec, workspace, storage)
    if spec.delta is not None:
        _fetch_delta(spec.delta, workspace.delta, storage, check)
    for link, folder in folders.items():
        _link(folder, link)


def _fetch_rows(spec: JobSpec, workspace: Workspace, storage: Storage) -> None:
    _fetch_data(spec.training, workspace.training, storage)
    if spec.validation:
        _fetch_data(spec.validation, workspace.validation, storage)
    for name, source in spec.evaluation.probes.items():
        _fetch_data(source, workspace.probe(name), storage)


def _fetch_data(source: DataSource, destination: Path, storage: Storage) -> None:
    if not storage.path(source.storage_key).exists():
        raise InvalidInput(
            f"The file {source.file_id} ({source.filename}) was deleted before the job could read it.",
            code="file_not_found",
            hint="Upload it again and create a new job.",
        )
    storage.fetch(source.storage_key, destination)


def _fetch_delta(delta: DeltaSource, folder: Path, storage: Storage, check: Callable[[], None]) -> None:
    """Every file of a published change, its bytes checked against the hash that was taken when it was published."""
    for file in delta.files:
        if not storage.path(file.storage_key).exists():
            raise _artifact_trouble(delta, file, "is not in the server's storage any more")
        storage.fetch(file.storage_key, folder / file.path)
        if _sha256(folder / file.path, check) != file.sha256:
            raise _artifact_trouble(delta, file, "has other bytes than were published")


def _sha256(path: Path, check: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while piece := content.read(COPY_BYTES):
            digest.update(piece)
            check()
    return digest.hexdigest()


def _artifact_trouble(delta: DeltaSource, file: DeltaFile, finding: str) -> StepFailed:
    return StepFailed(
        Cause(
            code="artifact_damaged",
            message=f"The artifact {delta.kind}/{file.path} of the job {delta.job_id} {finding}.",
            hint="Restore the storage folder from its backup, or train again.",
            fault="infrastructure",
            param="source",
        )
    )


def _model_folder(source: ModelSource, settings: Settings, check: Callable[[], None]) -> Path:
    if source.kind == "local":
        return Path(source.location)
    return _watched(lambda: download(source, settings.model_cache_dir), check)


def _watched(fetch: Callable[[], Path], check: Callable[[], None]) -> Path:
    """Run `fetch` in a thread and ask `check` meanwhile. One left behind goes on into the cache and harms nobody."""
    done: Future[Path] = Future()

    def work() -> None:
        try:
            done.set_result(fetch())
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            done.set_exception(error)

    threading.Thread(target=work, name="download", daemon=True).start()
    while not wait([done], timeout=CHECK_SECONDS).done:
        check()
    return done.result()


def download(source: ModelSource, cache: Path) -> Path:
    """The folder of a pinned Hub snapshot, downloaded where it is not in the cache yet."""
    log.info("model_fetch", repository=source.location, revision=source.revision)
    with _disk_errors(), hub_errors(source.location, source.revision):
        return Path(
            snapshot_download(
                source.location,
                revision=source.revision,
                cache_dir=cache,
                allow_patterns=MODEL_FILES,
                ignore_patterns=NOT_MODEL_FILES,
            )
        )


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"The worker's disk refused a model file ({error.strerror or error}).",
            code="storage_unavailable",
            hint="Free space in the worker's data folder.",
        ) from error


def _link(target: Path, link: Path) -> None:
    if not (target / "config.json").exists():
        raise InvalidInput(f"The model folder {target.name!r} has no config.json any more.", param="model")
    link.unlink(missing_ok=True)
    link.symlink_to(target)
