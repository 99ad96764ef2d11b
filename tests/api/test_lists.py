"""Lists: limits, cursors and filters that make no sense get an error, and ids of any form an honest answer."""

from __future__ import annotations

import pytest

from tests.api.talk import ROW, Client, told

LISTS = [
    *("/files", "/pairs", "/grafts", "/fine_tuning/jobs"),
    *("/fine_tuning/jobs/{job}/events", "/fine_tuning/jobs/{job}/artifacts"),
]


@pytest.fixture
def job_id(client):
    return client.submit()


LIMITS = ["-1", "0", "1e20", str(2**63), "9" * 5000, "two", "", "1.5", "0x10", "null", "1;2"]


@pytest.mark.parametrize("path", LISTS)
def test_a_limit_that_is_none_is_refused(client, job_id, path):
    for limit in LIMITS:
        told(client.http.get(f"{path.format(job=job_id)}?limit={limit}"), 400, param="limit")


@pytest.mark.parametrize("path", LISTS)
def test_two_limits_are_no_reason_to_fall_over(client, job_id, path):
    assert client.http.get(f"{path.format(job=job_id)}?limit=1&limit=2").status_code in {200, 400}


CURSORS = [
    "",
    "x",
    "file-",
    "ftjob-0",
    "../x",
    "%00",
    "a%00b",
    "%ff",
    "%2e%2e%2f",
    "x" * 8000,
    "'; DROP TABLE job;--",
    "١٢٣",
]


@pytest.mark.parametrize("path", LISTS)
def test_an_unknown_cursor_is_refused(client, job_id, path):
    for after in CURSORS:
        answer = client.http.get(f"{path.format(job=job_id)}?after={after}")
        if answer.status_code != 200 or after:
            told(answer, 400)


def test_a_cursor_of_another_list_is_refused(client, job_id):
    other = client.submit()
    event = client.http.get(f"/fine_tuning/jobs/{other}/events").json()["last_id"]
    told(client.http.get(f"/fine_tuning/jobs/{job_id}/events", params={"after": event}), 400, param="after")
    told(client.http.get("/files", params={"after": job_id}), 400, param="after")


def test_a_cursor_that_the_filters_leave_out_is_refused(client, job_id):
    client.finish(job_id, {"model/w": b"w", "card/README.md": b"c"})
    other = client.submit()
    client.finish(other, {"model/w": b"w"})
    for path, names, names_not in (
        (f"/fine_tuning/jobs/{job_id}/artifacts", {}, f"/fine_tuning/jobs/{other}/artifacts?kind=model"),
        (
            f"/fine_tuning/jobs/{job_id}/artifacts",
            {"kind": "model"},
            f"/fine_tuning/jobs/{job_id}/artifacts?kind=card",
        ),
        ("/files", {"purpose": "evals"}, "/files?purpose=fine-tune"),
        ("/fine_tuning/jobs", {"metadata[a]": "b"}, "/fine_tuning/jobs"),
    ):
        after = client.http.get(names_not).json()["first_id"]
        told(client.http.get(path, params={**names, "after": after}), 400, param="after")


def test_a_slash_at_the_end_is_told_and_leads_nowhere_else(client):
    for method, path in (("GET", "/files/"), ("POST", "/fine_tuning/jobs/"), ("GET", "/fine_tuning/jobs/x/")):
        answer = client.http.request(method, path, headers={"host": "elsewhere.example"}, follow_redirects=False)
        error = told(answer, 404, "unknown_url")
        assert f"Leave out the slash at its end: /v1{path[:-1]}." in error["message"]
    assert "/docs lists the routes" in told(client.http.get("/nowhere/"), 404, "unknown_url")["message"]


def test_the_cursor_of_a_deleted_file_is_refused(client):
    file_id = client.upload()
    client.http.delete(f"/files/{file_id}")
    told(client.http.get("/files", params={"after": file_id}), 400, param="after")


@pytest.mark.parametrize("query", ["order=up", "purpose=%00", "order="])
def test_an_odd_filter_of_files_is_no_crash(client, query):
    answer = client.http.get(f"/files?{query}")
    assert answer.status_code in {200, 400}


@pytest.mark.parametrize(
    "query", ["[", "a=", '"]=x', "a%22b]=x", "]=x", "a]=%00", "%00]=x", "$.a]=x", "0]=x", "a]=%ff", "a'b]=x"]
)
def test_an_odd_metadata_filter_finds_nothing_and_breaks_nothing(client, job_id, query):
    answer = client.http.get(f"/fine_tuning/jobs?metadata[{query}")
    assert answer.status_code in {200, 400}, answer.text


