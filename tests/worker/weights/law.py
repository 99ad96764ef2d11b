"""Laws: claims that hold for every example that Hypothesis draws."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from worker.weights import tensors, writing

#: In memory where there is such a place: each example syncs a dozen files.
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108

UNHURRIED = (HealthCheck.too_slow, HealthCheck.data_too_large)
#: A failing example is not made smaller: it prints in a few lines as it is, and the search takes minutes.
PHASES = (Phase.reuse, Phase.generate)

Claim = Callable[..., None]


def law(*, quick: int, thorough: int, **drawn: Any) -> Callable[[Claim], Claim]:
    """Make `claim(folder, **drawn)` a test of `quick` examples, and a slow one of `thorough`; each in a new folder."""

    def decorate(claim: Claim) -> Claim:
        def example(**values: Any) -> None:
            with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
                claim(Path(folder), **values)

        example.__name__ = claim.__name__  # under which Hypothesis remembers failures

        @pytest.mark.parametrize("examples", [quick, pytest.param(thorough, marks=pytest.mark.slow)])
        def test(examples: int) -> None:
            profile = settings(max_examples=examples, deadline=None, phases=PHASES, suppress_health_check=UNHURRIED)
            profile(given(**drawn)(example))()

        test.__name__, test.__doc__ = claim.__name__, claim.__doc__
        return test

    return decorate


@contextmanager
def working_in(chunk: int, block: int) -> Iterator[None]:
    """Other sizes of what is computed at once, in elements, and of what is written at once, in bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "CHUNK_ELEMENTS", chunk)
        patch.setattr(writing, "BLOCK_BYTES", block)
        yield
