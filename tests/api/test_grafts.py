"""POST /v1/grafts: what is taken, what is refused and why, and what a client sees of a graft."""

from __future__ import annotations

import json

import httpx
import pytest
from openai import OpenAI

from core.errors import Cause
from core.jobs import refuse
from core.models import Job
from tests.api.talk import MODEL, Client, as_json, told, traces

ADAPTER = {"adapter/adapter_config.json": b"{}", "adapter/adapter_model.safetensors": b"factors", "model/w": b"w"}
DELTA = {"delta/delta.json": b"{}", "delta/delta.safetensors": b"change", "model/w": b"w"}


@pytest.fixture
def source(client):
    """A LoRA job that has succeeded."""
    job_id = client.submit()
    client.finish(job_id, ADAPTER)
    return job_id


def artifact(client, job_id, kind):
    return client.http.get(f"/fine_tuning/jobs/{job_id}/artifacts", params={"kind": kind}).json()["data"][0]["id"]


def body(source="ftjob-x", **fields):
    return json.dumps({"target": MODEL, "source": source, **fields})


def test_a_graft_shows_what_was_asked_for(client, source):
    options = {"scale": -0.5, "scope": "all", "include": ["*.mlp.*"], "exclude": ["*.0.*"], "output_dtype": "float32"}
    answer = client.http.post(
        "/grafts",
        json={"target": MODEL, "source": source, "suffix": "mild", "metadata": {"why": "test"}, **options},
    )
    graft = answer.json()
    assert graft["id"].startswith("ftjob-")
    assert (graft["object"], graft["status"], graft["target"], graft["pair"]) == (
        "graft",
        "validating_files",
        MODEL,
        MODEL,
    )
    assert (graft["source"], graft["source_job"], graft["options"]) == (source, source, options)
    assert (graft["metadata"], graft["user_provided_suffix"]) == ({"why": "test"}, "mild")
    assert (graft["fine_tuned_model"], graft["graft_result"], graft["error"], graft["finished_at"]) == (None,) * 4
    assert "queue 'light'" in graft["waiting_for"]
    found = client.http.get(f"/grafts/{graft['id']}")
    assert found.json() == graft


def test_what_is_grafted_is_kept_with_its_hashes(client, source):
    graft_id = client.graft(source)
    with client.api.database.reading() as session:
        job = session.get_one(Job, graft_id)
        origin = session.get_one(Job, source)
    delta = job.request["delta"]
    assert (delta["kind"], delta["job_id"]) == ("adapter", source)
    assert [file["path"] for file in delta["files"]] == ["adapter_config.json", "adapter_model.safetensors"]
    assert {len(file["sha256"]) for file in delta["files"]} == {64}
    assert (job.seed, job.training_file_id, job.files) == (origin.seed, origin.training_file_id, origin.files)


def test_a_source_may_be_an_artifact(client, source):
    assert (
        client.http.get(f"/grafts/{client.graft(artifact(client, source, 'adapter'))}").json()["source_job"] == source
    )
    full = client.submit()
    client.finish(full, DELTA, tuning="full")
    graft = client.http.get(f"/grafts/{client.graft(artifact(client, full, 'delta'))}").json()
    assert (graft["source"][:4], graft["source_job"]) == ("art_", full)


def test_the_two_kinds_have_lists_of_their_own(client, source):
    grafts = [client.graft(source) for _ in range(3)]
    assert [job["id"] for job in client.http.get("/fine_tuning/jobs").json()["data"]] == [source]
    first = client.http.get("/grafts?limit=2").json()
    rest = client.http.get("/grafts", params={"limit": 2, "after": first["last_id"]}).json()
    assert [graft["id"] for graft in first["data"] + rest["data"]] == grafts[::-1]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    told(client.http.get("/grafts", params={"after": source}), 400, param="after")
    told(client.http.get("/fine_tuning/jobs", params={"after": grafts[0]}), 400, param="after")
    told(client.http.get(f"/grafts/{source}"), 404, "graft_not_found")


def test_a_graft_is_followed_and_cancelled_as_a_job_by_the_sdk(api, client, source):
    """With an SDK that checks every field of an answer."""
    sdk = OpenAI(base_url=f"{api.url}/v1", api_key=client.member.key, max_retries=0, _strict_response_validation=True)
    graft_id = client.graft(source, scale=0.5)

    job = sdk.fine_tuning.jobs.retrieve(graft_id)
    said = [event.message for event in sdk.fine_tuning.jobs.list_events(graft_id)]

    assert (job.object, job.kind, job.model, job.shadow["graft"]["scale"]) == ("fine_tuning.job", "graft", MODEL, 0.5)
    assert said[::-1] == [
        f"Created graft job: {graft_id}",
        f"Checking that what {source} learned fits {MODEL}",
    ]
    assert sdk.fine_tuning.jobs.cancel(graft_id).status == "cancelled"
    assert client.http.get(f"/grafts/{graft_id}").json()["status"] == "cancelled"


def test_a_success_shows_its_figures_and_its_files(client, source):
    graft_id = client.graft(source)
    client.finish(graft_id, {"model/w": b"grafted"}, kind="graft")
    graft = client.http.get(f"/grafts/{graft_id}").json()
    assert (graft["status"], graft["graft_result"]) == ("succeeded", {"fidelity": 1.0})
    assert graft["fine_tuned_model"].startswith("ft:")
    listed = client.http.get(f"/fine_tuning/jobs/{graft_id}/artifacts").json()["data"]
    assert [one["path"] for one in listed] == ["model/w"]
    assert client.http.get(f"/fine_tuning/jobs/{graft_id}/evaluation").json() == {"verdict": "better"}


