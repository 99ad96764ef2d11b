"""`shadowft serve`: its parts come back when they die, and go when it goes."""

from __future__ import annotations

import signal
from contextlib import ExitStack

import httpx
import psutil
import pytest

from tests.servers import run_service, wait_until

ROW = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'


@pytest.fixture(params=["embedded", pytest.param("postgresql and redis", marks=pytest.mark.slow)])
def service(request, tmp_path):
    with ExitStack() as stack:
        outside = request.param != "embedded"
        env = stack.enter_context(request.getfixturevalue("make_outside_servers")()) if outside else {}
        yield stack.enter_context(run_service({**env, "HF_TOKEN": "hf_secret"}, tmp_path / "data"))


def parts(service):
    """The service's processes by what they are."""
    names = {"api": ["api"], "jobs": ["--queue", "jobs"], "light": ["--queue", "light"]}
    found = {child: command_of(child) for child in psutil.Process(service.process.pid).children()}
    return {name: child for name, end in names.items() for child in found if found[child][-len(end) :] == end}


def command_of(process):
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def get(service, path):
    return httpx.get(f"{service.url}{path}", headers={"authorization": f"Bearer {service.key}"}, timeout=10)


def is_ready(service):
    try:
        return get(service, "/readyz").json()["status"] == "ok"
    except httpx.TransportError:
        return False


def upload(service, content):
    headers = {"authorization": f"Bearer {service.key}"}
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("rows.jsonl", content)}}
    return httpx.post(f"{service.url}/v1/files", headers=headers, timeout=10, **form).json()["id"]


def checked(service, ids):
    """The files, once the light worker has looked at all of them."""

    def look():
        files = [get(service, f"/v1/files/{file_id}").json() for file_id in ids]
        return files if all(file["status"] != "uploaded" for file in files) else None

    return wait_until(look)


def test_files_are_checked_and_what_dies_comes_back_until_all_go_with_the_service(service):
    bad_ones = (b'{"messages": []}\n', b'{"a": "\\u0000", "\\u0000b": "\\ud800"}\n', b"\0\xff\n")
    good, *bad = checked(service, [upload(service, content) for content in (ROW * 3, *bad_ones)])
    assert (good["status"], good["validation"]["rows"]) == ("processed", 3)
    for file in bad:
        assert (file["status"], bool(file["status_details"])) == ("error", True)
        assert get(service, f"/v1/files/{file['id']}/report").json()["ok"] is False

    before = parts(service)
    assert before.keys() == {"api", "jobs", "light"}
    assert [name for name, part in before.items() if "HF_TOKEN" in part.environ()] == ["jobs", "light"]
    for part in before.values():
        part.send_signal(signal.SIGKILL)
    wait_until(lambda: parts(service).keys() == before.keys() and is_ready(service), seconds=40)
    after = parts(service)
    assert {part.pid for part in after.values()}.isdisjoint(part.pid for part in before.values())
    assert checked(service, [upload(service, ROW)])[0]["status"] == "processed"

    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(40) == 0
    assert not any(part.is_running() for part in after.values())


@pytest.mark.parametrize("service", ["embedded"], indirect=True)
def test_parts_end_when_the_service_is_killed_outright(service):
    running = list(parts(service).values())
    service.process.send_signal(signal.SIGKILL)
    psutil.wait_procs(running, timeout=20)
    assert not any(part.is_running() and part.status() != psutil.STATUS_ZOMBIE for part in running)
