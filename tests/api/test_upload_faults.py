"""What can go wrong around an upload: a wrong key, a client or a server that dies, a disk that fills up."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import openai
import pytest

from api import multipart
from core.config import Settings
from core.db import open_database
from core.storage import LocalStorage
from tests.api.talk import Client, told, traces
from tests.servers import HOST, PLAIN, die_with_parent, ended, free_port, run_api, wait_until
from worker.cleaning import remove_expired, remove_strays

ROOT = Path(__file__).parents[2]
GIGABYTE = 10**9
#: What the kernel's buffers on both sides take up at most.
BUFFERED = 24 * 2**20

FORM = "multipart/form-data; boundary=b"
PURPOSE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
END = b"\r\n--b--\r\n"


def head(key, path, size):
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", f"Content-Type: {FORM}"]
    return "\r\n".join([*lines, f"Content-Length: {size}", "", ""]).encode()


def push(port, key, path, size):
    """Send a whole body without a look at the answer, as most clients do: `(answer, bytes sent)`."""
    with socket.create_connection((HOST, port), timeout=20) as connection:
        connection.sendall(head(key, path, size))
        sent, piece = 0, PURPOSE + FILE + b"x" * 2**20
        with suppress(ConnectionError):
            while sent < size:
                sent += connection.send(piece)
        return connection.recv(1000), sent


# --- refused at the headers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/files", "/v1/uploads/upload_x/parts", "/v1/uploads/upload_x/complete"])
def test_a_wrong_key_with_a_gigabyte_is_refused_before_the_body(api, path):
    before = traces(api)
    answer, sent = push(api.port, "sft_wrong", path, GIGABYTE)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert sent < BUFFERED
    assert traces(api) == before


@pytest.mark.parametrize("path", ["/v1/files", "/v1/uploads", "/v1/uploads/upload_x/complete", "/v1/fine_tuning/jobs"])
def test_a_gigabyte_for_which_there_is_no_room_is_refused_before_the_body(api, client, path):
    before = traces(api)
    answer, sent = push(api.port, client.member.key, path, GIGABYTE)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert sent < BUFFERED
    assert traces(api) == before


def test_the_sdk_hears_why_though_it_sends_first(api, client):
    http_client = openai.DefaultHttpxClient(verify=PLAIN)
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="sft_wrong", http_client=http_client) as sdk:
        with pytest.raises(openai.AuthenticationError):
            sdk.files.create(file=("rows.jsonl", b"x" * 50_000_000), purpose="fine-tune")
        with pytest.raises(openai.APIStatusError) as caught:
            sdk.with_options(api_key=client.member.key).files.create(
                file=("rows.jsonl", b"x" * 50_000_000), purpose="fine-tune"
            )
    assert caught.value.status_code == 413


def test_a_small_body_that_nobody_read_leaves_the_connection_usable(api):
    with httpx.Client(base_url=f"{api.url}/v1", timeout=30, verify=PLAIN) as http:
        answer = http.post("/files", content=b"x" * 1000)
        told(answer, 401)
        assert "connection" not in answer.headers


# --- a client that dies -----------------------------------------------------------------------------------------------


def test_a_client_that_is_killed_in_the_middle_leaves_nothing(api, client):
    before = traces(api)
    connection = socket.create_connection((HOST, api.port), timeout=10)
    connection.sendall(head(client.member.key, "/v1/files", 90_000) + PURPOSE + FILE + b"x" * 50_000)
    wait_until(lambda: traces(api) != before)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()  # with a reset, as the kernel does for a process that is killed
    wait_until(lambda: traces(api) == before)


def test_a_client_that_falls_silent_is_let_go(api, client, monkeypatch):
    monkeypatch.setattr(multipart, "IDLE_SECONDS", 0.2)
    before = traces(api)
    with socket.create_connection((HOST, api.port), timeout=20) as connection:
        connection.sendall(head(client.member.key, "/v1/files", 90_000) + PURPOSE + FILE + b"x" * 5000)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
    assert traces(api) == before


# --- a disk that fills up ---------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder, mebibytes):
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs more rights than this process has")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_said_so_and_nothing_stays(fresh_settings, tmp_path):
    with (
        fresh_settings("sqlite", tmp_path / "data") as settings,
        small_disk(settings.storage_dir, 8),
        run_api(settings) as ran,
    ):
        client = Client(ran, ran.member())
        with client.http:
            before = traces(ran)
            too_much = client.http.post("/files", data={"purpose": "user_data"}, files={"file": ("r", b"x" * 2**24)})
            told(too_much, 503, "disk_full")
            assert traces(ran) == before
            declared = {"bytes": 5 * 2**20, "filename": "r", "mime_type": "text/jsonl", "purpose": "user_data"}
            upload = f"/uploads/{client.http.post('/uploads', json=declared).json()['id']}"
            part = client.http.post(f"{upload}/parts", files={"data": ("upload", b"x" * 5 * 2**20)}).json()["id"]
            told(client.http.post(f"{upload}/parts", files={"data": ("upload", b"x" * 5 * 2**20)}), 503)
            # The part lies there, and the whole file does not fit beside it.
            told(client.http.post(f"{upload}/complete", json={"part_ids": [part]}), 503, "disk_full")
            client.http.post(f"{upload}/cancel")
            assert traces(ran) == before
            assert isinstance(client.upload(), str)


# --- a server that dies -----------------------------------------------------------------------------------------------


@contextmanager
def process_of_api(data_dir):
    """`shadowft api`, a process of its own that can be killed: `(process, port, key)`."""
    port = free_port()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SHADOWFT_")}
    ours = {"SHADOWFT_DATA_DIR": str(data_dir), "SHADOWFT_PORT": str(port), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cli", "api"]
    process = subprocess.Popen(
        command, cwd=data_dir, env=inherited | ours, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent(),
    )  # fmt: skip
    with ended(process, 15):
        wait_until(lambda: is_up(port), seconds=60, every=0.1)
        yield process, port, (data_dir / "admin.key").read_text().strip()


def is_up(port):
    with suppress(httpx.TransportError):
        return httpx.get(f"http://{HOST}:{port}/healthz", timeout=5, verify=PLAIN).status_code == 200
    return False


def stored(data_dir):
    return [path for path in (data_dir / "storage").rglob("*") if path.is_file()]


def test_a_server_killed_in_the_middle_of_uploads_leaves_nothing_once_a_sweep_has_passed(tmp_path):
    with process_of_api(tmp_path) as (process, port, key):
        with httpx.Client(base_url=f"http://{HOST}:{port}/v1", headers={"authorization": f"Bearer {key}"}) as http:
            declared = {"bytes": 10, "filename": "r", "mime_type": "text/jsonl", "purpose": "user_data"}
            upload = http.post("/uploads", json=declared).json()["id"]
        with (
            socket.create_connection((HOST, port)) as file,
            socket.create_connection((HOST, port)) as part,
        ):
            file.sendall(head(key, "/v1/files", 2**24) + PURPOSE + FILE + b"x" * 2**22)
            in_part = FILE.replace(b'"file"', b'"data"')
            part.sendall(head(key, f"/v1/uploads/{upload}/parts", 2**16) + in_part + b"x" * 5)
            wait_until(lambda: len(stored(tmp_path)) == 2)
            process.kill()
            process.wait()
    assert len(stored(tmp_path)) == 2
    with process_of_api(tmp_path) as (_, port, key):
        kept = {"data": {"purpose": "user_data"}, "files": {"file": ("rows.jsonl", b"{}")}}
        answer = httpx.post(f"http://{HOST}:{port}/v1/files", headers={"authorization": f"Bearer {key}"}, **kept)
        assert answer.status_code == 200
        an_hour_later(tmp_path)
        sweep(tmp_path)
        assert [path.read_bytes() for path in stored(tmp_path)] == [b"{}"]


@pytest.mark.slow  # the server gives uploads 5 s to end
def test_a_server_that_is_stopped_in_the_middle_of_an_upload_leaves_nothing(tmp_path):
    with process_of_api(tmp_path) as (process, port, key), socket.create_connection((HOST, port)) as file:
        file.sendall(head(key, "/v1/files", 2**24) + PURPOSE + FILE + b"x" * 2**22)
        wait_until(lambda: stored(tmp_path))
        process.terminate()
        process.wait(30)
        assert stored(tmp_path) == []


def an_hour_later(data_dir):
    for path in stored(data_dir):
        os.utime(path, (time.time() - 4000, time.time() - 4000))


def sweep(data_dir):
    """What a worker's sweep does to storage."""
    settings = Settings(_env_file=None, data_dir=data_dir)
    database, storage = open_database(settings), LocalStorage(settings.storage_dir)
    remove_expired(database, storage)
    remove_strays(database, storage)
    database.close()


def test_memory_does_not_grow_with_the_file(tmp_path):
    with process_of_api(tmp_path) as (process, port, key):
        push_whole(port, key, 2**22)
        before = peak_bytes(process)
        push_whole(port, key, 200 * 2**20)
        assert peak_bytes(process) - before < 48 * 2**20


def push_whole(port, key, size):
    before = PURPOSE + FILE
    with socket.create_connection((HOST, port), timeout=60) as connection:
        connection.sendall(head(key, "/v1/files", len(before) + size + len(END)) + before)
        for _ in range(size // 2**20):
            connection.sendall(b"x" * 2**20)
        connection.sendall(END)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def peak_bytes(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
