"""Asking again and again how a job stands: an unchanged one is a 304, any change is seen."""

from __future__ import annotations

import time
from functools import partial

import pytest
from sqlalchemy import event, update
from sqlalchemy.pool import Pool

from core import jobs
from core.errors import Cause
from core.jobs import NewEvent
from core.models import Job
from tests.api.talk import Client, told
from tests.servers import run_api


@pytest.fixture(params=["job", "graft"])
def polled(request, client):
    """The path of a job's or a graft's status, and its id."""
    job_id = client.submit()
    if request.param == "job":
        return f"/fine_tuning/jobs/{job_id}", job_id
    client.finish(job_id, {"adapter/adapter_model.safetensors": b"a"})
    graft_id = client.graft(job_id)
    return f"/grafts/{graft_id}", graft_id


def ask(client, path, etag):
    return client.http.get(path, headers={"if-none-match": etag})


def test_an_unchanged_job_is_not_sent_again(client, polled):
    path, _ = polled
    first = client.http.get(path)
    again = ask(client, path, first.headers["etag"])
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert again.headers["x-request-id"]


def test_every_way_to_name_the_tag_is_understood(client, polled):
    path, _ = polled
    etag = client.http.get(path).headers["etag"]
    for given in ("*", etag.removeprefix("W/"), f'"x", {etag}', f'{etag},W/"y"', ",".join(['"z"'] * 300 + [etag])):
        assert ask(client, path, given).status_code == 304, given
    for given in ("", "x", '"', 'W/"', '"x"', etag.upper(), f"{etag}x", ",,,"):
        assert ask(client, path, given).status_code == 200, given


MOVES = {
    "event": lambda session, claim: jobs.add_events(session, claim.job_id, [NewEvent("Said")]),
    "progress": partial(jobs.record, progress={"step": 1, "total_steps": 2, "loss": None}),
    "phase": lambda session, claim: jobs.enter_phase(session, claim, "training", "Training"),
    "wish": lambda session, claim: jobs.request_cancel(session, claim.job_id),
    "failure": lambda session, claim: jobs.fail(session, claim, Cause(code="c", message="It broke.")),
    "back in the queue": lambda session, claim: jobs.put_back(session, claim, "Drained"),
    "cancelled": jobs.finish_cancelled,
    "a write past the verbs": lambda session, claim: session.execute(
        update(Job).where(Job.id == claim.job_id).values(trained_tokens=1)
    ),
    "a write through the row": lambda session, claim: setattr(session.get_one(Job, claim.job_id), "suffix", "new"),
}


@pytest.mark.parametrize("move", MOVES)
def test_every_move_changes_the_tag(client, move):
    job_id = client.submit()
    claim = client.start(job_id)
    path = f"/fine_tuning/jobs/{job_id}"
    etag = client.http.get(path).headers["etag"]
    assert ask(client, path, etag).status_code == 304
    with client.api.database.writing() as session:
        MOVES[move](session, claim)
        session.commit()
    changed = ask(client, path, etag)
    assert changed.status_code == 200
    assert changed.headers["etag"] != etag
    client.http.post(f"{path}/cancel")  # what is queued again must not be claimed by the next test


def test_admission_and_success_change_the_tag(client):
    job_id = client.submit()
    path, etags = f"/fine_tuning/jobs/{job_id}", set()
    etags.add(client.http.get(path).headers["etag"])
    client.finish(job_id)
    etags.add(client.http.get(path).headers["etag"])
    assert len(etags) == 2


def test_the_tag_of_another_job_is_not_this_ones(client):
    first, second = (f"/fine_tuning/jobs/{client.submit()}" for _ in range(2))
    assert ask(client, second, client.http.get(first).headers["etag"]).status_code == 200


def test_a_tag_opens_nothing_that_is_not_there(client):
    told(ask(client, "/fine_tuning/jobs/ftjob-x", "*"), 404, "job_not_found")


def test_a_poll_asks_the_database_once(client):
    """Beside it the workers are looked up once a second at most, and the key every five."""
    path = f"/fine_tuning/jobs/{client.submit()}"
    etag = client.http.get(path).headers["etag"]
    asked = []

    def note(*_):
        asked.append(time.monotonic())

    event.listen(Pool, "checkout", note)
    try:
        for _ in range(20):
            assert client.http.get(path).status_code == 200
            assert ask(client, path, etag).status_code == 304
    finally:
        event.remove(Pool, "checkout", note)
    assert 40 <= len(asked) <= 42 + 2 * (asked[-1] - asked[0])


def test_a_poll_tells_of_a_database_that_is_away(fresh_settings, postgres, tmp_path):
    with fresh_settings("postgresql", tmp_path / "data") as settings, run_api(settings) as api:
        client = Client(api, api.member())
        with client.http:
            path = f"/fine_tuning/jobs/{client.submit()}"
            etag = client.http.get(path).headers["etag"]
            postgres.take_away(settings.database)
            for _ in range(3):
                told(client.http.get(path), 503, "unavailable")
                told(ask(client, path, etag), 503, "unavailable")
            postgres.bring_back(settings.database)
            assert ask(client, path, etag).status_code == 304
            assert client.http.get(path).status_code == 200
