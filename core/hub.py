"""The Hugging Face Hub: what a name means there now, and its errors in our words.

The Hub's client is imported where it is used: most processes never speak to the Hub, and it costs half a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from core.errors import InvalidInput, ShadowError, Unavailable

if TYPE_CHECKING:
    from core.job_spec import ModelSource

HUB_TIMEOUT_SECONDS = 20.0


def pin(source: ModelSource) -> ModelSource:
    """The same model at the commit that its revision means now, so that it stays the same however long the job waits.

    Raises InvalidInput for a model that is not there or forbidden, Unavailable where trying again helps.
    """
    if source.kind == "local":
        return source
    from huggingface_hub import HfApi

    with hub_errors(source.location, source.revision):
        info = HfApi().model_info(source.location, revision=source.revision, timeout=HUB_TIMEOUT_SECONDS)
    return source.model_copy(update={"revision": info.sha})


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
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _away(repo_id, f"cannot be reached ({type(error).__name__})") from error
    except errors.EntryNotFoundError:
        raise _missing(f"{repo_id}@{revision} lacks a file", "Name a model in the Hugging Face layout.") from None
    except errors.HfHubHTTPError as error:
        raise _http_failure(repo_id, error.response.status_code) from error
    except http_error as error:
        raise _away(repo_id, f"cannot be reached ({type(error).__name__})") from error
    except errors.SafetensorsParsingError as error:
        raise InvalidInput(f"{repo_id} is damaged: {str(error)[:200]}", code="damaged_checkpoint") from None
    except errors.HFValidationError:
        raise InvalidInput(f"{repo_id!r} is not the name of a Hub model", hint="It reads owner/name.") from None


def _http_failure(repo_id: str, status: int) -> ShadowError:
    if status in (401, 403):
        return _gated(repo_id)
    return _away(repo_id, f"answered with HTTP status {status}")


def _missing(message: str, hint: str) -> InvalidInput:
    return InvalidInput(message, code="model_not_found", param="model", hint=hint)


def _gated(repo_id: str) -> InvalidInput:
    return InvalidInput(
        f"The Hub does not give {repo_id} to this server: it is gated, private or disabled",
        code="gated_model",
        hint="Accept its licence on the Hub and set HF_TOKEN to a token of that account.",
    )


def _away(repo_id: str, finding: str) -> Unavailable:
    return Unavailable(f"The Hub {finding} while reading {repo_id}", code="hub_unavailable", hint="Try again later.")