IDS = [
    "x",
    "ftjob-",
    "%00",
    "a%00b",
    "..",
    "%2e%2e",
    "..%2f..%2fetc%2fpasswd",
    "%ff",
    "x" * 8000,
    "1;2",
    "١",
    "ftjob-x%0d%0aX: y",
    "*",
]
GET = [
    *("/files/{}", "/files/{}/content", "/files/{}/report", "/artifacts/{}", "/artifacts/{}/content", "/grafts/{}"),
    *(f"/fine_tuning/jobs/{{}}{part}" for part in ("", "/events", "/artifacts", "/evaluation")),
]


@pytest.mark.parametrize("path", GET)
def test_an_id_of_any_form_is_just_not_found(client, path):
    for odd in IDS:
        answer = client.http.get(path.format(odd), follow_redirects=False)
        if answer.status_code == 200:  # the client itself resolved `..`
            assert odd == ".."
        else:
            told(answer, answer.status_code)
            assert answer.status_code in {400, 404, 405}


def test_acts_on_an_id_of_any_form_are_just_not_found(client):
    for odd in IDS:
        for answer in (client.http.delete(f"/files/{odd}"), client.http.post(f"/fine_tuning/jobs/{odd}/cancel")):
            assert answer.status_code in {400, 404, 405}, answer.text


# --- what one team sees of another ------------------------------------------------------------------------------------


@pytest.fixture
def stranger(api):
    made = Client(api, api.member())
    with made.http:
        yield made


def test_a_team_sees_nothing_of_another(client, stranger):
    file_id = client.upload()
    job_id = client.submit(file_id)
    client.finish(job_id, {"adapter/adapter_model.safetensors": b"a"})
    graft_id = client.graft(job_id)
    artifact_id = client.http.get(f"/fine_tuning/jobs/{job_id}/artifacts").json()["first_id"]
    event_id = client.http.get(f"/fine_tuning/jobs/{job_id}/events").json()["first_id"]
    for path in GET:
        mine = {"artifacts": artifact_id, "files": file_id, "grafts": graft_id}.get(path.split("/")[1], job_id)
        assert_absent(stranger.http.get(path.format(mine)), path, mine, stranger)
    assert_absent(stranger.http.delete(f"/files/{file_id}"), "/files/{}", file_id, stranger)
    assert_absent(stranger.http.post(f"/fine_tuning/jobs/{job_id}/cancel"), "/fine_tuning/jobs/{}", job_id, stranger)
    for path, cursor in [("/files", file_id), ("/fine_tuning/jobs", job_id), ("/grafts", graft_id)]:
        assert stranger.http.get(path).json()["data"] == []
        told(stranger.http.get(path, params={"after": cursor}), 400, param="after")
    own = stranger.submit()
    told(stranger.http.get(f"/fine_tuning/jobs/{own}/events", params={"after": event_id}), 400, param="after")
    told(stranger.http.get(f"/fine_tuning/jobs/{own}/artifacts", params={"after": artifact_id}), 400, param="after")
    assert client.http.get(f"/files/{file_id}/content").content == ROW


def assert_absent(answer, path, item_id, stranger):
    """Another team's thing is told of in the very words in which one that never was is."""
    error = told(answer, 404)
    never = told(stranger.http.get(path.format("never-was")), 404)
    assert error["message"].replace(item_id, "?") == never["message"].replace("never-was", "?")
    assert error["code"] == never["code"]


@pytest.mark.parametrize("place", ["training_file", "validation_file", "probe"])
def test_a_team_cannot_train_on_the_file_of_another(client, stranger, place):
    foreign, own = client.upload(), stranger.upload()
    body = {"model": "qwen2.5-0.5b", "training_file": foreign if place == "training_file" else own}
    if place == "validation_file":
        body["validation_file"] = foreign
    if place == "probe":
        body["shadow"] = {"evaluation": {"probes": {"general": foreign}}}
    told(stranger.http.post("/fine_tuning/jobs", json=body), 400, "file_not_found")
    assert stranger.http.get("/fine_tuning/jobs").json()["data"] == []


def test_two_teams_pages_do_not_mix(client, stranger):
    mine = []
    for _ in range(3):
        mine.append(client.upload())
        stranger.upload()
    first = client.http.get("/files?limit=2").json()
    second = client.http.get("/files", params={"limit": 2, "after": first["last_id"]}).json()
    assert [file["id"] for file in first["data"] + second["data"]] == mine[::-1]
    assert (first["has_more"], second["has_more"]) == (True, False)
