"""Files: how long they live, and what of them can be asked for."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor, wait

import openai
import pytest

from api.download import Wanted, download
from api.routes.jobs import JobRequest, new_job
from core import jobs
from core.keys import Caller
from core.models import File
from tests.api.talk import MODEL, ROW, told
from tests.servers import PLAIN

CONTENT = b"0123456789"


@pytest.fixture
def file_id(client):
    return client.upload(CONTENT, "ten.jsonl")


@pytest.fixture(params=["file", "artifact"])
def content(request, client):
    """The path of a stored thing of these ten bytes."""
    if request.param == "file":
        return f"/files/{client.upload(CONTENT)}/content"
    job_id = client.submit()
    client.finish(job_id, {"model/ten": CONTENT})
    artifact = client.http.get(f"/fine_tuning/jobs/{job_id}/artifacts").json()["data"][0]
    return f"/artifacts/{artifact['id']}/content"


# --- how long ---------------------------------------------------------------------------------------------------------


def post(client, **fields):
    return client.http.post("/files", data={"purpose": "fine-tune", **fields}, files={"file": ("r.jsonl", ROW)})


@pytest.mark.parametrize("seconds", [3600, 86_400, 2_592_000])
def test_a_file_says_when_it_expires(client, seconds):
    file = post(client, **{"expires_after[anchor]": "created_at", "expires_after[seconds]": str(seconds)}).json()
    assert file["expires_at"] - file["created_at"] == seconds
    assert client.http.get(f"/files/{file['id']}").json() == file


def test_a_file_without_a_lifetime_never_expires(client):
    assert post(client).json()["expires_at"] is None


def test_the_sdk_sends_a_lifetime(api, client):
    http_client = openai.DefaultHttpxClient(verify=PLAIN)
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key=client.member.key, http_client=http_client) as sdk:
        lifetime = {"anchor": "created_at", "seconds": 3600}
        file = sdk.files.create(file=("rows.jsonl", ROW), purpose="fine-tune", expires_after=lifetime)
    assert file.expires_at - file.created_at == 3600


SECONDS = ["3599", "2592001", "0", "-1", "", "x", "1e4", "3600.5", " 3600", "٣٦٠٠", "9" * 30]


@pytest.mark.parametrize("seconds", SECONDS)
def test_a_lifetime_out_of_range_is_refused(client, seconds):
    fields = {"expires_after[anchor]": "created_at", "expires_after[seconds]": seconds}
    told(post(client, **fields), 400, "invalid_value", "expires_after[seconds]")


def test_a_lifetime_without_its_other_half_is_refused(client):
    told(post(client, **{"expires_after[seconds]": "3600"}), 400, param="expires_after[anchor]")
    told(post(client, **{"expires_after[anchor]": "created_at"}), 400, param="expires_after[seconds]")
    fields = {"expires_after[anchor]": "last_used_at", "expires_after[seconds]": "3600"}
    told(post(client, **fields), 400, param="expires_after[anchor]")


# --- what of them -----------------------------------------------------------------------------------------------------

RANGES = {
    "bytes=0-0": b"0",
    "bytes=2-4": b"234",
    "bytes=5-": b"56789",
    "bytes=-3": b"789",
    "bytes=-99": CONTENT,
    "bytes=8-99": b"89",
    "Bytes = 0-1": b"01",
    f"bytes=8-{'9' * 21}": b"89",
    f"bytes=-{'9' * 5000}": CONTENT,
    "bytes=0-0,99-": b"0",
    "bytes=99-,,0-0,": b"0",
    "bytes=007-08": b"78",
    "bytes=4-6,5-8": b"45678",
}


@pytest.mark.parametrize("wanted", RANGES, ids=lambda wanted: wanted[:20])
def test_a_range_gives_its_bytes(client, content, wanted):
    answer = client.http.get(content, headers={"range": wanted})
    assert (answer.status_code, answer.content) == (206, RANGES[wanted])
    assert answer.headers["content-range"].endswith("/10")
    assert answer.headers["x-checksum-sha256"] == hashlib.sha256(CONTENT).hexdigest()


def test_several_ranges_come_in_one_answer(client, content):
    answer = client.http.get(content, headers={"range": "bytes=0-1,5-6"})
    assert answer.status_code == 206
    assert answer.headers["content-type"].startswith("multipart/byteranges")
    assert b"01" in answer.content
    assert b"56" in answer.content


@pytest.mark.parametrize("wanted", ["rows=0-1", "items=a-b", "", "=0-1"])
def test_a_range_of_another_unit_is_ignored(client, content, wanted):
    answer = client.http.get(content, headers={"range": wanted})
    assert (answer.status_code, answer.content) == (200, CONTENT)


BAD_RANGES = [
    *("bytes=10-", "bytes=99-100", "bytes=4-2", "bytes=-0", "bytes=-", "bytes=", "bytes", "bytes=a-b", "bytes=1"),
    *("bytes=0-1,x", "bytes=0-1,4-2", "bytes=10-,99-", "bytes=0x1-2", "bytes=--1", "bytes=0 - 1", "bytes=1-2-3"),
    f"bytes={'9' * 5000}-",
]


@pytest.mark.parametrize("wanted", BAD_RANGES, ids=lambda wanted: wanted[:20])
def test_a_bad_range_is_told_with_the_files_size(client, content, wanted):
    answer = client.http.get(content, headers={"range": wanted})
    told(answer, 416, "bad_range", "range")
    assert answer.headers["content-range"] == "bytes */10"


def test_a_range_of_another_version_gives_the_whole(client, content):
    etag = client.http.get(content).headers["etag"]
    wanted = {"range": "bytes=0-0"}
    assert client.http.get(content, headers={**wanted, "if-range": etag}).content == b"0"
    assert client.http.get(content, headers={**wanted, "if-range": '"other"'}).content == CONTENT
    assert client.http.get(content, headers={"range": "bytes=99-", "if-range": '"other"'}).content == CONTENT


def test_what_a_client_has_already_is_not_sent_again(client, content):
    etag = client.http.get(content).headers["etag"]
    assert etag == f'"{hashlib.sha256(CONTENT).hexdigest()}"'
    for known in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        answer = client.http.get(content, headers={"if-none-match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert client.http.get(content, headers={"if-none-match": '"x"'}).content == CONTENT


def test_a_head_tells_everything_but_the_bytes(client, content):
    answer, whole = client.http.head(content), client.http.get(content)
    assert (answer.status_code, answer.content) == (200, b"")
    for name in ("content-length", "etag", "x-checksum-sha256", "accept-ranges", "content-type"):
        assert answer.headers[name] == whole.headers[name]
    assert client.http.head(content, headers={"range": "bytes=0-3"}).headers["content-length"] == "4"


def test_large_content_comes_back_whole(client):
    large = os.urandom(99_000)
    answer = client.http.get(f"/files/{client.upload(large)}/content")
    assert answer.content == large
    assert answer.headers["content-length"] == "99000"


def test_content_that_is_gone_is_not_found(api, client, file_id):
    with api.database.reading() as session:
        key = session.get_one(File, file_id).storage_key
    (api.settings.storage_dir / key).unlink()
    told(client.http.get(f"/files/{file_id}/content"), 404, "content_not_found")


# --- files that are deleted meanwhile ---------------------------------------------------------------------------------


async def taken(answer, at_start):
    """What an answer sends; `at_start` is called once it has begun."""
    sent = []

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)
        if len(sent) == 1:
            at_start()

    await answer({"type": "http", "method": "GET", "headers": [], "asgi": {"spec_version": "2.3"}}, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def test_content_deleted_before_the_answer_began_is_not_found(tmp_path):
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    answer = download(Wanted(None, None, None), path, filename="r.jsonl", sha256="0" * 64)
    path.unlink()
    status, body = asyncio.run(taken(answer, lambda: None))
    assert (status, json.loads(body)["error"]["code"]) == (404, "content_not_found")


def test_content_deleted_after_the_answer_began_is_sent_to_its_end(tmp_path):
    path = tmp_path / "content"
    path.write_bytes(large := os.urandom(3_000_000))
    answer = download(Wanted(None, None, None), path, filename="r.jsonl", sha256="0" * 64)
    assert asyncio.run(taken(answer, path.unlink)) == (200, large)


def test_a_file_that_a_new_job_names_cannot_be_deleted_before_the_job_is_there(api, client, file_id):
    body = JobRequest.model_validate({"model": MODEL, "training_file": file_id})
    caller = Caller(key_id="key_x", team_id=client.member.team_id, team_name="t", is_admin=False)
    with ThreadPoolExecutor(1) as pool, api.database.writing() as session:
        job = new_job(session, body, caller)
        deleting = pool.submit(client.http.delete, f"/files/{file_id}")
        assert not wait([deleting], timeout=0.3).done
        jobs.create(session, job)
        session.commit()
        told(deleting.result(), 409, "file_in_use")


def test_a_job_made_while_its_file_is_deleted_is_refused(api, client, file_id):
    with ThreadPoolExecutor(1) as pool, api.database.writing() as session:
        session.delete(session.get_one(File, file_id))
        session.flush()
        asked = {"model": MODEL, "training_file": file_id}
        making = pool.submit(client.http.post, "/fine_tuning/jobs", json=asked)
        assert not wait([making], timeout=0.3).done
        session.commit()
        told(making.result(), 400, "file_not_found", "training_file")


def test_of_two_deletions_at_once_one_finds_nothing(api, client, file_id):
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: client.http.delete(f"/files/{file_id}").status_code, range(2)))
    assert sorted(answers) == [200, 404]


def test_files_of_one_purpose_are_listed_in_either_order(client):
    ids = [client.upload(purpose=purpose) for purpose in ("fine-tune", "evals", "fine-tune", "user_data", "fine-tune")]
    page = client.http.get("/files", params={"purpose": "fine-tune", "limit": 2, "order": "asc"}).json()
    assert [file["id"] for file in page["data"]] == [ids[0], ids[2]]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[0], ids[2], True)
    after = {"purpose": "fine-tune", "order": "asc", "after": page["last_id"]}
    assert [file["id"] for file in client.http.get("/files", params=after).json()["data"]] == [ids[4]]
    newest = client.http.get("/files", params={"purpose": "fine-tune"}).json()["data"]
    assert [file["id"] for file in newest] == [ids[4], ids[2], ids[0]]
