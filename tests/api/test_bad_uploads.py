"""Uploads that go wrong: each gets one clear error, and leaves neither a row nor a byte behind."""

from __future__ import annotations

import re
import socket
from concurrent.futures import ThreadPoolExecutor
from email.message import Message

import httpx
import pytest

from tests.api.talk import ROW, told, traces

LINE = "\r\n"


def part(name: str, content: str | bytes, filename: str | None = None) -> bytes:
    said = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename is not None else "")
    body = content if isinstance(content, bytes) else content.encode()
    return f"--b{LINE}Content-Disposition: {said}{LINE}{LINE}".encode() + body + LINE.encode()


FILE, PURPOSE, END = part("file", ROW, "rows.jsonl"), part("purpose", "fine-tune"), b"--b--\r\n"
FORM = "multipart/form-data; boundary=b"

BAD = {
    "no part at all": (END, "invalid_multipart|missing_required_parameter"),
    "no file": (PURPOSE + END, "missing_required_parameter"),
    "two files": (FILE + FILE + PURPOSE + END, "invalid_value"),
    "no purpose": (FILE + END, "missing_required_parameter"),
    "unknown purpose": (FILE + part("purpose", "world-peace") + END, "invalid_value"),
    "a result's purpose": (FILE + part("purpose", "fine-tune-results") + END, "invalid_value"),
    "unknown field": (FILE + PURPOSE + part("colour", "red") + END, "unknown_parameter"),
    "field too long": (FILE + part("purpose", "x" * 5000) + END, "invalid_value"),
    "too many fields": (FILE + b"".join(part(f"f{n}", "x") for n in range(100)) + END, "invalid_value"),
    "many empty fields": (FILE + b"".join(part(f"f{n}", "") for n in range(100)) + END, "invalid_value"),
    "two purposes": (FILE + PURPOSE + PURPOSE + END, "invalid_value"),
    "a long head": (
        part("file", ROW, "rows.jsonl").replace(b"\r\n\r\n", b"\r\nx: " + b"y" * 20_000 + b"\r\n\r\n", 1) + END,
        "invalid_multipart",
    ),
    "zero bytes": (part("file", b"", "rows.jsonl") + PURPOSE + END, "invalid_training_file"),
    "no last boundary": (FILE + PURPOSE, "invalid_multipart"),
    "cut in the file": (FILE[:-10], "invalid_multipart"),
    "cut in a header": (PURPOSE + b"--b\r\nContent-Disp", "invalid_multipart"),
    "not a form": (b"just text", "invalid_multipart"),
    "another boundary": (FILE.replace(b"--b", b"--c"), "invalid_multipart"),
    "empty": (b"", "invalid_multipart"),
    "file name of 5000": (part("file", ROW, "x" * 5000) + PURPOSE + END, "invalid_multipart"),
}


def post(client, content, content_type=FORM):
    return client.http.post("/files", content=content, headers={"content-type": content_type} if content_type else {})


@pytest.mark.parametrize("case", BAD)
def test_a_bad_form_is_refused(api, client, case):
    before = traces(api)
    content, codes = BAD[case]
    assert told(post(client, content))["code"] in codes.split("|")
    assert traces(api) == before


NO_FORMS = [None, "application/json", "text/plain", "multipart/mixed; boundary=b"]
NO_BOUNDARIES = ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "b" * 300]


@pytest.mark.parametrize("kind", NO_FORMS + NO_BOUNDARIES)
def test_another_content_type_is_refused(api, client, kind):
    before = traces(api)
    told(post(client, FILE + PURPOSE + END, kind), 400, "invalid_multipart")
    assert traces(api) == before


def test_the_order_of_the_parts_does_not_matter(client):
    for content in (FILE + PURPOSE + END, PURPOSE + FILE + END):
        assert post(client, content).json()["bytes"] == len(ROW)


def test_a_preamble_and_an_epilogue_change_nothing(client):
    assert post(client, FILE + PURPOSE + END + b"and more\r\n").status_code in {200, 400}


