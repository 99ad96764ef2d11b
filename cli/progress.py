"""Rich's progress bars on stderr, for whoever watches: on a terminal, and nowhere else."""

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


@contextmanager
def spinner(what: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@contextmanager
def counter(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar that counts things; it is told each one's name."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda name: progress.update(task, advance=1, description=name)
