"""The edges of the contract: what is not offered, what is not yet offered, filters, errors that no handler wrote."""

from __future__ import annotations

import jsonschema_rs
import openai
import pytest

from core.ids import new_id
from core.jobs import NewEvent, add_events, put_back, record
from core.models import Artifact, Checkpoint, Job
from tests.api.talk import MODEL, routes, told
from tests.servers import PLAIN


@pytest.fixture(scope="module")
def schemas(api):
    return api.http.get("/openapi.json").json()["components"]["schemas"]


# --- what is not offered ----------------------------------------------------------------------------------------------

FOR_CHAT = ["/chat/completions", "/completions", "/responses", "/assistants", "/threads/x/runs", "/responses/x/cancel"]
ELSE = [
    *("/embeddings", "/moderations", "/batches", "/batches/x", "/evals", "/images/generations", "/audio/speech"),
    *("/vector_stores", "/containers", "/fine_tuning/alpha/graders/run", "/fine_tuning/alpha/graders/validate"),
    *("/fine_tuning/checkpoints/ft:a:b:c:d:ckpt-step-1/permissions", "/fine_tuning/checkpoints/a/b/permissions/cp_1"),
]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", FOR_CHAT + ELSE)
def test_what_is_not_offered_says_so_and_what_to_do_instead(client, path, method):
    error = told(client.http.request(method, path), 404, "not_offered")
    said, _, instead = error["message"].partition(". ")
    assert said.endswith("not offered by this server")
    assert instead
    assert ("vllm serve" in instead) or path not in FOR_CHAT


def test_nothing_of_it_stands_on_the_page_of_the_routes(api):
    openapi = api.http.get("/openapi.json").json()
    assert not {path for _, path in routes(openapi) for part in ("/chat", "/graders", "/permissions") if part in path}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:openai")
def test_the_sdk_hears_it_once(api, client):
    http_client = openai.DefaultHttpxClient(verify=PLAIN)
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key=client.member.key, http_client=http_client) as sdk:
        with pytest.raises(openai.NotFoundError, match="vllm serve"):
            sdk.chat.completions.create(model="ft:x", messages=[{"role": "user", "content": "Hi"}])
        with pytest.raises(openai.BadRequestError, match="not offered") as caught:
            sdk.fine_tuning.jobs.create(model=MODEL, training_file="file-x", method={"type": "dpo"})
    assert (caught.value.code, caught.value.param) == ("not_offered", "method.type")


@pytest.mark.parametrize("act", ["pause", "resume"])
def test_a_job_that_has_ended_is_refused_once_with_the_reason(client, act):
    job_id = client.submit()
    client.http.post(f"/fine_tuning/jobs/{job_id}/cancel")
    answer = client.http.post(f"/fine_tuning/jobs/{job_id}/{act}", headers={"content-type": "application/json"})
    error = told(answer, 409, f"job_not_{act.removesuffix('e')}able")
    assert answer.headers["x-should-retry"] == "false"
    assert "'cancelled'" in error["message"]
    told(client.http.post(f"/fine_tuning/jobs/ftjob-x/{act}"), 404, "job_not_found")


def test_a_waiting_job_is_paused_at_once_and_resumed_to_where_it_was(client):
    job_id = client.submit()
    route = f"/fine_tuning/jobs/{job_id}"
    for _ in range(2):
        assert client.http.post(f"{route}/pause").json()["status"] == "paused"
    assert client.http.get(route).json()["waiting_for"] is None
    for _ in range(2):
        assert client.http.post(f"{route}/resume").json()["status"] == "validating_files"


def test_a_running_job_is_pausing_until_its_worker_has_left_it(client):
    job_id = client.submit()
    held, route = client.start(job_id), f"/fine_tuning/jobs/{job_id}"
    before = client.http.get(route)
    assert client.http.post(f"{route}/pause").json()["status"] == "pausing"
    polled = client.http.get(route, headers={"if-none-match": before.headers["etag"]})
    assert (polled.status_code, polled.json()["status"]) == (200, "pausing")
    with client.api.database.writing() as session:
        put_back(session, held, None)
        session.commit()
    assert client.http.get(route).json()["status"] == "paused"
    assert client.http.post(f"{route}/resume").json()["status"] == "queued"
    client.http.post(f"{route}/cancel")