NAMES = {
    "../../etc/passwd": "passwd",
    "/abs/rows.jsonl": "rows.jsonl",
    "..\\\\..\\\\x.jsonl": "x.jsonl",
    "..": "..",
    "rows\x00.jsonl": "rows.jsonl",
    "a\u202egpj.jsonl": "agpj.jsonl",
    "x" * 600: "x" * 512,
    "": "upload",
    "żółć 数据.jsonl": "żółć 数据.jsonl",
    "<b>x</b>": "b>",
    "\x1b[31mred": "[31mred",
    "हिन्दी क्‍ष नि‌म 👨‍👩‍👧.jsonl": "हिन्दी क्‍ष नि‌म 👨‍👩‍👧.jsonl",
    "a %22b%22 100%.jsonl": 'a "b" 100%.jsonl',
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:20]))
def test_a_file_name_is_a_label_and_never_a_path(api, client, name):
    answer = post(client, part("file", ROW, name) + PURPOSE + END)
    assert answer.status_code == 200, answer.text
    assert answer.json()["filename"] == NAMES[name]
    stored = api.settings.storage_dir / "files" / client.member.team_id
    assert [bool(re.fullmatch("[0-9a-z]{26}", path.name)) for path in stored.iterdir()] == [True]
    content = client.http.get(f"/files/{answer.json()['id']}/content")
    assert content.content == ROW
    said = Message()
    said["content-disposition"] = content.headers["content-disposition"]
    assert said.get_content_disposition() == "attachment"


def test_a_file_over_the_limit_is_refused_and_leaves_nothing(api, client):
    before = traces(api)
    large = part("file", b"x" * (api.settings.max_file_bytes + 1), "rows.jsonl") + PURPOSE + END
    told(post(client, large), 413, "too_large", "file")
    pieces = (large[start : start + 9000] for start in range(0, len(large), 9000))
    told(post(client, pieces), 413, "too_large", "file")
    assert traces(api) == before


def test_a_file_at_the_limit_passes(api, client):
    content = part("file", b"x" * api.settings.max_file_bytes, "rows.jsonl") + PURPOSE + END
    assert post(client, content).json()["bytes"] == api.settings.max_file_bytes


def head(key: str, length: int) -> bytes:
    lines = ["POST /v1/files HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", f"Content-Type: {FORM}"]
    return LINE.join([*lines, f"Content-Length: {length}", "", ""]).encode()


def test_a_wrong_key_is_refused_before_the_body_is_read(api):
    """The body is announced and never sent: whoever waits for it never answers."""
    before = traces(api)
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as connection:
        connection.sendall(head("sft_wrong", 10**9))
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")
    assert traces(api) == before


def test_an_upload_that_is_cut_leaves_nothing(api, client):
    before = traces(api)
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as connection:
        connection.sendall(head(client.member.key, 50_000) + FILE)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1000):
            pass
    assert client.http.get("/files").json()["data"] == []
    assert traces(api) == before


def test_a_good_upload_after_all_of_these_works_on_the_same_connection(client):
    told(post(client, PURPOSE + END))
    assert isinstance(client.upload(), str)


def test_the_same_file_twice_is_two_files(client):
    assert client.upload() != client.upload()


def test_a_part_of_a_file_can_be_asked_for(client):
    file_id = client.upload(b"0123456789")
    answer = client.http.get(f"/files/{file_id}/content", headers={"range": "bytes=2-4"})
    assert (answer.status_code, answer.content) == (206, b"234")
    assert client.http.get(f"/files/{file_id}/content", headers={"range": "bytes=90-"}).status_code == 416


def test_several_uploads_at_once_stay_apart(api, client):
    contents = [bytes([65 + number]) * 50_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(client.upload, contents))
    with httpx.Client(base_url=f"{api.url}/v1", headers=client.member.headers, timeout=30) as http:
        assert [http.get(f"/files/{file_id}/content").content for file_id in ids] == contents
