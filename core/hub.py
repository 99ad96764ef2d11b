"""The Hugging Face Hub: what a name means there now, what of it lies in the models' cache, its errors in our words.

The cache is laid out as the Hub's client does it: `models--owner--name/` with `blobs`, `snapshots/COMMIT` and `refs`.
Beside that, `.shadowft/models--owner--name/` holds what we know about it: a mark for each snapshot that was fetched
whole and verified, and the locks of those who fetch and use it (worker/cache_room.py).

The Hub's client is imported where it is used: most processes never speak to the Hub, and it costs half a second.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import InvalidInput, ShadowError, Unavailable

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo
    from huggingface_hub.hf_api import RepoSibling

    from core.job_spec import ModelSource

HUB_TIMEOUT_SECONDS = 20.0
#: What is asked for where no revision is named.
DEFAULT_REVISION = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")


def pin(source: ModelSource, cache: Path | None = None) -> ModelSource:
    """The same model at the commit that its revision means now, so that it stays the same however long the job waits.

    With `cache` the answer is noted there, for the time when HF_HUB_OFFLINE is set; and a commit that lies there whole
    is not asked about at all. Raises InvalidInput for a model that is not there or forbidden, Unavailable where trying
    again helps.
    """
    if source.kind == "local":
        return source
    if cache is not None and snapshot_at_hand(cache, source.location, source.revision or ""):
        return source
    if cache is not None and is_offline():
        return source.model_copy(update={"revision": _noted_commit(source, cache)})
    commit = ask_hub(source.location, source.revision).sha
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise hub_away(source.location, f"named {str(commit)[:100]!r} as the model's commit")
    if cache is not None and source.revision != commit:
        _note_commit(source, cache, commit)
    return source.model_copy(update={"revision": commit})


def ask_hub(
    repo_id: str,
    revision: str | None,
    *,
    with_sizes: bool = False,
    timeout_seconds: float = HUB_TIMEOUT_SECONDS,
) -> ModelInfo:
    """What the Hub says about a model at a revision: its commit and its files.

    Raises as `hub_errors` does. An answer of another shape, perhaps that of a proxy on the way, is Unavailable too.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with hub_errors(repo_id, revision):
        try:
            info = HfApi().model_info(repo_id, revision=revision, files_metadata=with_sizes, timeout=timeout_seconds)
            if not all(_is_described(one, with_sizes) for one in info.siblings or []):
                raise TypeError("a file has no name, size or hash")
        except (HfHubHTTPError, HFValidationError):  # some are ValueErrors
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # the client takes the shape on trust
            raise _nonsense(repo_id, error) from error
    return info


def _is_described(file: RepoSibling, with_sizes: bool) -> bool:
    if not with_sizes:
        return isinstance(file.rfilename, str)
    blob = file.lfs.sha256 if file.lfs else file.blob_id
    return isinstance(file.rfilename, str) and isinstance(file.size, int) and isinstance(blob, str)


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network to this process."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


# --- the models' cache ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A model at one commit, in the cache."""

    folder: Path
    #: What the repository has beside the files that were fetched.
    left_out: tuple[str, ...]


def repository_folder(cache: Path, repo_id: str) -> Path:
    return cache / f"models--{repo_id.replace('/', '--')}"


def snapshot_folder(cache: Path, repo_id: str, commit: str) -> Path:
    return repository_folder(cache, repo_id) / "snapshots" / commit


def our_folder(cache: Path, repo_id: str) -> Path:
    """Marks and locks of one repository."""
    return cache / ".shadowft" / repository_folder(cache, repo_id).name


def mark_file(cache: Path, repo_id: str, commit: str, *, small: bool = False) -> Path:
    """Written last, when every file has been verified. `small`: of the small files alone."""
    return our_folder(cache, repo_id) / f"{commit}{'.small' if small else ''}.json"


def snapshot_at_hand(cache: Path, repo_id: str, commit: str, *, small: bool = False) -> Snapshot | None:
    """The snapshot if it was fetched, verified and not touched since; with `small` its small files are enough."""
    if not COMMIT.fullmatch(commit):
        return None
    marks = [mark_file(cache, repo_id, commit, small=kind) for kind in ((False, True) if small else (False,))]
    folder = snapshot_folder(cache, repo_id, commit)
    for mark in filter(None, map(read_mark, marks)):
        if all(_is_untouched(folder / name, file) for name, file in mark["files"].items()):
            return Snapshot(folder, tuple(mark["left_out"]))
    return None


def read_mark(path: Path) -> dict[str, Any] | None:
    """`{"files": {name: {"blob", "bytes", "mtime_ns"}}, "left_out": [name]}`; None where there is no mark, or where a
    full disk left half of one: then the snapshot is verified anew."""
    try:
        mark: dict[str, Any] = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return mark


def _is_untouched(path: Path, file: dict[str, Any]) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (file["bytes"], file["mtime_ns"])