def test_a_job_run_again_is_a_new_one_and_is_made_once_for_a_key(client):
    job_id = client.submit(suffix="mine", seed=7)
    route = f"/fine_tuning/jobs/{job_id}/retry"
    told(client.http.post(route), 409, "job_not_retryable")
    client.http.post(f"/fine_tuning/jobs/{job_id}/cancel")
    first, second = (client.http.post(route, headers={"idempotency-key": "a"}).json() for _ in range(2))
    assert first == second
    assert (first["retry_of"], first["status"], first["seed"]) == (job_id, "validating_files", 7)
    assert first["user_provided_suffix"] == "mine"
    assert client.http.post(route, content=b"{", headers={"content-type": "application/json"}).status_code == 200
    assert client.http.post(route).json()["id"] not in {job_id, first["id"]}
    told(client.http.post("/fine_tuning/jobs/ftjob-x/retry"), 404, "job_not_found")


# --- lists ------------------------------------------------------------------------------------------------------------

KEYS = ['a"b', "a'b", "a\\b", "a.b", "$[0]", "é", "☃😀", "", " ", "a]b", "[", "%", "a\nb", '"']


@pytest.mark.parametrize("key", KEYS)
def test_a_job_is_found_by_metadata_of_any_name_and_value(client, key):
    file_id = client.upload()
    wanted = client.submit(file_id, metadata={key: "x y", "other": ""})
    client.submit(file_id, metadata={key: "z"})
    client.submit(file_id)

    def found(**metadata):
        query = {f"metadata[{name}]": value for name, value in metadata.items()}
        return [job["id"] for job in client.http.get("/fine_tuning/jobs", params=query).json()["data"]]

    assert found(**{key: "x y"}) == [wanted]
    assert found(**{key: "x y", "other": ""}) == [wanted]
    assert found(**{key: "x"}) == []
    assert found(**{key: ""}) == []


def test_metadata_is_a_map_or_null(client):
    told(client.http.get("/fine_tuning/jobs?metadata=x"), 400, param="metadata")
    without, _ = client.submit(), client.submit(metadata={})
    assert [job["id"] for job in client.http.get("/fine_tuning/jobs?metadata=null").json()["data"]][-1] == without


def test_events_of_metrics_keep_the_contracts_keys(client):
    job_id = client.submit()
    data = {"step": 1, "total_steps": 2, "train_loss": 1.5, "train_mean_token_accuracy": 0.5, "valid_loss": None}
    with client.api.database.writing() as session:
        add_events(session, job_id, [NewEvent("Step 1/2: training loss=1.50", type="metrics", data=data)])
        session.commit()
    for _ in range(2):
        event = client.http.get(f"/fine_tuning/jobs/{job_id}/events?limit=1").json()["data"][0]
        assert (event["type"], event["data"]) == ("metrics", data)


def test_a_running_job_says_how_far_it_is(client):
    job_id = client.submit()
    claim = client.start(job_id)
    with client.api.database.writing() as session:
        record(session, claim, progress={"step": 1, "total_steps": 4, "loss": 2.0})
        session.commit()
    job = client.http.get(f"/fine_tuning/jobs/{job_id}").json()
    assert (job["status"], job["phase"], job["progress"]["step"]) == ("running", "preparing", 1)
    assert job["progress"]["eta_seconds"] >= 0
    assert "estimated_finish" in job
    client.http.post(f"/fine_tuning/jobs/{job_id}/cancel")


def test_the_contracts_eight_states_are_documented(api):
    openapi = api.http.get("/openapi.json").json()
    eight = {"validating_files", "queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled"}
    for name in ("JobObject", "GraftObject"):
        assert set(openapi["components"]["schemas"][name]["properties"]["status"]["enum"]) == eight


def test_every_field_on_the_page_is_described(schemas):
    for name, schema in schemas.items():
        silent = [field for field, said in schema.get("properties", {}).items() if not said.get("description")]
        assert not silent, f"{name} says nothing about {silent}"


def test_every_example_on_the_page_fits_its_schema(api, schemas):
    checked = 0
    for name, schema in schemas.items():
        fields = schema.get("properties", {}).values()
        for described in (schema, *fields):
            for example in [*described.get("examples", []), *filter(None, [described.get("example")])]:
                problems = jsonschema_rs.iter_errors({**described, "components": {"schemas": schemas}}, example)
                assert not [problem.message for problem in problems], f"an example of {name}"
                checked += 1
    assert checked > 20


def test_examples_hold_their_nulls(schemas):
    file, job, check = (schemas[name] for name in ("FileObject", "JobObject", "PairCheckObject"))
    assert file["examples"][0]["status_details"] is None
    assert job["examples"][0]["finished_at"] is job["examples"][0]["error"] is None
    assert check["example"]["similarity"] is None


