"""One job for one intent: keys, retries after lost answers, races; on both databases, over real sockets."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
from sqlalchemy import func, select, update

from core.db import db_now
from core.idempotency import KEPT, RETRY_WINDOW, Intent, earlier_answer, forget_old
from core.models import IdempotencyKey, Job
from tests.api.talk import MODEL, Client, told
from tests.servers import HOST, PLAIN

ROUTE = "/fine_tuning/jobs"


@pytest.fixture
def body(client):
    return {"model": MODEL, "training_file": client.upload()}


def post(client, body, *, key=None, retry=None, path=ROUTE):
    headers = {}
    if key is not None:
        headers["idempotency-key"] = key
    if retry is not None:
        headers["x-stainless-retry-count"] = str(retry)
    return client.http.post(path, json=body, headers=headers)


def made(client):
    with client.api.database.reading() as session:
        return session.scalar(select(func.count()).select_from(Job).where(Job.team_id == client.member.team_id))


def age(client, seconds):
    """As if every answer of the team had been given so long ago."""
    with client.api.database.writing() as session:
        mine = IdempotencyKey.team_id == client.member.team_id
        session.execute(update(IdempotencyKey).where(mine).values(created_at=db_now(-seconds)))
        session.commit()


# --- keys -------------------------------------------------------------------------------------------------------------


def test_the_same_key_and_body_get_the_same_answer_and_one_job(client, body):
    first, second = post(client, body, key="k"), post(client, body, key="k")
    assert (second.status_code, second.content) == (first.status_code, first.content)
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert made(client) == 1


def test_the_answer_stays_what_it_was_when_the_job_has_gone_on(client, body):
    first = post(client, body, key="k")
    client.http.post(f"{ROUTE}/{first.json()['id']}/cancel")
    assert post(client, body, key="k").content == first.content


def test_the_same_body_written_otherwise_is_the_same(client, body):
    first = post(client, body, key="k").json()
    spelt = f'{{ "training_file" : "{body["training_file"]}",\n "model":"{MODEL}" }}'
    headers = {"content-type": "application/json", "idempotency-key": "k"}
    assert client.http.post(ROUTE, content=spelt, headers=headers).json() == first


def test_a_key_of_another_body_is_an_error(client, body):
    post(client, body, key="k")
    answer = post(client, {**body, "seed": 1}, key="k")
    told(answer, 400, "idempotency_key_reused", "Idempotency-Key")
    assert made(client) == 1


def test_another_key_is_another_job(client, body):
    assert post(client, body, key="a").json()["id"] != post(client, body, key="b").json()["id"]


def test_a_key_belongs_to_its_team(api, client, body):
    stranger = Client(api, api.member())
    with stranger.http:
        theirs = {"model": MODEL, "training_file": stranger.upload()}
        assert post(stranger, theirs, key="k").json()["id"] != post(client, body, key="k").json()["id"]


def test_a_key_belongs_to_its_route(client, body):
    job_id = post(client, body, key="k").json()["id"]
    client.finish(job_id, {"adapter/adapter_model.safetensors": b"a"})
    graft = {"target": MODEL, "source": job_id}
    first, second = (post(client, graft, key="k", path="/grafts") for _ in range(2))
    assert first.json()["object"] == "graft"
    assert (second.content, second.headers["idempotent-replayed"]) == (first.content, "true")
    assert made(client) == 2


def test_a_refused_request_does_not_use_its_key_up(client, body):
    told(post(client, {**body, "training_file": "file-x"}, key="k"), 400, "file_not_found")
    assert post(client, body, key="k").status_code == 200


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "é"])
def test_a_key_that_is_none_is_refused(client, body, key):
    answer = client.http.post(ROUTE, json=body, headers=[(b"idempotency-key", key.encode("latin-1"))])
    told(answer, 400, param="Idempotency-Key")
    assert made(client) == 0


@pytest.mark.parametrize("key", ['"quoted"', "8e03978e-40d5-43dd-bc93-6894a57f9324", "x" * 255, "a b, c"])
def test_a_key_may_be_any_text(client, body, key):
    assert post(client, body, key=key).json() == post(client, body, key=key).json()


def test_a_day_later_the_key_is_forgotten(client, body):
    first = post(client, body, key="k").json()["id"]
    forget(client)
    assert post(client, body, key="k").json()["id"] == first
    age(client, KEPT.total_seconds())
    forget(client)
    assert post(client, body, key="k").json()["id"] != first


def forget(client):
    with client.api.database.writing() as session:
        forget_old(session)
        session.commit()


# --- retries without a key --------------------------------------------------------------------------------------------


def test_a_retry_of_the_same_body_makes_no_second_job(client, body):
    first = post(client, body, retry=0)
    again = [post(client, body, retry=count) for count in (1, 2)]
    assert {answer.content for answer in again} == {first.content}
    assert {answer.headers["idempotent-replayed"] for answer in again} == {"true"}
    assert made(client) == 1


def test_a_retry_whose_first_request_never_came_makes_the_job_once(client, body):
    assert post(client, body, retry=1).json() == post(client, body, retry=2).json()
    assert made(client) == 1


def test_two_requests_that_are_meant_make_two_jobs(client, body):
    assert post(client, body, retry=0).json()["id"] != post(client, body, retry=0).json()["id"]
    assert post(client, body).json()["id"] != post(client, body).json()["id"]
    assert made(client) == 4


def test_a_retry_repeats_the_newest_of_equal_requests(client, body):
    post(client, body, retry=0)
    second = post(client, body, retry=0)
    assert post(client, body, retry=1).content == second.content


def test_a_retry_of_another_body_is_another_job(client, body):
    first = post(client, body, retry=0)
    assert post(client, {**body, "seed": 2}, retry=1).json()["id"] != first.json()["id"]


def test_a_retry_does_not_reach_back_further_than_its_window(client, body):
    first = post(client, body, retry=0)
    age(client, RETRY_WINDOW.total_seconds() + 1)
    assert post(client, body, retry=1).json()["id"] != first.json()["id"]


@pytest.mark.parametrize("count", ["", "x", "-1", "9" * 5000, "0", "00"])
def test_a_retry_count_of_any_form_breaks_nothing(client, body, count):
    assert post(client, body, retry=count).status_code == 200


# --- uploads ----------------------------------------------------------------------------------------------------------

UPLOAD = {"bytes": 2, "filename": "r.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}


def test_an_upload_is_begun_once_for_a_key_and_once_for_a_retry(client):
    for how in ({"key": "k"}, {"retry": 1}):
        first, second = (post(client, UPLOAD, path="/uploads", **how) for _ in range(2))
        assert (first.json()["status"], first.content) == ("pending", second.content)
        assert second.headers["idempotent-replayed"] == "true"
    assert post(client, UPLOAD, path="/uploads").json()["id"] != first.json()["id"]
    told(post(client, {**UPLOAD, "bytes": 3}, path="/uploads", key="k"), 400, "idempotency_key_reused")


def test_an_upload_is_completed_once_whatever_the_key(client):
    path = f"/uploads/{post(client, UPLOAD, path='/uploads').json()['id']}"
    part = client.http.post(f"{path}/parts", files={"data": ("d", b"{}")}).json()["id"]
    first, second = (post(client, {"part_ids": [part]}, path=f"{path}/complete", key=key) for key in ("k", "k"))
    assert first.json()["file"]["id"] == second.json()["file"]["id"]
    told(post(client, {"part_ids": [part], "md5": "0" * 32}, path=f"{path}/complete", key="k"), 409)


# --- races ------------------------------------------------------------------------------------------------------------


def at_once(client, count, ask):
    """What `ask(http)` answers, asked by so many clients at once."""
    barrier = threading.Barrier(count)

    def work(_):
        own = httpx.Client(base_url=client.http.base_url, headers=client.member.headers, timeout=30, verify=PLAIN)
        with own:
            barrier.wait()
            return ask(own)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def test_of_many_equal_requests_at_once_one_makes_the_job(client, body):
    answers = at_once(client, 12, lambda http: http.post(ROUTE, json=body, headers={"idempotency-key": "k"}))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert sorted("idempotent-replayed" in answer.headers for answer in answers) == [False] + [True] * 11
    assert made(client) == 1


def test_of_many_retries_at_once_one_makes_the_job(client, body):
    answers = at_once(client, 12, lambda http: http.post(ROUTE, json=body, headers={"x-stainless-retry-count": "1"}))
    assert {answer.status_code for answer in answers} == {200}
    assert made(client) == 1


def test_many_that_are_meant_at_once_are_all_made(client, body):
    answers = at_once(client, 12, lambda http: http.post(ROUTE, json=body))
    assert len({answer.json()["id"] for answer in answers}) == made(client) == 12


def test_one_that_is_still_being_answered_is_a_conflict_that_passes(api, client, body):
    if api.settings.uses_sqlite:
        pytest.skip("SQLite's writers wait for each other, whatever they write")
    first = post(client, body, key="k")
    with api.database.reading() as session:
        row = session.scalars(select(IdempotencyKey).where(IdempotencyKey.team_id == client.member.team_id)).one()
    held = Intent(row.team_id, row.route, row.body_sha256, "k", is_retry=False)
    with api.database.writing() as session:
        earlier_answer(session, held)
        answer = post(client, body, key="k")
        told(answer, 409, "request_in_flight")
        assert (answer.headers["x-should-retry"], answer.headers["retry-after"]) == ("true", "1")
    assert post(client, body, key="k").content == first.content


def test_of_many_cancels_at_once_one_makes_the_move(client, body):
    job_id = post(client, body).json()["id"]
    answers = at_once(client, 20, lambda http: http.post(f"{ROUTE}/{job_id}/cancel"))
    assert {(answer.status_code, answer.json()["status"]) for answer in answers} == {(200, "cancelled")}
    said = [event["message"] for event in client.http.get(f"{ROUTE}/{job_id}/events").json()["data"]]
    assert said.count("The job has been cancelled") == 1


# --- the SDK and a wire that loses answers ----------------------------------------------------------------------------


@contextmanager
def losing_answers(port, count):
    """A port that passes everything on to `port`, but hangs up instead of its first `count` answers; and how many
    connections it has had."""
    with socket.create_server((HOST, 0)) as listener:
        connections = []
        thread = threading.Thread(target=_serve, args=(listener, port, count, connections))
        thread.start()
        try:
            yield listener.getsockname()[1], connections
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _serve(listener, port, lost, connections):
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        connections.append(client)
        with client, socket.create_connection((HOST, port)) as server:
            server.sendall(_request(client))
            answer = b"".join(iter(lambda: server.recv(65536), b""))  # the server has committed by now
            if len(connections) > lost:
                client.sendall(answer)


def _request(client):
    """One whole request, made to end its connection."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += client.recv(65536)
    head, _, content = received.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(content) < length:
        content += client.recv(65536)
    kept = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([*kept, b"Connection: close", b"", content])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:openai")
@pytest.mark.parametrize("lost", [1, 2])
def test_the_sdk_makes_one_job_though_answers_are_lost(api, client, body, lost):
    with losing_answers(api.port, lost) as (port, connections):
        http_client = openai.DefaultHttpxClient(verify=PLAIN)
        with openai.OpenAI(
            base_url=f"http://{HOST}:{port}/v1", api_key=client.member.key, http_client=http_client
        ) as sdk:
            job = sdk.fine_tuning.jobs.create(**body)
        assert len(connections) == lost + 1
    assert [one["id"] for one in client.http.get(ROUTE).json()["data"]] == [job.id]
