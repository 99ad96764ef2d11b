"""A job's events as they happen: nothing missing, nothing twice, whoever reads how slowly, at whatever price of one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from api import event_stream
from core import jobs
from core.jobs import NewEvent
from core.keys import create_key, revoke_key
from core.models import Team
from tests.api.talk import Client, told
from tests.servers import HOST, PLAIN, Member, die_with_parent, ended, free_port, run_api, wait_until

READS_FOR_STREAMS = ("job.event_count", "FROM job_event")


@pytest.fixture
def client(api):
    """A new team's client that may hold any number of connections."""
    made = Client(api, api.member())
    made.http.close()
    made.http = httpx.Client(
        base_url=f"{api.url}/v1", headers=made.member.headers, timeout=30, verify=PLAIN,
        limits=httpx.Limits(max_connections=None),
    )  # fmt: skip
    with made.http:
        yield made


@pytest.fixture
def job_id(client):
    """A job with two events: it was created, its file is being checked."""
    return client.submit()


def path_of(job_id):
    return f"/fine_tuning/jobs/{job_id}/events"


@contextmanager
def stream(client, job_id, last=None):
    headers = {"last-event-id": last} if last else {}
    with client.http.stream("GET", path_of(job_id), params={"stream": "true"}, headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield answer


def messages(answer):
    """`(id, data)` of each message as it comes; `(None, "[DONE]")` at the end."""
    fields = {}
    for line in answer.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            yield fields.get("id"), fields["data"] if fields["data"] == "[DONE]" else json.loads(fields["data"])
            fields = {}


def say(client, job_id, *texts):
    with client.api.database.writing() as session:
        jobs.add_events(session, job_id, [NewEvent(text) for text in texts])
        session.commit()


def listed(client, job_id):
    """The ids of all events, the oldest first."""
    return [one["id"] for one in client.http.get(path_of(job_id), params={"limit": 1000}).json()["data"]][::-1]


def cancel(client, job_id):
    assert client.http.post(f"/fine_tuning/jobs/{job_id}/cancel").status_code == 200


def test_events_come_in_order_as_they_happen_until_the_last_one(client, job_id):
    with stream(client, job_id) as answer:
        seen = messages(answer)
        first = [next(seen)[1]["message"] for _ in range(2)]
        assert first[0] == f"Created fine-tuning job: {job_id}"
        say(client, job_id, "One", "Two")
        assert [next(seen)[1]["message"] for _ in range(2)] == ["One", "Two"]
        cancel(client, job_id)
        assert [data if data == "[DONE]" else data["message"] for _, data in seen] == [
            "The job has been cancelled",
            "[DONE]",
        ]


def test_a_streamed_event_is_the_listed_one(client, job_id):
    cancel(client, job_id)
    with stream(client, job_id) as answer:
        streamed = [data for name, data in messages(answer) if name]
    assert streamed[::-1] == client.http.get(path_of(job_id)).json()["data"]


def test_a_stream_is_taken_up_where_it_was_left(client, job_id):
    say(client, job_id, *(f"Event {number}" for number in range(600)))
    cancel(client, job_id)
    every = listed(client, job_id)
    for last in (every[0], every[300], every[-2]):
        with stream(client, job_id, last) as answer:
            assert [name for name, _ in messages(answer) if name] == every[every.index(last) + 1 :]


def test_after_the_last_event_there_is_nothing_to_wait_for(client, job_id):
    cancel(client, job_id)
    headers = {"last-event-id": listed(client, job_id)[-1]}
    answer = client.http.get(path_of(job_id), params={"stream": "true"}, headers=headers)
    assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize("last", ["", "x", "-1", "0", "9" * 500, "ftevent-x", "١", "' OR 1=1", "other"])
def test_an_unknown_last_event_is_refused(client, job_id, last):
    if last == "other":
        last = listed(client, client.submit())[0]
    headers = [(b"last-event-id", last.encode())]
    answer = client.http.get(path_of(job_id), params={"stream": "true"}, headers=headers)
    told(answer, 400, param="Last-Event-ID")


@pytest.mark.parametrize("query", [{"after": "ftevent-x"}, {"limit": "5"}])
def test_a_stream_has_no_pages(client, job_id, query):
    told(client.http.get(path_of(job_id), params={"stream": "true", **query}), 400, param=next(iter(query)))


def test_the_stream_of_what_is_not_there_is_not_found(client):
    told(client.http.get(path_of("ftjob-x"), params={"stream": "true"}), 404, "job_not_found")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:openai")
def test_the_sdk_reads_the_stream_to_its_end(api, client, job_id):
    say(client, job_id, "One")
    cancel(client, job_id)
    with sdk_stream(api, client, job_id) as answer:
        assert [one["id"] for one in answer] == listed(client, job_id)


@contextmanager
def sdk_stream(api, client, job_id):
    http_client = openai.DefaultHttpxClient(verify=PLAIN)
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key=client.member.key, http_client=http_client) as sdk:
        how = {"cast_to": object, "stream": True, "stream_cls": openai.Stream[object]}
        with sdk.get(path_of(job_id), **how, options={"params": {"stream": "true"}}) as answer:
            yield answer


