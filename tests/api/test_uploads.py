"""Uploads by parts: any order, at once, put together exactly once, and nothing left of what went wrong."""

from __future__ import annotations

import hashlib
import os
import random
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from sqlalchemy import func, select, update

from core.db import db_now
from core.models import Upload, UploadPart
from tests.api.talk import ROW, Client, announce, told, traces
from tests.servers import PLAIN, run_api

ASKED = {"filename": "rows.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}


def begin(client, size, **fields):
    answer = client.http.post("/uploads", json={"bytes": size, **ASKED, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def send(client, upload_id, content):
    return client.http.post(f"/uploads/{upload_id}/parts", files={"data": ("upload", content)})


def part_id(client, upload_id, content):
    answer = send(client, upload_id, content)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def complete(client, upload_id, part_ids, **fields):
    return client.http.post(f"/uploads/{upload_id}/complete", json={"part_ids": part_ids, **fields})


def begin_with_parts(client, *contents):
    upload_id = begin(client, sum(map(len, contents)))
    return upload_id, [part_id(client, upload_id, content) for content in contents]


def everything(api):
    """What a refused request might have left behind."""
    with api.database.reading() as session:
        return traces(api), session.scalar(select(func.count()).select_from(UploadPart))


def parts_on_disk(api):
    return list((api.settings.storage_dir / "uploads").iterdir())


# --- what works -------------------------------------------------------------------------------------------------------


def test_an_upload_is_pending_for_an_hour(client):
    answer = client.http.post("/uploads", json={"bytes": 10, **ASKED}).json()
    assert answer["id"].startswith("upload_")
    assert (answer["object"], answer["status"], answer["bytes"], answer["file"]) == ("upload", "pending", 10, None)
    assert answer["expires_at"] - answer["created_at"] == 3600


def test_parts_in_any_order_and_at_once_make_the_file_that_their_order_says(client):
    content = os.urandom(90_000)
    pieces = [content[start : start + 10_000] for start in range(0, len(content), 10_000)]
    upload_id = begin(client, len(content))
    order = random.sample(range(len(pieces)), len(pieces))
    with ThreadPoolExecutor(4) as pool:
        sent = dict(zip(order, pool.map(lambda index: part_id(client, upload_id, pieces[index]), order), strict=True))
    done = complete(client, upload_id, [sent[index] for index in range(len(pieces))]).json()
    assert (done["status"], done["file"]["status"]) == ("completed", "uploaded")
    assert (done["file"]["bytes"], done["file"]["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert client.http.get(f"/files/{done['file']['id']}/content").content == content


def test_a_part_says_what_it_is(client):
    upload_id = begin(client, len(ROW))
    part = send(client, upload_id, ROW).json()
    assert part["id"].startswith("part_")
    assert (part["object"], part["upload_id"], part["bytes"]) == ("upload.part", upload_id, len(ROW))
    assert part["sha256"] == hashlib.sha256(ROW).hexdigest()


def test_a_completed_upload_leaves_its_file_and_none_of_its_parts(api, client):
    before = len(parts_on_disk(api)) if (api.settings.storage_dir / "uploads").exists() else 0
    upload_id, ids = begin_with_parts(client, b"a" * 10, b"b" * 10)
    twice = part_id(client, upload_id, b"b" * 10)  # its first answer was lost
    assert twice not in ids
    assert complete(client, upload_id, ids).status_code == 200
    assert len(parts_on_disk(api)) == before


def test_completing_again_gives_the_same_answer_and_otherwise_a_conflict(client):
    upload_id, ids = begin_with_parts(client, b"a" * 10, b"b" * 10)
    first = complete(client, upload_id, ids).json()
    assert complete(client, upload_id, ids).json() == first
    other = complete(client, upload_id, ids[::-1])
    told(other, 409, "upload_not_pending")
    assert other.headers["x-should-retry"] == "false"
    assert len(client.http.get("/files").json()["data"]) == 1
    client.http.delete(f"/files/{first['file']['id']}")
    assert complete(client, upload_id, ids).json()["file"] is None


def test_many_completions_at_once_make_one_file(api, client):
    upload_id, ids = begin_with_parts(client, os.urandom(50_000), os.urandom(50_000))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: complete(client, upload_id, ids), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["file"]["id"] for answer in answers}) == 1
    stored = api.settings.storage_dir / "files" / client.member.team_id
    assert len(list(stored.iterdir())) == 1


def test_a_right_md5_passes_and_a_wrong_one_can_be_mended(client):
    upload_id, ids = begin_with_parts(client, b"a" * 10, b"b" * 10)
    told(complete(client, upload_id, ids[::-1], md5=md5_of(b"a" * 10 + b"b" * 10)), 400, "checksum_mismatch", "md5")
    assert client.http.get("/files").json()["data"] == []
    assert complete(client, upload_id, ids, md5=md5_of(b"a" * 10 + b"b" * 10).upper()).status_code == 200


def md5_of(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def test_a_cancelled_upload_is_gone_and_stays_cancelled(api, client):
    before = everything(api)
    upload_id, ids = begin_with_parts(client, b"a" * 10, b"b" * 10)
    for _ in range(2):
        assert client.http.post(f"/uploads/{upload_id}/cancel").json()["status"] == "cancelled"
    assert everything(api) == before
    told(complete(client, upload_id, ids), 409, "upload_not_pending")
    told(send(client, upload_id, b"a"), 409, "upload_not_pending")


def test_a_completed_upload_cannot_be_cancelled(client):
    upload_id, ids = begin_with_parts(client, ROW)
    complete(client, upload_id, ids)
    told(client.http.post(f"/uploads/{upload_id}/cancel"), 409, "upload_not_pending")


def test_an_upload_whose_hour_is_over_takes_nothing_more(api, client):
    upload_id, ids = begin_with_parts(client, ROW)
    with api.database.writing() as session:
        session.execute(update(Upload).where(Upload.id == upload_id).values(expires_at=db_now(-1)))
        session.commit()
    for answer in (send(client, upload_id, ROW), complete(client, upload_id, ids)):
        assert "expired" in told(answer, 409, "upload_not_pending")["message"]


def test_the_files_own_lifetime_begins_with_the_file(client):
    upload_id = begin(client, len(ROW), expires_after={"anchor": "created_at", "seconds": 7200})
    file = complete(client, upload_id, [part_id(client, upload_id, ROW)]).json()["file"]
    assert file["expires_at"] - file["created_at"] == 7200


# --- through the SDK --------------------------------------------------------------------------------------------------


@pytest.fixture
def sdk(api, client):
    http_client = openai.DefaultHttpxClient(verify=PLAIN)
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key=client.member.key, http_client=http_client) as made:
        yield made


def test_the_sdks_own_helper_sends_a_file_by_parts(sdk, tmp_path):
    path = tmp_path / "big.jsonl"
    path.write_bytes(ROW * 2000)
    done = sdk.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=50_000, md5=md5_of(ROW * 2000)
    )
    assert (done.status, done.file.filename, done.file.bytes) == ("completed", "big.jsonl", len(ROW) * 2000)
    assert sdk.files.content(done.file.id).read() == ROW * 2000


def test_the_sdks_single_calls_work(sdk):
    upload = sdk.uploads.create(bytes=len(ROW), filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    part = sdk.uploads.parts.create(upload.id, data=ROW)
    assert part.object == "upload.part"
    assert sdk.uploads.complete(upload.id, part_ids=[part.id]).file.purpose == "fine-tune"
    other = sdk.uploads.create(bytes=1, filename="a", mime_type="text/jsonl", purpose="fine-tune")
    assert sdk.uploads.cancel(other.id).status == "cancelled"


def test_a_wrong_md5_is_told_once(sdk, tmp_path):
    with pytest.raises(openai.BadRequestError, match="MD5"):
        sdk.uploads.upload_file_chunked(
            file=ROW, filename="x", bytes=len(ROW), mime_type="text/jsonl", purpose="fine-tune", md5="0" * 32
        )


# --- what is refused --------------------------------------------------------------------------------------------------

CREATES = {
    "no size": ({"bytes": None}, "bytes"),
    "nothing": ({"bytes": 0}, "bytes"),
    "negative": ({"bytes": -1}, "bytes"),
    "too much": ({"bytes": 2**40}, "bytes"),
    "size as text": ({"bytes": "10"}, "bytes"),
    "purpose": ({"purpose": "world-peace"}, "purpose"),
    "empty name": ({"filename": ""}, "filename"),
    "anchor": ({"expires_after": {"anchor": "now", "seconds": 3600}}, "expires_after.anchor"),
    "too short a life": ({"expires_after": {"anchor": "created_at", "seconds": 3599}}, "expires_after.seconds"),
    "too long a life": ({"expires_after": {"anchor": "created_at", "seconds": 2592001}}, "expires_after.seconds"),
    "unknown field": ({"colour": "red"}, "colour"),
}


@pytest.mark.parametrize("case", CREATES)
def test_an_upload_that_cannot_be_is_refused(client, case):
    fields, param = CREATES[case]
    told(client.http.post("/uploads", json={"bytes": 10, **ASKED, **fields}), 400, param=param)


def test_parts_that_do_not_make_the_file_are_refused_and_stay_for_a_better_try(client):
    upload_id, ids = begin_with_parts(client, b"a" * 10, b"b" * 10)
    told(complete(client, upload_id, ids[:1]), 400, "size_mismatch", "part_ids")
    told(complete(client, upload_id, [ids[0], ids[0]]), 400, "invalid_value", "part_ids")
    told(complete(client, upload_id, [ids[0], "part_x"]), 400, "part_not_found", "part_ids.1")
    told(complete(client, upload_id, []), 400, param="part_ids")
    told(complete(client, upload_id, ids, md5="xyz"), 400, param="md5")
    _, others = begin_with_parts(client, b"c" * 10)
    told(complete(client, upload_id, [ids[0], *others]), 400, "part_not_found")
    assert complete(client, upload_id, ids).status_code == 200


BAD_PARTS = {
    "no part": {"files": {"other": ("upload", b"x")}},
    "empty": {"files": {"data": ("upload", b"")}},
    "a field too many": {"files": {"data": ("upload", b"x")}, "data": {"purpose": "fine-tune"}},
    "two": {"files": [("data", ("upload", b"x")), ("data", ("upload", b"y"))]},
    "no form": {"content": b"x" * 10},
    "json": {"json": {"data": "x"}},
    "larger than the upload": {"files": {"data": ("upload", b"x" * 51)}},
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_a_bad_part_is_refused_and_leaves_nothing(api, client, case):
    upload_id = begin(client, 50)
    before = everything(api)
    answer = client.http.post(f"/uploads/{upload_id}/parts", **BAD_PARTS[case])
    told(answer, 413 if "larger" in case else 400)
    assert everything(api) == before


def test_a_part_over_64_megabytes_is_refused_at_its_headers(api, client):
    upload_id = begin(client, 2**30)
    before = everything(api)
    answer, _ = announce(api, client.member.key, f"/v1/uploads/{upload_id}/parts", 65 * 2**20)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"67,108,864" in answer
    assert everything(api) == before


def test_another_teams_upload_is_as_absent_as_one_that_never_was(api, client):
    upload_id, ids = begin_with_parts(client, ROW)
    stranger = Client(api, api.member())
    with stranger.http:
        told(send(stranger, upload_id, ROW), 404, "upload_not_found")
        told(complete(stranger, upload_id, ids), 404, "upload_not_found")
        told(stranger.http.post(f"/uploads/{upload_id}/cancel"), 404, "upload_not_found")
        own = begin(stranger, len(ROW))
        told(complete(stranger, own, ids), 400, "part_not_found")


# --- quota ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def small(request, fresh_settings, tmp_path_factory):
    """An API whose teams may keep 1000 bytes each."""
    folder = tmp_path_factory.mktemp("small")
    with fresh_settings(request.param, folder, team_storage_bytes=1000) as settings, run_api(settings) as ran:
        yield ran


@pytest.fixture
def poor(small):
    made = Client(small, small.member())
    with made.http:
        yield made


def full(answer):
    assert answer.headers["x-should-retry"] == "false"
    error = told(answer, 429, "quota_exceeded")
    assert error["type"] == "rate_limit_error"
    return error


def post_file(client, size):
    return client.http.post("/files", data={"purpose": "fine-tune"}, files={"file": ("r", b"x" * size)})


def test_a_file_that_just_fits_passes_and_the_next_byte_does_not(small, poor):
    assert post_file(poor, 1000).status_code == 200
    before = everything(small)
    assert "1,000 of 1,000" in full(post_file(poor, 1))["message"]
    full(poor.http.post("/uploads", json={"bytes": 1, **ASKED}))
    assert everything(small) == before
    poor.http.delete(f"/files/{poor.http.get('/files').json()['first_id']}")
    assert post_file(poor, 1000).status_code == 200


def test_a_body_that_tells_its_size_is_refused_before_it_is_sent(small, poor):
    answer, _ = announce(small, poor.member.key, "/v1/files", 10**6)
    assert answer.startswith(b"HTTP/1.1 429 ")
    assert b"quota_exceeded" in answer


def test_pending_parts_and_artifacts_count_and_a_cancelled_upload_does_not(small, poor):
    upload_id = begin(poor, 600)
    part_id(poor, upload_id, b"x" * 600)
    before = everything(small)
    full(post_file(poor, 401))
    full(send(poor, upload_id, b"x" * 401))
    assert everything(small) == before
    poor.http.post(f"/uploads/{upload_id}/cancel")
    poor.finish(poor.submit(poor.upload(b"x" * 100)), {"model/w": b"w" * 500})
    full(post_file(poor, 401))
    assert post_file(poor, 400).status_code == 200


def test_a_completed_upload_counts_once(poor):
    upload_id = begin(poor, 900)
    assert complete(poor, upload_id, [part_id(poor, upload_id, b"x" * 900)]).status_code == 200
    assert post_file(poor, 100).status_code == 200


def test_of_many_that_would_each_fit_only_those_pass_that_fit_together(small, poor):
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: post_file(poor, 300), range(6)))
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 3
    assert sum(file["bytes"] for file in poor.http.get("/files").json()["data"]) == 900
    assert len(list((small.settings.storage_dir / "files" / poor.member.team_id).iterdir())) == 3


def test_one_teams_quota_is_not_anothers(small, poor):
    post_file(poor, 1000)
    other = Client(small, small.member())
    with other.http:
        assert post_file(other, 1000).status_code == 200
