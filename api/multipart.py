"""Read one uploaded file from a multipart body while it arrives: nothing is held in memory or written twice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from core.errors import InvalidInput, TooLarge
from core.storage import Incoming

#: Form fields besides the file are a word each.
MAX_FIELD_BYTES = 4096
MAX_FIELDS = 16
MAX_FILENAME = 512


@dataclass
class Upload:
    """What the body held. `filename` is None where no file part came."""

    filename: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    complete: bool = False


class UploadReader:
    """Feeds the part named `file` to `incoming` and keeps the other fields."""

    def __init__(self, content_type: str, incoming: Incoming, *, max_bytes: int) -> None:
        self.upload = Upload()
        self._incoming = incoming
        self._max_bytes = max_bytes
        self._header = bytearray()
        self._header_name = b""
        self._name = ""
        self._field = bytearray()
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

    async def read(self, body: AsyncIterator[bytes]) -> Upload:
        """Raises InvalidInput for a body that is cut or malformed, TooLarge for one past the limit."""
        try:
            async for piece in body:
                self._parser.write(piece)
            self._parser.finalize()
        except MultipartParseError as error:
            raise InvalidInput(f"The multipart body is malformed: {error}.", code="invalid_multipart") from error
        if not self.upload.complete:
            raise InvalidInput("The multipart body ends before its last boundary.", code="invalid_multipart")
        return self.upload

    def _begin_part(self) -> None:
        self._name = ""
        self._field.clear()

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
        if self._name != "file":
            return
        if self.upload.filename is not None:
            raise InvalidInput("The body holds two parts named 'file'; send one.", param="file")
        self.upload.filename = _clean(options.get(b"filename", b""))

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._take(data[start:end])
            return
        self._field += data[start:end]
        if len(self._field) > MAX_FIELD_BYTES or len(self.upload.fields) >= MAX_FIELDS:
            raise InvalidInput("The form holds more fields, or longer ones, than an upload needs.", param=self._name)

    def _take(self, piece: bytes) -> None:
        self.upload.bytes += len(piece)
        if self.upload.bytes > self._max_bytes:
            raise TooLarge(
                f"The file is larger than {self._max_bytes:,} bytes, the limit of this server.", param="file"
            )
        self._incoming.write(piece)

    def _end_part(self) -> None:
        if self._name != "file":
            self.upload.fields[self._name] = self._field.decode("utf-8", "replace")

    def _end(self) -> None:
        self.upload.complete = True


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 200:
        raise InvalidInput(
            f"Send the file as multipart/form-data with a boundary; found content type {content_type[:100]!r}.",
            code="invalid_multipart",
        )
    return boundary


def _clean(filename: bytes) -> str:
    """The name as a label only: no folders, no control characters. Storage never sees it."""
    name = filename.decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2]
    printable = "".join(character for character in name if character.isprintable())
    return printable[:MAX_FILENAME] or "upload"
