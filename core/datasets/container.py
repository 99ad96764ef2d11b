"""The bytes of a training file, cut into rows that are not decoded yet.

JSONL is read line by line in constant memory. A JSON array has no such seams, so it is held in memory, up to a limit.
Whatever the bytes are, the only error that leaves here is Refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import msgspec

from core.datasets.problem import Refused

Container = Literal["jsonl", "json_array"]

#: A longer row is refused without being read whole. Eight million characters are beyond any model's context.
MAX_ROW_BYTES = 8 * 2**20
MAX_ARRAY_BYTES = 256 * 2**20

_BUFFER_BYTES = 2**20
_BOM = b"\xef\xbb\xbf"
#: How files begin that are often sent by mistake.
_SIGNATURES = {
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive (or an Office document)",
    b"PK\x05\x06": "an empty zip archive",
    b"PAR1": "a Parquet table",
    b"ARROW1": "an Arrow table",
    b"%PDF": "a PDF document",
    b"\x7fELF": "an ELF program",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"SQLite format 3": "an SQLite database",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}

_ONE_OBJECT_A_LINE = "Write one whole JSON object on each line, without commas between lines"
_AS_JSONL = "Send it as JSONL, one JSON object a line"


class RawRow(NamedTuple):
    #: From 1: the line of JSONL (blank ones count), or the place in an array.
    number: int
    #: JSON, not decoded yet; None for a row longer than MAX_ROW_BYTES.
    json: bytes | msgspec.Raw | None
    #: Bytes of the file behind this row's end.
    bytes_read: int


class Table(NamedTuple):
    container: Container
    bytes_total: int
    rows: Iterator[RawRow]

    @property
    def unit(self) -> Literal["line", "row"]:
        return "line" if self.container == "jsonl" else "row"


def open_table(path: Path) -> Table:
    """Look at the first bytes and choose how to read on; the rows are read as they are asked for."""
    bytes_total = path.stat().st_size
    with path.open("rb") as file:
        _refuse_known_binary(file.read(16))
        start = _first_text_byte(_past_bom(file))
    if start == b"[":
        return Table("json_array", bytes_total, _array_rows(path, bytes_total))
    return Table("jsonl", bytes_total, _lines(path))


def decode(row: RawRow) -> Any:
    """The JSON value of a row."""
    if row.json is None:
        raise Refused(
            "row_too_long",
            f"longer than {MAX_ROW_BYTES // 2**20} MiB",
            f"Split or shorten it. {_ONE_OBJECT_A_LINE}",
        )
    try:
        return _decoder.decode(row.json)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _not_json(error, bytes(row.json)) from None


_decoder = msgspec.json.Decoder()
_array_decoder = msgspec.json.Decoder(list[msgspec.Raw])


def _refuse_known_binary(head: bytes) -> None:
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            raise Refused("not_json_text", f"the file looks like {kind}", f"{_AS_JSONL}, as plain text in UTF-8")


def _past_bom(file: BinaryIO) -> BinaryIO:
    """The file, placed behind the byte order mark that some editors put first."""
    file.seek(0)
    if file.read(len(_BOM)) != _BOM:
        file.seek(0)
    return file


def _first_text_byte(file: BinaryIO) -> bytes:
    while chunk := file.read(_BUFFER_BYTES):
        if text := chunk.lstrip():
            return text[:1]
    raise Refused("no_rows", "it has no rows", "Write at least one training example")


def _lines(path: Path) -> Iterator[RawRow]:
    with path.open("rb", buffering=_BUFFER_BYTES) as file:
        bytes_read = _past_bom(file).tell()
        for number, line in enumerate(iter(partial(file.readline, MAX_ROW_BYTES + 1), b""), start=1):
            bytes_read += len(line)
            if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
                bytes_read += _skip_line(file)
                yield RawRow(number, None, bytes_read)
            elif not line.isspace():
                yield RawRow(number, line, bytes_read)


def _skip_line(file: BinaryIO) -> int:
    """Pass over the rest of a line; the number of bytes passed."""
    skipped = 0
    while chunk := file.readline(_BUFFER_BYTES):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped


def _array_rows(path: Path, bytes_total: int) -> Iterator[RawRow]:
    if bytes_total > MAX_ARRAY_BYTES:
        raise Refused(
            "array_too_large",
            f"it is a JSON array of {bytes_total // 2**20} MiB, and {MAX_ARRAY_BYTES // 2**20} MiB is the most",
            f"{_AS_JSONL}, which may be of any size (`jq -c '.[]' file.json > file.jsonl`)",
        )
    items = _array_items(path)
    bytes_read = 0
    for number, item in enumerate(items, start=1):
        length = len(memoryview(item))
        bytes_read += length + 1
        yield RawRow(number, item if length <= MAX_ROW_BYTES else None, bytes_read)


def _array_items(path: Path) -> list[msgspec.Raw]:
    """Where each element lies in the file's bytes; an array of many tiny values can outgrow the memory all the same."""
    with path.open("rb") as file:
        content = _past_bom(file).read()
    try:
        items = _array_decoder.decode(content)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _not_array(error, content) from None
    except MemoryError:
        raise Refused("array_too_large", "it is a JSON array of too many values", _AS_JSONL) from None
    if not items:
        raise Refused("no_rows", "it is an empty JSON array", "Write at least one training example")
    return items


def _not_json(error: Exception, row: bytes) -> Refused:
    """Name the likely mistake: the decoder's words alone do not tell it."""
    if isinstance(error, UnicodeDecodeError):
        message = f"it has the byte 0x{error.object[error.start]:02x}, which is not UTF-8"
        return Refused("not_utf8", message, "Save the file in UTF-8")
    if isinstance(error, RecursionError):
        return Refused("not_json", "its JSON is nested too deeply", "Write a flat row")
    if b"\r" in row.strip():
        return Refused("not_json", "it has bare carriage returns", "Save the file with line feeds as line ends")
    return Refused("not_json", f"not valid JSON, {_reason(error)}", _ONE_OBJECT_A_LINE)


def _not_array(error: Exception, content: bytes) -> Refused:
    if isinstance(error, RecursionError):
        return Refused("not_json", "its JSON is nested too deeply", "Write flat rows")
    message = f"it starts with `[` but is not one valid JSON array: {_reason(error)}{_near(error, content)}"
    return Refused("not_json", message, f"Mend it, or write JSONL instead. {_ONE_OBJECT_A_LINE}")


def _reason(error: Exception) -> str:
    """The decoder's words; what it calls truncated can also be half of a surrogate pair."""
    text = str(error).removeprefix("JSON is malformed: ")
    return "it ends in the middle of a value" if text == "Input data was truncated" else text


def _near(error: Exception, content: bytes) -> str:
    _, found, place = str(error).partition("(byte ")
    if not found:
        return ""
    lines_before = content.count(b"\n", 0, int(place.rstrip(")")))
    return f", on line {lines_before + 1}"
