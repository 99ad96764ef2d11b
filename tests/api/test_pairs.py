"""The routes of the pairs: what they show, find, add and take away."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

import core.pairs
from core.checkpoints import read_checkpoint
from core.models import Job
from tests.api.talk import told
from tests.core.test_pairs import write_model

numbers = count()


@pytest.fixture
def name():
    return f"ours-{next(numbers)}"


@pytest.fixture
def add(api):
    def register(name, **fields):
        body = {"name": name, "base": f"acme/{name}-base", "instruct": f"acme/{name}"} | fields
        answer = api.http.post("/v1/pairs", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return register


def names(client, **query):
    return [pair["name"] for pair in client.http.get("/pairs", params=query).json()["data"]]


def test_a_pair_of_the_catalogue_tells_what_is_known_and_from_where(client):
    pair = client.http.get("/pairs/gemma-3-4b").json()
    assert (pair["id"], pair["object"], pair["origin"], pair["created_at"]) == (
        *("pair-gemma-3-4b", "pair", "catalogue", None),
    )
    assert (pair["base"], pair["instruct"], pair["family"]) == (
        *("google/gemma-3-4b-pt", "google/gemma-3-4b-it", "Gemma 3"),
    )
    assert (pair["licence"]["text"], pair["ids"]["source"]) == ("gemma", "verified")
    assert "HF_TOKEN" in pair["gated"]["text"]
    assert {"names", "tied", "sigma", "failure"} == {caution["kind"] for caution in pair["cautions"]}
    for claim in (pair["ids"], pair["licence"], pair["gated"], *pair["cautions"]):
        assert (claim["source"] == "verified") == bool(claim["seen"])


def test_a_registered_pair_is_shown_by_id_and_by_name_and_claims_nothing(client, add, name):
    made = add(name, base_revision="v1")
    assert client.http.get(f"/pairs/{made['id']}").json() == client.http.get(f"/pairs/{name}").json() == made
    assert (made["origin"], made["base_revision"]) == ("registered", "v1")
    assert [made[field] for field in ("family", "ids", "licence", "gated")] == [None] * 4
    assert made["cautions"] == []


def test_the_list_shows_what_the_single_routes_show(client):
    for pair in client.http.get("/pairs", params={"limit": 5}).json()["data"]:
        assert client.http.get(f"/pairs/{pair['id']}").json() == pair


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("qwen3-2507", "qwen3-2507-4b"),
        ("QWEN/qwen3-0.6B-BASE", "qwen3-0.6b"),
        ("pair-falcon3-10b", "falcon3-10b"),
        ("llama 3", "llama-3.2-1b"),
        ("falcon-llm-license", "falcon3-1b"),
    ],
)
def test_a_search_looks_at_names_ids_families_and_licences(client, search, found):
    matches = names(client, search=search)
    assert found in matches
    assert len(matches) < len(names(client))


def test_a_search_is_paged_too(client):
    every, found = names(client, search="qwen2.5"), []
    page = client.http.get("/pairs", params={"search": "qwen2.5", "limit": 4}).json()
    while True:
        found += [pair["name"] for pair in page["data"]]
        if not page["has_more"]:
            break
        query = {"search": "qwen2.5", "limit": 4, "after": page["last_id"]}
        page = client.http.get("/pairs", params=query).json()
    assert found == every
    assert len(every) > 8


@pytest.mark.parametrize("key", ["qwen3-0.6", "Qwen3-0.6B", "pair-qwen3-0.6", "qwen3-0.6b%20", "Qwen/Qwen3-0.6b"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_unknown_pair_gets_the_nearest_names(api, method, key):
    error = told(api.http.request(method, f"/v1/pairs/{key}"), 404, "pair_not_found")
    assert "qwen3-0.6b" in error["message"].lower()


@pytest.mark.parametrize("key", ["%ff", "%2e%2e", "a/b", "x" * 5000, "check", "'; DROP TABLE pair;--"])
def test_an_odd_key_is_an_unknown_pair(client, key):
    told(client.http.get(f"/pairs/{key}"), 404)


@pytest.mark.parametrize("by", ["id", "name"])
def test_an_admin_deletes_a_registered_pair(api, client, add, name, by):
    made = add(name)
    told(client.http.delete(f"/pairs/{made['id']}"), 403, "permission_denied")
    answer = api.http.delete(f"/v1/pairs/{made[by]}")
    assert (answer.status_code, answer.json()) == (200, {"id": made["id"], "object": "pair", "deleted": True})
    told(api.http.delete(f"/v1/pairs/{made[by]}"), 404, "pair_not_found")
    assert name not in names(client)
    add(name)


def test_a_pair_of_the_catalogue_stays(api, client):
    error = told(api.http.delete("/v1/pairs/qwen3-0.6b"), 409, "pair_of_the_catalogue")
    assert "catalogue" in error["message"]
    assert client.http.get("/pairs/qwen3-0.6b").status_code == 200


def test_a_job_keeps_the_pair_that_is_deleted_after_it_was_created(api, client, add, name):
    made = add(name)
    job_id = client.submit(model=name)
    api.http.delete(f"/v1/pairs/{made['id']}")
    job = client.http.get(f"/fine_tuning/jobs/{job_id}").json()
    assert (job["model"], job["pair"]) == (name, name)
    with api.database.reading() as session:
        pair = session.get_one(Job, job_id).request["pair"]
    assert (pair["base"]["location"], pair["instruct"]["location"]) == (made["base"], made["instruct"])
    body = {"model": name, "training_file": client.upload()}
    told(client.http.post("/fine_tuning/jobs", json=body), 404, "model_not_found", "model")


@pytest.mark.parametrize(
    ("model", "several"),
    [
        ("Qwen/Qwen3-4B-Base", ["qwen3-4b", "qwen3-2507-4b"]),
        ("allenai/OLMo-2-1124-7B", ["olmo-2-1124-7b", "olmo-2-1124-sft-7b", "olmo-2-1124-dpo-7b"]),
        ("meta-llama/Llama-3.1-70B", ["llama-3.1-70b", "llama-3.3-70b"]),
    ],
)
def test_a_base_of_several_pairs_is_an_error_that_lists_them(client, model, several):
    body = {"model": model, "training_file": client.upload()}
    error = told(client.http.post("/fine_tuning/jobs", json=body), 400, param="model")
    assert all(name in error["message"] for name in several)


@pytest.mark.parametrize("taken", ["check", "Check", "pair-x", "PAIR-qwen3-0.6b"])
def test_a_name_that_would_be_taken_for_something_else_is_refused(api, taken):
    body = {"name": taken, "base": "acme/a", "instruct": "acme/b"}
    told(api.http.post("/v1/pairs", json=body), 400, param="name")


def test_of_two_who_give_names_that_differ_in_capitals_at_the_same_moment_one_gets_it(api, name):
    def post(given):
        return api.http.post("/v1/pairs", json={"name": given, "base": "acme/a", "instruct": "acme/b"})

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(post, [name, name.upper(), name.title()] * 2))
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 5
    for answer in answers:
        if answer.status_code == 409:
            told(answer, 409, "pair_exists", "name")


def test_while_the_folders_of_a_new_pair_are_read_others_may_write(api, client, name, tmp_path, monkeypatch):
    monkeypatch.setattr(api.settings, "model_roots", (tmp_path,))
    folders = {role: str(write_model(tmp_path / role)) for role in ("base", "instruct")}
    reading, go_on = threading.Event(), threading.Event()

    def read_slowly(folder):
        reading.set()
        assert go_on.wait(20)
        return read_checkpoint(folder)

    monkeypatch.setattr(core.pairs, "read_checkpoint", read_slowly)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(api.http.post, "/v1/pairs", json={"name": name, **folders})
        assert reading.wait(20)
        assert client.upload()  # on SQLite it would wait for the end of the other's transaction
        go_on.set()
        assert answer.result().status_code == 200


def test_a_folder_is_refused_with_the_remedy_where_no_roots_are_set(api, tmp_path):
    body = {"name": "local", "base": str(tmp_path), "instruct": "acme/b"}
    assert "SHADOWFT_MODEL_ROOTS" in told(api.http.post("/v1/pairs", json=body), 400, param="base")["message"]
