"""What is no HTTP never reaches the app, and is told in the contract's shape all the same."""

from __future__ import annotations

import json
import socket
from contextlib import suppress

import httpx
import pytest

from api.protocol import MAX_HEAD_BYTES
from tests.api.talk import Client, told
from tests.servers import HOST

GET = b"GET /v1/files HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/fine_tuning/jobs HTTP/1.1\r\nHost: x\r\n"
MALFORMED = {
    "no request line": b"hello\r\n\r\n",
    "an unknown version": b"GET / HTTP/9.9\r\n\r\n",
    "an unknown method": b"FROB / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "an address that is none": b"GET http:// HTTP/1.1\r\nHost: x\r\n\r\n",
    "a header without a colon": GET + b"nonsense\r\n\r\n",
    "a header whose name is none": GET + b"a b: c\r\n\r\n",
    "a header with a NUL": GET + b"a: b\0c\r\n\r\n",
    "a length that is no number": POST + b"Content-Length: x\r\n\r\n",
    "a negative length": POST + b"Content-Length: -1\r\n\r\n",
    "two lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a length and chunks": POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
}


def answer_to(api, *pieces: bytes) -> httpx.Response:
    """To these very bytes; the server hangs up after it."""
    received = b""
    with socket.create_connection((HOST, api.port), timeout=10) as connection:
        with suppress(ConnectionError):  # it may hang up before the last piece
            for piece in pieces:
                connection.sendall(piece)
        with suppress(ConnectionError):
            while piece := connection.recv(65536):
                received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    status, *headers = head.split(b"\r\n")
    assert status.startswith(b"HTTP/1.1 ")
    named = [tuple(line.split(b": ", 1)) for line in headers]
    return httpx.Response(int(status.split()[1]), headers=named, content=body)


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_http_gets_the_shape_and_an_id(api, request_bytes):
    answer = answer_to(api, request_bytes)
    told(answer, 400, "bad_request")
    assert answer.headers["connection"] == "close"
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_headers_without_an_end_are_not_collected(api):
    answer = answer_to(api, GET, *[b"a: " + b"x" * 8000 + b"\r\n"] * (MAX_HEAD_BYTES // 8000 + 40))
    error = told(answer, 400, "bad_request")
    assert "larger" in error["message"]


def test_nothing_is_written_into_an_answer_that_has_begun(api):
    client = Client(api, api.member())
    with client.http:
        path = f"/v1/fine_tuning/jobs/{client.submit()}/events?stream=true"
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.member.key}\r\n\r\n"
    with socket.create_connection((HOST, api.port), timeout=10) as connection:
        connection.sendall(head.encode())
        received = connection.recv(65536)
        connection.sendall(b"nonsense\r\n\r\n")
        while piece := connection.recv(65536):
            received += piece
    assert received.startswith(b"HTTP/1.1 200")
    assert received.count(b"HTTP/1.1 ") == 1
    assert json.dumps("bad_request").encode() not in received


def test_an_upgrade_is_answered_in_plain_http(api):
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n"
    with socket.create_connection((HOST, api.port), timeout=10) as connection:
        connection.sendall(GET + upgrade + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")
