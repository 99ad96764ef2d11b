"""Bytes of every kind: what is read, what is refused and in which words."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zipfile

import pytest

from core.datasets import check_file, container, read_rows

ROW = b'{"prompt": "Hi", "completion": "Hello"}'
BOM = b"\xef\xbb\xbf"

GOOD = {
    "B29 no newline at the end": (ROW + b"\n" + ROW, 2),
    "B30 CRLF": (ROW + b"\r\n" + ROW + b"\r\n", 2),
    "B33 JSON array": (b"[" + ROW + b",\n" + ROW + b"]", 2),
    "JSON array, BOM and spaces": (BOM + b" \r\n [ " + ROW + b" ]\n\n", 1),
    "JSON array, pretty": (json.dumps([json.loads(ROW)], indent=2).encode(), 1),
    "BOM": (BOM + ROW, 1),
    "blank lines": (b"\n \t\n" + ROW + b"\n\n\r\n" + ROW + b"\n \n", 2),
    "B42 single row": (ROW, 1),
}

BAD = {
    "B27 zero bytes": (b"", "The file cannot be trained on: it has no rows."),
    "B28 only newlines": (b"\n\n\r\n", "it has no rows. Write at least one training example."),
    "B28 only a BOM": (BOM, "it has no rows"),
    "an empty array": (b" [] ", "it is an empty JSON array"),
    "B30 CR only": (ROW + b"\r" + ROW + b"\r", "line 1: it has bare carriage returns. Save the file with line feeds"),
    "B34 a list on each line": (b"[1]\n[2]\n", "starts with `[` but is not one valid JSON array: trailing characters"),
    "B45 gzip": (gzip.compress(ROW), "the file looks like a gzip archive. Send it as JSONL"),
    "B45 parquet": (b"PAR1\x15\x04", "the file looks like a Parquet table"),
    "B45 PDF": (b"%PDF-1.7\n", "the file looks like a PDF document"),
    "B45 ELF": (b"\x7fELF\x02\x01", "the file looks like an ELF program"),
    "UTF-16": (ROW.decode().encode("utf-16"), "the file looks like UTF-16 text"),
    "Latin-1": (b'{"prompt": "caf\xe9", "completion": "x"}', "line 1: it has the byte 0xe9, which is not UTF-8"),
    "CSV": (b"prompt,completion\nHi,Hello\n", "2 of 2 rows cannot be trained on; the first is line 1: not valid JSON"),
    "pretty object": (
        b'{\n "prompt": "Hi"\n}',
        "it ends in the middle of a value. Write one whole JSON object on each",
    ),
    "commas between lines": (ROW + b",\n" + ROW, "line 1: not valid JSON, trailing characters (byte 40). Write one"),
    "NaN": (b'{"prompt": NaN}', "line 1: not valid JSON, invalid character"),
    "lone surrogate": (b'{"prompt": "\\ud800\\u0041"}', "invalid utf-16 surrogate pair"),
    "nested too deeply": (b'{"a":' * 50_000, "line 1: its JSON is nested too deeply"),
    "array nested too deeply": (b"[" * 50_000, "its JSON is nested too deeply"),
    "array cut off": (b"[" + ROW + b",", "not one valid JSON array: it ends in the middle of a value"),
    "array with a missing comma": (b"[" + ROW + b"\n\n" + ROW + b"]", "expected ',' or ']' (byte 42), on line 3."),
    "not UTF-8 in an array": (b'["\xff"]', "row 1: it has the byte 0xff, which is not UTF-8"),
}


@pytest.mark.parametrize(("content", "rows"), GOOD.values(), ids=GOOD.keys())
def test_accepts(content, rows, write):
    path = write(content)
    report = check_file(path)
    assert (report.ok, report.rows) == (True, rows)
    assert len(list(read_rows(path))) == rows


@pytest.mark.parametrize(("content", "words"), BAD.values(), ids=BAD.keys())
def test_refuses(content, words, write):
    report = check_file(write(content))
    assert not report.ok
    assert words in report.summary


def test_b34_a_list_among_objects_is_a_bad_row(write):
    problem = check_file(write(ROW + b"\n[1]\n")).first_errors[0]
    assert problem.located == "line 2: a row must be a JSON object, found a list of 1"


def test_zip(write, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jsonl", ROW)
    report = check_file(tmp_path / "a.zip")
    assert "looks like a zip archive" in report.summary


def test_b32_a_line_of_200_mb_is_refused_in_little_memory(write):
    path = write(ROW + b"\n")
    with path.open("ab") as file:
        for _ in range(200):
            file.write(b"x" * 2**20)
        file.write(b"\n" + ROW + b"\n")
    tracemalloc.start()
    report = check_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.first_errors[0].sentence.startswith("line 2: longer than 8 MiB. Split or shorten it.")
    assert (report.rows, report.bad_rows) == (3, 1)
    assert peak < 4 * container.MAX_ROW_BYTES


def test_a_line_of_exactly_the_limit_is_read(write, monkeypatch):
    monkeypatch.setattr(container, "MAX_ROW_BYTES", len(ROW))
    assert check_file(write(ROW + b"\n" + ROW)).ok
    assert check_file(write(ROW + b" \n" + ROW)).bad_rows == 1


def test_a_long_row_of_an_array_is_refused(write, monkeypatch):
    monkeypatch.setattr(container, "MAX_ROW_BYTES", len(ROW))
    report = check_file(write(b"[" + ROW + b"," + ROW[:-1] + b" }]"))
    assert report.first_errors[0].located.startswith("row 2: longer than")
    assert report.bad_rows == 1


def test_a_large_array_is_sent_back_as_jsonl(write, monkeypatch):
    monkeypatch.setattr(container, "MAX_ARRAY_BYTES", 2**20)
    path = write(b"[" + ROW)
    with path.open("ab") as file:
        file.truncate(5 * 2**20)
    assert "it is a JSON array of 5 MiB, and 1 MiB is the most. Send it as JSONL" in check_file(path).summary