def readable_snapshot(cache: Path, repo_id: str, commit: str) -> Snapshot | None:
    """A snapshot whose headers can be read without the Hub. Offline that may also be one which somebody else put into
    the cache; whether it is whole, its index and its headers tell."""
    if (there := snapshot_at_hand(cache, repo_id, commit)) is not None:
        return there
    if not COMMIT.fullmatch(commit) or not is_offline():
        return None
    folder = snapshot_folder(cache, repo_id, commit)
    return Snapshot(folder, ()) if any(folder.glob("*.safetensors")) else None


def _noted_commit(source: ModelSource, cache: Path) -> str:
    """What the revision meant when the Hub was last asked."""
    revision = source.revision or DEFAULT_REVISION
    if COMMIT.fullmatch(revision):
        return revision
    ref = _ref_file(source, cache).resolve()
    noted = ref.read_text().strip() if ref.is_relative_to(cache.resolve()) and ref.is_file() else ""
    if not COMMIT.fullmatch(noted):
        raise offline_error(source.location, revision)
    return noted


def _note_commit(source: ModelSource, cache: Path, commit: str) -> None:
    """In the place where the Hub's client would note it, which it does only for what it fetches by that name."""
    ref = _ref_file(source, cache)
    ref.parent.mkdir(parents=True, exist_ok=True)
    temporary = ref.with_name(f".{ref.name}.{os.getpid()}.tmp")
    temporary.write_text(commit)
    temporary.rename(ref)


def _ref_file(source: ModelSource, cache: Path) -> Path:
    return repository_folder(cache, source.location) / "refs" / (source.revision or DEFAULT_REVISION)


# --- errors ---------------------------------------------------------------------------------------------------------


@contextmanager
def hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Put what the Hub's client raises into our own words, the user's fault and the Hub's apart."""
    from huggingface_hub import errors

    # The root of what the client's HTTP library raises; that library is another one from version to version.
    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        yield
    except (errors.GatedRepoError, errors.DisabledRepoError):
        raise _gated(repo_id) from None
    except errors.RepositoryNotFoundError:
        raise _missing(f"The Hub has no model {repo_id}", "Check the name; a private one needs HF_TOKEN.") from None
    except errors.RevisionNotFoundError:
        raise _missing(f"{repo_id} has no revision {revision}", "Name a branch, tag or commit of it.") from None
    except _unanswered() as error:
        raise _not_in_cache(repo_id, revision, error.__cause__ or error) from error
    except errors.EntryNotFoundError:
        raise _missing(f"{repo_id}@{revision} lacks a file", "Name a model in the Hugging Face layout.") from None
    except errors.HfHubHTTPError as error:
        raise _http_failure(repo_id, error.response.status_code) from error
    except http_error as error:
        raise hub_away(repo_id, f"cannot be reached ({type(error).__name__})") from error
    except errors.SafetensorsParsingError as error:
        raise InvalidInput(f"{repo_id} is damaged: {str(error)[:200]}", code="damaged_checkpoint") from None
    except errors.HFValidationError:
        raise InvalidInput(f"{repo_id!r} is not the name of a Hub model", hint="It reads owner/name.") from None


def _http_failure(repo_id: str, status: int) -> ShadowError:
    if status in (401, 403):
        return _gated(repo_id)
    return hub_away(repo_id, f"answered with HTTP status {status}")


def _unanswered() -> tuple[type[Exception], ...]:
    from huggingface_hub import errors

    unreadable = (errors.FileMetadataError, json.JSONDecodeError)
    return (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, *unreadable)


def _not_in_cache(repo_id: str, revision: str | None, error: BaseException) -> ShadowError:
    """The client looks there when it cannot reach the Hub, or cannot read its answer."""
    from huggingface_hub.errors import FileMetadataError

    if is_offline():
        return offline_error(repo_id, revision)
    if isinstance(error, FileMetadataError | json.JSONDecodeError):
        return _nonsense(repo_id, error)
    return hub_away(repo_id, f"cannot be reached ({type(error).__name__})")


def _nonsense(repo_id: str, error: Exception) -> Unavailable:
    return hub_away(repo_id, f"gave an answer that is not a Hub's ({type(error).__name__}: {str(error)[:200]})")


def _missing(message: str, hint: str) -> InvalidInput:
    return InvalidInput(message, code="model_not_found", param="model", hint=hint)


def _gated(repo_id: str) -> InvalidInput:
    return InvalidInput(
        f"The Hub does not give {repo_id} to this server: it is gated, private or disabled",
        code="gated_model",
        hint="Accept its licence on the Hub and set HF_TOKEN to a token of that account.",
    )


def offline_error(repo_id: str, revision: str | None) -> InvalidInput:
    return InvalidInput(
        f"{repo_id} at {revision or DEFAULT_REVISION} is not, or not whole, in the models' cache, and HF_HUB_OFFLINE "
        "forbids to fetch it",
        code="model_not_found",
        param="model",
        hint="Fetch it once without HF_HUB_OFFLINE, or name a model that is there.",
    )


def hub_away(repo_id: str, finding: str) -> Unavailable:
    return Unavailable(f"The Hub {finding} while reading {repo_id}", code="hub_unavailable", hint="Try again later.")