def test_silence_is_broken_by_comments(client, job_id, monkeypatch):
    monkeypatch.setattr(event_stream, "HEARTBEAT_SECONDS", 0.05)
    with stream(client, job_id) as answer:
        lines = answer.iter_lines()
        assert sum(next(lines).startswith(":") for _ in range(30)) > 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning:openai")
def test_the_sdk_does_not_mind_the_comments(api, client, job_id, monkeypatch):
    monkeypatch.setattr(event_stream, "HEARTBEAT_SECONDS", 0.05)
    with sdk_stream(api, client, job_id) as answer:
        seen = iter(answer)
        assert [next(seen)["object"] for _ in range(2)] == ["fine_tuning.job.event"] * 2
        time.sleep(0.3)
        cancel(client, job_id)
        assert [one["message"] for one in seen] == ["The job has been cancelled"]


def test_a_stream_ends_with_its_key_and_only_that_one(api, client, job_id):
    with api.database.writing() as session:
        row, key = create_key(session, session.get_one(Team, client.member.team_id), name="other", is_admin=False)
        session.commit()
    other = Client(api, Member(team_id=client.member.team_id, key=key))
    with other.http, stream(client, job_id) as kept, stream(other, job_id) as ended:
        seen, lost = messages(kept), messages(ended)
        assert [next(seen)[0] for _ in range(2)] == [next(lost)[0] for _ in range(2)]
        with api.database.writing() as session:
            revoke_key(session, row.id)
            session.commit()
        assert list(lost) == []  # a clean end, and not that of the job
        say(client, job_id, "News")
        assert next(seen)[1]["message"] == "News"


# --- many, slow and gone ----------------------------------------------------------------------------------------------


@contextmanager
def counted_reads():
    """Statements that streams caused meanwhile."""
    said = []

    def note(_connection, _cursor, statement, *_):
        if any(part in statement for part in READS_FOR_STREAMS):
            said.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield said
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def reads_in(seconds):
    with counted_reads() as said:
        time.sleep(seconds)
    return len(said)


@pytest.fixture
def feed(api):
    return api.app.state.feed


def test_two_hundred_streams_read_no_more_than_one(client, feed):
    job_ids = [client.submit() for _ in range(4)]
    with ExitStack() as stack:
        first = messages(stack.enter_context(stream(client, job_ids[0])))
        assert [next(first) for _ in range(2)]
        alone = reads_in(2)
        others = [stack.enter_context(stream(client, job_ids[number % 4])) for number in range(199)]
        seen = [messages(answer) for answer in others]
        for one in seen:
            assert [next(one) for _ in range(2)]
        assert sum(channel.streams for channel in feed._channels.values()) == 200
        together = reads_in(2)
        assert 1 <= alone <= 6
        assert together <= alone + 3
        with counted_reads() as said:
            for job_id in job_ids:
                say(client, job_id, "News")
            assert {next(one)[1]["message"] for one in [first, *seen]} == {"News"}
        assert len(said) < 30
    wait_until(lambda: not feed._channels)


def test_who_reads_slowly_gets_everything_and_holds_nothing(client, job_id, feed):
    """More than the ring and the sockets hold: the rest is read from the database when the client takes it."""
    with stream(client, job_id) as answer:
        seen = messages(answer)
        next(seen)
        for _ in range(4):
            say_much(client, job_id, 5_000_000)
        cancel(client, job_id)
        time.sleep(1.2)
        assert max(len(channel._ready) for channel in feed._channels.values()) <= event_stream.READY_EVENTS
        names = [name for name, _ in seen if name]
    assert names == listed_whole(client, job_id)[1:]


