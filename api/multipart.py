"""Read one uploaded file from a multipart body while it arrives: nothing is held in memory or written twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
from anyio import to_thread
from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from core.errors import InvalidInput, ShadowError, TooSlow
from core.storage import Incoming, Storage

#: Form fields besides the file are a word each.
MAX_FIELD_BYTES = 4096
MAX_FIELDS = 16
MAX_FILENAME = 512
#: Unprintable, and yet part of how a name is written: they join letters, as in Devanagari, and emoji.
JOINERS = "\u200c\u200d"
MAX_BOUNDARY_BYTES = 200
#: What a form may have around its file: boundaries, headers, the other fields.
MAX_AROUND_BYTES = 128 * 1024

#: The file is handed to storage in blocks of at least this: each costs a walk through another thread.
BLOCK_BYTES = 1024 * 1024

#: A client that sends nothing for so long is gone.
IDLE_SECONDS = 60.0


@dataclass(frozen=True)
class Limit:
    """How large a file may be, and what is said of a larger one."""

    bytes: int
    error: ShadowError

    def check(self, headers: Headers) -> None:
        """Refuse a body at its headers, where these tell that its file is too large."""
        declared = headers.get("content-length", "")
        if declared.isdecimal():
            self.check_body(int(declared))

    def check_body(self, size: int) -> None:
        if size > self.bytes + MAX_AROUND_BYTES:
            raise self.error

    def check_file(self, size: int) -> None:
        if size > self.bytes:
            raise self.error


@dataclass
class Form:
    """What the body held. `filename` is None where no file part came."""

    filename: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    complete: bool = False


@asynccontextmanager
async def arriving(storage: Storage, key: str) -> AsyncIterator[Incoming]:
    """An object on its way into storage, which is dropped where the block fails."""
    incoming = await to_thread.run_sync(storage.receive, key)
    try:
        yield incoming
    except BaseException:
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(incoming.drop)
        raise


async def receive_form(request: Request, incoming: Incoming, *, part: str, limit: Limit) -> Form:
    """Feed the form's part named `part` to `incoming` and return the rest.

    Raises InvalidInput for a body that is cut or malformed, TooSlow for one that stops coming, and the limit's own
    error for one past it.
    """
    limit.check(request.headers)
    reader = _Reader(request.headers.get("content-type", ""), incoming, part, limit)
    try:
        return await reader.read(_body(request))
    except MultipartParseError as error:
        raise InvalidInput(f"The multipart body is malformed: {error}.", code="invalid_multipart") from error
    except ClientDisconnect as error:
        raise InvalidInput("The upload ended before its last byte.", code="upload_cut") from error


async def _body(request: Request) -> AsyncIterator[bytes]:
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                piece = await anext(stream, None)
        except TimeoutError as error:
            raise TooSlow(f"No byte of the upload came for {IDLE_SECONDS:g} seconds.") from error
        if piece is None:
            return
        yield piece


class _Reader:
    def __init__(self, content_type: str, incoming: Incoming, part: str, limit: Limit) -> None:
        self._form = Form()
        self._incoming = incoming
        self._part = part
        self._limit = limit
        self._header = bytearray()
        self._header_name = b""
        self._name = ""
        self._field = bytearray()
        self._parts = 0
        self._block = bytearray()
        self._writing: asyncio.Future[None] | None = None
        self._parser = MultipartParser(
            _boundary(content_type),
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._end_header,
                "on_part_data": self._on_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    async def read(self, body: AsyncIterator[bytes]) -> Form:
        received = 0
        try:
            async for piece in body:
                received += len(piece)
                self._limit.check_body(received)
                self._parser.write(piece)
                if len(self._block) >= BLOCK_BYTES:
                    await self._hand_over()
            await self._hand_over()
        finally:
            await self._written()  # storage is not dropped while a thread still writes to it
        if not self._form.complete:
            raise InvalidInput("The multipart body ends before its last boundary.", code="invalid_multipart")
        return self._form

    async def _hand_over(self) -> None:
        """Let a thread write the block while the next one arrives; one block waits at most."""
        await self._written()
        block, self._block = self._block, bytearray()
        self._writing = asyncio.get_running_loop().run_in_executor(None, self._incoming.write, block)

    async def _written(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    def _begin_part(self) -> None:
        self._name = ""
        self._field.clear()
        self._parts += 1
        if self._parts > MAX_FIELDS + 1:
            raise InvalidInput(f"The form holds more than {MAX_FIELDS} fields besides its file.")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._name_part(bytes(self._header))
        self._header_name = b""
        self._header.clear()

    def _name_part(self, header: bytes) -> None:
        _, options = parse_options_header(header)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name != self._part:
            return
        if self._form.filename is not None:
            raise InvalidInput(f"The body holds two parts named '{self._part}'; send one.", param=self._part)
        # A form's quote comes as `%22`, from browsers and from the SDK; they leave a `%` as it is.
        sent = options.get(b"filename", b"").replace(b"%22", b'"')
        self._form.filename = clean_filename(sent.decode("utf-8", "replace"))

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == self._part:
            self._form.bytes += end - start
            self._limit.check_file(self._form.bytes)
            self._block += memoryview(data)[start:end]
            return
        self._field += data[start:end]
        if len(self._field) > MAX_FIELD_BYTES:
            raise InvalidInput(f"The field is longer than {MAX_FIELD_BYTES:,} bytes.", param=self._name)

    def _end_part(self) -> None:
        if self._name == self._part:
            return
        if self._name in self._form.fields:
            raise InvalidInput(f"The body holds two fields named '{self._name[:100]}'; send one.", param=self._name)
        self._form.fields[self._name] = self._field.decode("utf-8", "replace")

    def _end(self) -> None:
        self._form.complete = True


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= MAX_BOUNDARY_BYTES:
        raise InvalidInput(
            f"Send the file as multipart/form-data with a boundary; found content type {content_type[:100]!r}.",
            code="invalid_multipart",
        )
    return boundary


def clean_filename(filename: str) -> str:
    """The name as a label only: no folders, no control characters. Storage never sees it."""
    name = filename.replace("\\", "/").rpartition("/")[2]
    printable = "".join(character for character in name if character.isprintable() or character in JOINERS)
    return printable[:MAX_FILENAME] or "upload"
