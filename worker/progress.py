"""One format for what a step tells its supervisor: a JSON object a line.

The reader takes the lines as untrusted: anything that does not fit is dropped, since a line lost costs a redraw and a
worker lost costs a job.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, Literal

import msgspec


class Step(msgspec.Struct, tag="step", frozen=True, kw_only=True):
    """How far the step is. Counts are of whatever it counts: optimizer steps, tensors, rows."""

    step: int
    total_steps: int
    loss: float | None = None


class Metrics(msgspec.Struct, tag="metrics", frozen=True, kw_only=True):
    """One measurement of the training, with the keys of the fine-tuning contract."""

    step: int
    total_steps: int
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None


class Note(msgspec.Struct, tag="note", frozen=True, kw_only=True):
    """Something the job's owner should read."""

    level: Literal["info", "warn"]
    message: str
    data: dict[str, Any] = {}


class Saved(msgspec.Struct, tag="saved", frozen=True, kw_only=True):
    """A resume point of that step stands whole in the workspace."""

    step: int


Line = Step | Metrics | Note | Saved

#: The exit status of a step that was told to leave (SIGUSR1): what it had done stands in a resume point, and it is
#: not done.
EXIT_SAVED = 75
#: The exit status of a step that met a full disk and could not even write down its cause.
EXIT_DISK_FULL = 74

#: A longer line is not one of ours.
MAX_LINE_BYTES = 64 * 1024

_decoder = msgspec.json.Decoder(Line)
_encoder = msgspec.json.Encoder()


class ProgressWriter:
    """Writes lines to a raw byte stream, each in one unbuffered write."""

    def __init__(self, stream: io.RawIOBase) -> None:
        self._stream = stream

    def write(self, line: Line) -> None:
        self._stream.write(_encoder.encode(line) + b"\n")

    def step(self, step: int, total_steps: int, loss: float | None = None) -> None:
        self.write(Step(step=step, total_steps=total_steps, loss=loss))

    def note(self, message: str, *, level: Literal["info", "warn"] = "info", **data: Any) -> None:
        self.write(Note(level=level, message=message, data=data))


def read_lines(stream: io.BufferedIOBase) -> Iterator[Line]:
    """The lines of `stream` until it ends."""
    while raw := stream.readline(MAX_LINE_BYTES):
        try:
            yield _decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
