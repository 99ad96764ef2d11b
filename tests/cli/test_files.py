"""`shadowft files`: without a server where it needs none, else against a real one, also over a wire that breaks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from sqlalchemy import select, update

from core.datasets import check_file
from core.models import File, Upload
from tests.api.talk import ROW
from tests.wire import Trouble

pytestmark = pytest.mark.parametrize("api", ["sqlite"], indirect=True)

BAD = b'{"messages": [{"role": "user", "content": "Hi"}]}\n'
#: Larger than what this server takes in one request, and than three parts of a test.
LARGE = ROW * 3000
PART = 100_000


@pytest.fixture
def rows():
    def write(content=ROW * 3, name="rows.jsonl"):
        path = Path(name)
        path.write_bytes(content)
        return path

    return write


def uploads(api):
    with api.database.reading() as session:
        return session.scalars(select(Upload).order_by(Upload.id.desc())).all()


# --- check ------------------------------------------------------------------------------------------------------------


def test_a_usable_file_is_praised_without_a_server(ours, rows, monkeypatch):
    monkeypatch.setenv("SHADOWFT_URL", "http://no-such-host.invalid")
    path = rows()
    done = ours("files", "check", path)
    assert (done.status, done.err) == (0, "")
    for word in ("rows.jsonl ok", "chat", "3 rows", "line 2", "the same as line 1"):
        assert word in done.out
    assert json.loads(ours("files", "check", path, "--format", "json").out) == check_file(path).as_dict()


def test_every_error_is_told_with_its_row(ours, rows):
    path = rows(ROW + BAD + b"no json\n" + b'{"\x1b[31m": 1}\n' + BAD * 30)
    done = ours("files", "check", path)
    assert done.status == 1
    for word in ("refuse", "34 rows, 33 of them unusable", "line 2", "line 3", "line 4", "13 more"):
        assert word in done.out
    assert "\x1b" not in done.out
    assert json.loads(ours("files", "check", path, "--format", "json").out)["ok"] is False


@pytest.mark.parametrize("command", ["check", "upload"])
def test_a_file_that_is_not_there_is_a_mistake_in_the_command(ours, command):
    done = ours("files", command, "absent.jsonl")
    assert (done.status, done.out) == (2, "")
    assert "absent.jsonl" in done.err


# --- upload -----------------------------------------------------------------------------------------------------------


def test_a_file_goes_up_is_listed_shown_downloaded_and_deleted(ours, client, rows):
    path = rows()
    up = ours("files", "upload", path)
    file_id = up.out.strip()
    assert (up.status, up.out.count("\n")) == (0, 1)
    assert "rows.jsonl: " in up.err

    answered = client.http.get("/files").json()
    assert json.loads(ours("files", "list", "--limit", "10000", "--format", "json").out) == answered
    listed = ours("files", "list").out
    assert file_id in listed
    assert "rows.jsonl" in listed
    assert json.loads(ours("files", "get", file_id, "--format", "json").out) == answered["data"][0]
    assert answered["data"][0]["sha256"] in ours("files", "get", file_id).out

    early = ours("files", "report", file_id)
    assert (early.status, early.out) == (1, "")
    assert "has no report" in early.err

    down = ours("files", "download", file_id, "--out", "again.jsonl")
    assert (down.status, down.out) == (0, "again.jsonl\n")
    assert Path("again.jsonl").read_bytes() == path.read_bytes()

    assert ours("files", "delete", file_id).out == f"{file_id} is deleted.\n"
    gone = ours("files", "get", file_id)
    assert (gone.status, gone.out) == (1, "")


def test_a_page_tells_of_the_next_one(ours, client):
    ids = [client.upload() for _ in range(3)]
    first = ours("files", "list", "--limit", "2")
    assert f"--after {ids[1]}" in first.err
    second = ours("files", "list", "--limit", "2", "--after", ids[1])
    assert ids[0] in second.out
    assert (ids[1] in second.out, second.err) == (False, "")
    assert "file-" not in ours("files", "list", "--purpose", "evals").out


def test_a_large_file_goes_by_parts(ours, client, rows):
    path = rows(LARGE)
    done = ours("files", "upload", path, "--part-bytes", PART, "--format", "json")
    assert done.status == 0, done.err
    file = json.loads(done.out)
    assert file == client.http.get(f"/files/{file['id']}").json()
    assert file["sha256"] == hashlib.sha256(LARGE).hexdigest()
    upload = uploads(client.api)[0]
    assert (upload.status, len(upload.part_ids)) == ("completed", 3)
    assert upload.md5 == hashlib.md5(LARGE, usedforsecurity=False).hexdigest()


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_part_whose_connection_breaks_is_sent_again(ours, client, rows, wire, way):
    wire.troubles = [Trouble(way, 40_000 if way == "up" else 0, asking=b"/parts") for _ in range(2)]
    done = ours("files", "upload", rows(LARGE), "--part-bytes", PART, "--format", "json")
    assert done.status == 0, done.err
    assert wire.met == 2
    assert json.loads(done.out)["sha256"] == hashlib.sha256(LARGE).hexdigest()
    assert len(client.http.get("/files").json()["data"]) == 1


def test_a_completion_whose_answer_is_lost_makes_one_file(ours, client, rows, wire):
    wire.troubles = [Trouble("down", 0, asking=b"/complete")]
    done = ours("files", "upload", rows(LARGE), "--part-bytes", PART)
    assert (done.status, wire.met) == (0, 1), done.err
    assert [file["id"] for file in client.http.get("/files").json()["data"]] == [done.out.strip()]


def test_an_upload_that_fails_is_given_up(ours, rows, wire, api, monkeypatch):
    wire.troubles = [Trouble("up", 0, asking=b"/parts", always=True)]
    monkeypatch.setattr("cli.upload.PATIENCE_SECONDS", 1.0)
    done = ours("files", "upload", rows(LARGE), "--part-bytes", PART)
    assert (done.status, done.out) == (1, "")
    assert wire.url in done.err
    assert uploads(api)[0].status == "cancelled"


def test_a_purpose_that_is_none_is_refused_before_anything_is_sent(ours, rows, api):
    before = len(uploads(api))
    done = ours("files", "upload", rows(LARGE), "--part-bytes", PART, "--purpose", "assistants")
    assert (done.status, done.out) == (1, "")
    assert "purpose" in done.err
    assert len(uploads(api)) == before


def test_what_this_server_takes_in_no_single_request_goes_by_parts(ours, rows, client):
    done = ours("files", "upload", rows(LARGE))
    assert (done.status, uploads(client.api)[0].status) == (0, "completed"), done.err
    assert [file["id"] for file in client.http.get("/files").json()["data"]] == [done.out.strip()]


def test_a_report_is_shown_as_the_check_of_this_machine_shows_it(ours, client, rows, api):
    path = rows(ROW + BAD)
    file_id = client.upload(path.read_bytes())
    report = check_file(path).as_dict()
    with api.database.writing() as session:
        session.execute(
            update(File)
            .where(File.id == file_id)
            .values(report=report, status="error", status_details=report["summary"])
        )
        session.commit()
    here, there = ours("files", "check", path).out, ours("files", "report", file_id).out
    assert here.splitlines()[1:] == there.splitlines()[1:]
    assert json.loads(ours("files", "report", file_id, "--format", "json").out) == report
    assert report["summary"] in ours("files", "get", file_id).out


def test_waiting_for_the_check_ends_when_told_to(ours, rows):
    done = ours("files", "upload", rows(), "--wait", "--timeout", "0.1")
    assert (done.status, done.out) == (1, "")
    assert "`light`" in done.err


# --- download ---------------------------------------------------------------------------------------------------------


def test_a_download_that_is_cut_goes_on_where_it_stopped(ours, client, wire):
    content = bytes(range(256)) * 350
    file_id = client.upload(content, purpose="user_data", name="some bytes.bin")
    wire.troubles = [Trouble("down", 50_000, asking=b"/content")]
    done = ours("files", "download", file_id)
    assert (done.status, done.out) == (0, "some bytes.bin\n"), done.err
    assert Path("some bytes.bin").read_bytes() == content
    assert wire.met == 1
    assert wire.down < len(content) + 25_000  # heads and the file's listing are all that came besides
    assert [path.name for path in Path.cwd().iterdir()] == ["some bytes.bin"]


def test_another_file_of_that_name_is_left_alone(ours, client, rows):
    file_id = client.upload(ROW, name="rows.jsonl")
    mine = rows(b"mine")
    done = ours("files", "download", file_id)
    assert (done.status, done.out) == (1, "")
    assert "--out" in done.err
    assert mine.read_bytes() == b"mine"
    Path("folder").mkdir()
    assert ours("files", "download", file_id, "--out", "folder").out == "folder/rows.jsonl\n"
    assert ours("files", "download", file_id, "--out", "folder").status == 0  # the same bytes
