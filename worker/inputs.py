"""Fill a workspace with what its steps read: the dataset files and the models. The last code with network.

Models come from one cache that all jobs of this machine share; a workspace holds links to them, never copies.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from core.checkpoints import read_checkpoint
from core.config import Settings
from core.errors import Cause, InvalidInput, StepFailed
from core.fingerprint import content_sha256
from core.job_spec import DataSource, DeltaFile, DeltaSource, JobSpec, ModelSource
from core.own_files import require_own_files
from core.pairs import checked_source
from core.storage import COPY_BYTES, Storage
from worker.model_cache import make_cache
from worker.workspace import Workspace, write_durably


@contextmanager
def holding_models(spec: JobSpec, settings: Settings) -> Iterator[None]:
    """While this is open, nothing that the job reads is removed from the models' cache."""
    cache = make_cache(settings)
    with ExitStack() as held:
        for source in _models(spec):
            held.enter_context(cache.hold(source))
        yield


def _models(spec: JobSpec) -> list[ModelSource]:
    """Only what tunes base reads it: in a change to be grafted, all that matters of it is left."""
    return [spec.pair.instruct, spec.pair.base] if spec.tunes_base else [spec.pair.instruct]


def fetch(
    spec: JobSpec, workspace: Workspace, *, storage: Storage, settings: Settings, check: Callable[[], None]
) -> None:
    """Raises InvalidInput where an input is gone or forbidden, Unavailable where trying again helps.

    `check` is asked while a download runs, and before anything that another attempt might rely on is replaced.
    """
    cache = make_cache(settings)
    links = (workspace.instruct, workspace.base)
    # Asked again here: since the pair was registered, a link may have been turned elsewhere.
    models = [checked_source(source, settings.model_roots) for source in _models(spec)]
    folders = {link: cache.fetch(source, check) for link, source in zip(links, models, strict=False)}
    check()
    workspace.inputs.mkdir(exist_ok=True)
    if spec.evaluation.left_out is None:
        _fetch_rows(spec, workspace, storage)
    if spec.delta is not None:
        _fetch_delta(spec.delta, workspace.delta, storage, check)
    for link, folder in folders.items():
        _link(folder, link)
    local = [folder for source, folder in zip(models, folders.values(), strict=True) if source.kind == "local"]
    snapshots = tuple(content_sha256(folder, read_checkpoint(folder)) for folder in local)
    settled = spec.model_copy(update={"snapshots": snapshots})
    if workspace.spec_file.exists() and workspace.spec().snapshots != snapshots:
        for name in ("train", "graft", "evaluate"):  # what they have done, they did with other models
            shutil.rmtree(workspace.step(name), ignore_errors=True)
    write_durably(workspace.spec_file, settled.model_dump_json(indent=2).encode())


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


def _link(target: Path, link: Path) -> None:
    """Refuse a folder that has become, since the admission, what an admission refuses: its steps will load it."""
    read_checkpoint(target)
    require_own_files(target)
    link.unlink(missing_ok=True)
    link.symlink_to(target)
