"""Rich's progress bar on stderr, for whoever watches: on a terminal, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Done, in all.
OnProgress = Callable[[int, int], None]


@contextmanager
def progress_bar(what: str, *, then: str = "") -> Iterator[OnProgress | None]:
    """A bar that counts bytes; when its count falls, a new one that counts tensors has begun and is called `then`.

    None where nobody watches: Rich is not imported then.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    text, bar, left = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    columns = text, bar, DownloadColumn(), TransferSpeedColumn(), left
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)

        def tell(done: int, total: int) -> None:
            if done < progress.tasks[0].completed:
                progress.columns = (text, bar, MofNCompleteColumn(), left)
                progress.reset(task, description=then)
            progress.update(task, completed=done, total=total)

        yield tell
