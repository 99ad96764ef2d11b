"""Files that a step left, read by a worker that may read more than the step could: a link would lead it astray, and a
pipe would hold it up. Everything that a worker reads below a step's folder it opens here."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from core.errors import Cause, StepFailed

#: What is read at once is a result, a report or a line for each step, and never so long.
MAX_READ_BYTES = 256 * 1024 * 1024

#: What the kernel says of a link, of something in the place of a folder, and of a socket.
_STRANGE = (errno.ELOOP, errno.ENOTDIR, errno.ENXIO)


def open_left(path: Path, *, below: Path) -> BinaryIO:
    """Open a file that lies below the folder `below`, through no link from there on. Raises StepFailed where there is
    one, or no plain file."""
    names = path.relative_to(below).parts
    if ".." in names:
        raise _unusable(path, below, "lies elsewhere")
    place = os.open(below, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in names[:-1]:
            outer, place = place, os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
            os.close(outer)
        file = os.open(names[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place)
    except OSError as error:
        if error.errno in _STRANGE:
            raise _unusable(path, below, "is no plain file") from error
        raise
    finally:
        os.close(place)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise _unusable(path, below, "is no plain file")
    return os.fdopen(file, "rb")


def read_left(path: Path, *, below: Path) -> bytes:
    """The content of such a file. Raises StepFailed also where it is longer than any that a step of ours writes."""
    with open_left(path, below=below) as file:
        content = file.read(MAX_READ_BYTES + 1)
    if len(content) > MAX_READ_BYTES:
        raise _unusable(path, below, f"is longer than {MAX_READ_BYTES} bytes")
    return content


def _unusable(path: Path, below: Path, what: str) -> StepFailed:
    return StepFailed(
        Cause(
            code="step_output_unusable",
            message=f"The job left {path.relative_to(below)}, which {what}.",
            hint="No step does so by itself: the operator looks at the step's log, and at the job's inputs.",
            fault="infrastructure",
        )
    )