def test_a_comparison_that_was_left_out_says_why(client, source):
    graft_id = client.graft(source, evaluation={"compare": False})
    client.finish(graft_id, {"model/w": b"w"}, evaluation=None, kind="graft", left_out="it was not asked for")
    answer = client.http.get(f"/fine_tuning/jobs/{graft_id}/evaluation")
    assert "compared no models: it was not asked for." in told(answer, 409, "evaluation_left_out")["message"]


def test_the_data_of_a_graft_that_compares_cannot_be_deleted_under_it(client):
    file_id = client.upload()
    source = client.submit(file_id)
    client.finish(source, ADAPTER)
    graft_id = client.graft(source)
    told(client.http.delete(f"/files/{file_id}"), 409, "file_in_use")
    client.http.post(f"/fine_tuning/jobs/{graft_id}/cancel")
    client.graft(source, evaluation={"compare": False})
    assert client.http.delete(f"/files/{file_id}").status_code == 200


WRONG = {
    "scale 3": ({"scale": 3}, "scale"),
    "scale a word": ({"scale": "1"}, "scale"),
    "scope a word": ({"scope": "some"}, "scope"),
    "dtype a word": ({"output_dtype": "float16"}, "output_dtype"),
    "pattern empty": ({"include": [""]}, "include.0"),
    "pattern a number": ({"exclude": [1]}, "exclude.0"),
    "33 patterns": ({"include": ["*"] * 33}, "include"),
    "target empty": ({"target": ""}, "target"),
    "source null": ({"source": None}, "source"),
    "source long": ({"source": "x" * 301}, "source"),
    "suffix with a path": ({"suffix": "../x"}, "suffix"),
    "metadata of 17": ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    "rows 0": ({"evaluation": {"max_rows": 0}}, "evaluation.max_rows"),
    "nine scales": ({"evaluation": {"scales": [0] * 9}}, "evaluation.scales"),
    "scales for nothing": ({"evaluation": {"scales": [0.5], "compare": False}}, "evaluation"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_named(api, client, case):
    fields, param = WRONG[case]
    before = traces(api)
    told(client.http.post("/grafts", **as_json(body(**fields))), param=param)
    assert traces(api) == before


def test_missing_and_misspelt_fields_are_named(client):
    told(client.http.post("/grafts", json={"source": "x"}), code="missing_required_parameter", param="target")
    error = told(client.http.post("/grafts", **as_json(body(scal=1))), code="unknown_parameter")
    assert "Did you mean 'scale'?" in error["message"]


def test_an_unknown_target_is_named(client, source):
    answer = client.http.post("/grafts", json={"target": "qwen2.5-0.5", "source": source})
    assert "Did you mean 'qwen2.5-0.5b'" in told(answer, 404, "model_not_found", "target")["message"]


def refused(client, source, status, code):
    before = traces(client.api)
    error = told(client.http.post("/grafts", **as_json(body(source))), status, code, "source")
    assert traces(client.api) == before
    return error["message"]


@pytest.fixture
def stranger(api):
    made = Client(api, api.member())
    with made.http:
        yield made


def test_the_source_of_another_team_is_as_absent_as_one_that_never_was(client, source, stranger):
    never = refused(stranger, "never-was", 404, "source_not_found")
    for foreign in (source, artifact(client, source, "adapter")):
        assert refused(stranger, foreign, 404, "source_not_found").replace(foreign, "never-was") == never


def test_a_job_that_has_not_succeeded_is_no_source(client):
    waiting, failed = client.submit(), client.submit()
    with client.api.database.writing() as session:
        assert refuse(session, failed, Cause(code="some_code", message="It broke."))
        session.commit()
    assert "'validating_files'" in refused(client, waiting, 409, "source_not_succeeded")
    assert "'failed'" in refused(client, failed, 409, "source_not_succeeded")


def test_a_refusal_of_ours_is_said_in_our_words(client):
    evaluation = {"scales": [0.5], "compare": False}
    error = told(
        client.http.post("/grafts", **as_json(body(evaluation=evaluation))), 400, "invalid_value", "evaluation"
    )
    assert error["message"].startswith("Invalid value for 'evaluation': further scales are grafted to be compared;")


def test_every_field_of_a_graft_is_described(api):
    schemas = httpx.get(f"{api.url}/openapi.json", timeout=60).json()["components"]["schemas"]
    for name in ("GraftRequest", "GraftEvaluation", "GraftObject"):
        silent = [field for field, said in schemas[name]["properties"].items() if not said.get("description")]
        assert not silent, f"{name} says nothing about {silent}"


def test_a_graft_is_no_source_and_names_the_job_that_is(client, source):
    graft_id = client.graft(source)
    client.finish(graft_id, {"model/w": b"w"}, kind="graft")
    assert source in refused(client, graft_id, 400, "source_is_a_graft")
    assert source in refused(client, artifact(client, graft_id, "model"), 400, "source_is_a_graft")


def test_full_tuning_without_its_delta_says_how_to_publish_it(client):
    job_id = client.submit()
    client.finish(job_id, tuning="full")
    assert '{"publish": {"delta": true}}' in refused(client, job_id, 400, "delta_not_published")


def test_an_artifact_of_another_kind_is_no_source(client, source):
    assert "of the kind 'model'" in refused(client, artifact(client, source, "model"), 400, "invalid_value")
