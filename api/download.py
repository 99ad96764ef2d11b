"""A stored file as an answer: whole or by `Range`, with its hash as `ETag`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from anyio import to_thread
from fastapi import Depends, Header, Response
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from api.errors import ErrorBody, error_response
from core.errors import NotFound, RangeUnusable

_RANGE = re.compile(r"(?P<first>[0-9]*)-(?P<last>[0-9]*)")
#: A number of more digits is beyond the end of every file, however it goes on.
_DIGITS = 19

_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

#: For `responses` of a route that answers so.
DOWNLOADS: dict[int | str, dict[str, Any]] = {
    200: {"content": _BINARY, "description": "The bytes; `x-checksum-sha256` is their hash, `ETag` the same."},
    206: {"content": _BINARY, "description": "The bytes that `Range` asked for, as far as the file has them."},
    304: {"description": "They are those of the `ETag` in `If-None-Match`."},
    416: {"model": ErrorBody, "description": "`Range` names no byte of the file; `Content-Range` tells its size."},
}


@dataclass(frozen=True)
class Wanted:
    """What of a file is asked for."""

    range: str | None
    if_range: str | None
    if_none_match: str | None


async def _wanted(
    wanted_range: Annotated[
        str | None,
        Header(
            alias="range",
            description="`bytes=0-1023`, `bytes=1024-` or `bytes=-1024`; several come as `multipart/byteranges`. "
            "Ignored where its unit is not `bytes`.",
        ),
    ] = None,
    if_range: Annotated[str | None, Header(description="`Range` counts for a file of this `ETag` only.")] = None,
    if_none_match: Annotated[str | None, Header(description="The `ETag` of what you have.")] = None,
) -> Wanted:
    return Wanted(wanted_range, if_range, if_none_match)


WantedDep = Annotated[Wanted, Depends(_wanted)]


class _Download(FileResponse):
    """Opened before the first byte of the answer: who deletes the file meanwhile gets his way after it."""

    chunk_size = 1024 * 1024  # each is a walk through another thread
    #: The part of the file to send, as a `Range` without a fault; None for the whole.
    ranges: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = {**scope, "headers": [] if self.ranges is None else [(b"range", self.ranges.encode())]}
        try:
            held = await to_thread.run_sync(os.open, self.path, os.O_RDONLY)
        except FileNotFoundError:
            await error_response(_gone(self.filename))(scope, receive, send)
            return
        try:
            self.path = f"/dev/fd/{held}"
            await super().__call__(scope, receive, send)
        finally:
            os.close(held)


def download(wanted: Wanted, path: Path, *, filename: str, sha256: str) -> Response:
    """Raises NotFound where the file has been deleted since its row was read."""
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise _gone(filename) from error
    etag = f'"{sha256}"'
    headers = {"etag": etag, "x-checksum-sha256": sha256}
    if _names(wanted.if_none_match or "", etag):
        return Response(status_code=304, headers=headers)
    answer = _Download(
        path, media_type="application/octet-stream", filename=filename, headers=headers, stat_result=found
    )
    applies = wanted.if_range in {None, etag, answer.headers["last-modified"]}
    if wanted.range is None or not applies or not _counts_bytes(wanted.range):
        return answer
    answer.ranges = _within(wanted.range, found.st_size)
    return answer if answer.ranges else _range_unusable(wanted.range, found.st_size)


def _gone(filename: str | None) -> NotFound:
    return NotFound(f"The content of {filename!r} has been deleted.", code="content_not_found")


def _names(header: str, etag: str) -> bool:
    """Whether `If-None-Match` names the tag; a proxy may have made it a weak one."""
    return header.strip() == "*" or etag in {tag.strip().removeprefix("W/") for tag in header.split(",")}


def _counts_bytes(header: str) -> bool:
    return header.partition("=")[0].strip().lower() == "bytes"


def _within(header: str, size: int) -> str | None:
    """What the file has of the ranges (RFC 9110, 14.1.2); None where that is nothing, or one of them is malformed."""
    asked = [one.strip() for one in header.partition("=")[2].split(",")]
    try:
        spans = [_span(one, size) for one in asked if one]
    except ValueError:
        return None
    served = [f"{first}-{last}" for first, last in spans if first <= last]
    return f"bytes={','.join(served)}" if served else None


def _span(one: str, size: int) -> tuple[int, int]:
    """Its first and its last byte; the first is beyond the last where the file has none of it."""
    match = _RANGE.fullmatch(one)
    if match is None or one == "-":
        raise ValueError(one)
    if not match["first"]:
        return max(0, size - _number(match["last"])), size - 1
    first, last = _number(match["first"]), _number(match["last"]) if match["last"] else size - 1
    if match["last"] and last < first:
        raise ValueError(one)
    return first, min(last, size - 1)


def _number(digits: str) -> int:
    return int(digits.lstrip("0")[:_DIGITS] or "0")


def _range_unusable(header: str, size: int) -> Response:
    error = RangeUnusable(
        f"The range {header[:100]!r} cannot be taken from this file of {size:,} bytes.", param="range"
    )
    answer = error_response(error)
    answer.headers["content-range"] = f"bytes */{size}"
    return answer