@pytest.mark.parametrize(
    ("path", "item"),
    [
        ("/files", "FileObject"),
        ("/fine_tuning/jobs", "JobObject"),
        ("/fine_tuning/jobs/{job_id}/events", "EventObject"),
        ("/fine_tuning/jobs/{job_id}/artifacts", "ArtifactObject"),
        ("/fine_tuning/jobs/{job_id}/checkpoints", "CheckpointObject"),
        ("/grafts", "GraftObject"),
        ("/pairs", "PairObject"),
    ],
)
def test_a_list_says_what_it_holds(api, schemas, path, item):
    answer = api.http.get("/openapi.json").json()["paths"][f"/v1{path}"]["get"]["responses"]["200"]
    page = schemas[answer["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]]
    assert page["properties"]["data"]["items"] == {"$ref": f"#/components/schemas/{item}"}


def test_every_route_can_break(api):
    for path, methods in api.http.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            assert "500" in operation["responses"], f"{method} {path}"


# --- errors that no handler wrote -------------------------------------------------------------------------------------


def test_every_method_that_a_path_takes_is_allowed(client):
    for path, allowed in [("/fine_tuning/jobs", "GET, POST"), ("/fine_tuning/jobs/x/pause", "POST")]:
        answer = client.http.patch(path)
        told(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == allowed


def test_every_route_refuses_a_query_that_nobody_reads(api, client):
    seen = 0
    for method, path in routes(api.http.get("/openapi.json").json()):
        if path.startswith("/v1/"):
            answer = client.http.request(method, path.removeprefix("/v1"), params={"nonsense": "1"})
            told(answer, 400, "unknown_parameter", "nonsense")
            seen += 1
    assert seen > 20


def test_an_error_that_a_library_wrote_gets_the_shape(api):
    told(api.http.get("/docs-scripts/nothing.js"), 404)
    told(api.http.post("/docs-scripts/nothing.js"), 405)


# --- grafts of checkpoints --------------------------------------------------------------------------------------------

FILES = {
    "adapter/adapter_config.json": b"{}",
    "adapter/adapter_model.safetensors": b"last",
    "model/w": b"w",
}


@pytest.fixture
def trained(client):
    """A LoRA job with a checkpoint at step 3; the job's and the checkpoint's ids."""
    job_id = client.submit()
    client.finish(job_id, FILES)
    checkpoint_id = new_id("ftckpt_")
    with client.api.database.writing() as session:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            session.add(
                Artifact(
                    id=new_id("art_"), job_id=job_id, team_id=client.member.team_id, kind="adapter", bytes=1,
                    path=f"checkpoints/step-3/{name}", sha256="3" * 64, storage_key=f"three/{name}",
                )
            )  # fmt: skip
        session.add(Checkpoint(id=checkpoint_id, job_id=job_id, step=3, metrics={}, folder="checkpoints/step-3"))
        session.commit()
    return job_id, checkpoint_id


def delta_of(client, graft_id):
    with client.api.database.reading() as session:
        return session.get_one(Job, graft_id).request["delta"]


def test_a_checkpoint_is_grafted_by_its_id_and_by_its_models_name(client, trained):
    job_id, checkpoint_id = trained
    model = client.http.get(f"/fine_tuning/jobs/{job_id}").json()["fine_tuned_model"]
    for source in (checkpoint_id, f"{model}:ckpt-step-3"):
        delta = delta_of(client, client.graft(source))
        assert (delta["kind"], delta["job_id"]) == ("adapter", job_id)
        assert [file["path"] for file in delta["files"]] == ["adapter_config.json", "adapter_model.safetensors"]
        assert {file["sha256"] for file in delta["files"]} == {"3" * 64}


def test_the_job_and_its_model_mean_what_it_learned_in_the_end(client, trained):
    job_id, _ = trained
    model = client.http.get(f"/fine_tuning/jobs/{job_id}").json()["fine_tuned_model"]
    for source in (job_id, model):
        assert {file["sha256"] for file in delta_of(client, client.graft(source))["files"]}.isdisjoint({"3" * 64})


def test_a_checkpoint_of_another_step_is_no_source(client, trained):
    job_id, _ = trained
    model = client.http.get(f"/fine_tuning/jobs/{job_id}").json()["fine_tuned_model"]
    answer = client.http.post("/grafts", json={"target": MODEL, "source": f"{model}:ckpt-step-4"})
    told(answer, 404, "source_not_found", "source")


def test_every_route_and_every_parameter_is_described(api):
    for path, methods in api.http.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (method, path)
            assert len(operation["description"]) > 10, (method, path)
            silent = [one["name"] for one in operation.get("parameters", []) if not one.get("description")]
            assert silent == [], (method, path)