def say_much(client, job_id, size):
    with client.api.database.writing() as session:
        large = [NewEvent("Much", data={"text": "x" * 20_000})] * (size // 20_000)
        jobs.add_events(session, job_id, large)
        session.commit()


def listed_whole(client, job_id):
    names, after = [], {}
    while True:
        found = client.http.get(path_of(job_id), params={"limit": 1000, **after}).json()
        names += [one["id"] for one in found["data"]]
        if not found["has_more"]:
            return names[::-1]
        after = {"after": found["last_id"]}


def test_a_client_that_is_gone_is_forgotten(client, job_id, feed):
    with stream(client, job_id) as answer:
        seen = messages(answer)
        next(seen)
        assert feed._channels[job_id].streams == 1
    wait_until(lambda: job_id not in feed._channels)
    wait_until(lambda: feed._channels or feed._reader.done())


def test_a_client_that_takes_nothing_is_let_go(api, client, job_id, feed, monkeypatch):
    monkeypatch.setattr(event_stream, "STALLED_SECONDS", 0.3)
    say_much(client, job_id, 20_000_000)
    with socket.create_connection((HOST, api.port)) as connection:
        head = f"GET /v1{path_of(job_id)}?stream=true HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.member.key}"
        connection.sendall(f"{head}\r\n\r\n".encode())
        wait_until(lambda: job_id in feed._channels)
        wait_until(lambda: job_id not in feed._channels)


def test_what_the_database_missed_comes_when_it_is_back(fresh_settings, postgres, tmp_path):
    with fresh_settings("postgresql", tmp_path / "data") as settings, run_api(settings) as api:
        client = Client(api, api.member())
        with client.http:
            job_id = client.submit()
            with stream(client, job_id) as answer:
                seen = messages(answer)
                assert [next(seen) for _ in range(2)]
                postgres.take_away(settings.database)
                time.sleep(1)
                postgres.bring_back(settings.database)
                say(client, job_id, "Back")
                assert next(seen)[1]["message"] == "Back"


# --- the end of the server --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_promptly_and_its_streams_with_it(tmp_path, number):
    """A real process: open streams must not hold it."""
    port = free_port()
    env = {**os.environ, "SHADOWFT_DATA_DIR": str(tmp_path), "SHADOWFT_PORT": str(port)}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", "api"], env={**env, "PYTHONPATH": str(Path(__file__).parents[2])},
            cwd=tmp_path, stderr=log, preexec_fn=die_with_parent(),
        )  # fmt: skip
    with ended(process, signal.SIGKILL), ExitStack() as stack:
        url = f"http://{HOST}:{port}"
        wait_until(lambda: answers(url), seconds=60)
        key = (tmp_path / "admin.key").read_text().strip()
        http = stack.enter_context(
            httpx.Client(base_url=f"{url}/v1", headers={"authorization": f"Bearer {key}"}, verify=PLAIN)
        )
        file = http.post("/files", data={"purpose": "fine-tune"}, files={"file": ("r", b"{}")}).json()["id"]
        made = http.post("/fine_tuning/jobs", json={"model": "qwen2.5-0.5b", "training_file": file}).json()["id"]
        opened = [stack.enter_context(http.stream("GET", path_of(made), params={"stream": "true"})) for _ in range(5)]
        seen = [messages(answer) for answer in opened]
        for one in seen:
            next(one)
        started = time.monotonic()
        process.send_signal(number)
        rests = [list(one) for one in seen]  # a clean end: no exception about a body that was cut
        process.wait(20)
        # The server's own patience with open answers is five seconds.
        assert time.monotonic() - started < 4.5
    assert all(("", "[DONE]") not in rest and (None, "[DONE]") not in rest for rest in rests)
    assert "exceeded" not in (tmp_path / "log").read_text()


def answers(url):
    try:
        return httpx.get(f"{url}/healthz", verify=PLAIN).status_code == 200
    except httpx.TransportError:
        return False


def test_streams_and_requests_share_the_server(client, job_id):
    """While streams are open the API answers others, and as many streams as threads block nobody."""
    with ExitStack() as stack:
        seen = [messages(stack.enter_context(stream(client, job_id))) for _ in range(60)]
        for one in seen:
            next(one)
        done = threading.Event()

        def poll():
            for _ in range(20):
                assert client.http.get(f"/fine_tuning/jobs/{job_id}").status_code == 200
            done.set()

        thread = threading.Thread(target=poll)
        thread.start()
        thread.join(20)
        assert done.is_set()
