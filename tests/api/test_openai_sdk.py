"""The unmodified `openai` SDK over a real socket: what it sends is understood, what it gets is what it expects."""

from __future__ import annotations

import asyncio
import hashlib
import threading

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from core.jobs import NewEvent, add_events
from tests.api.talk import MODEL, ROW
from tests.servers import PLAIN

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:openai")


@pytest.fixture
def sent():
    """Every request that the SDK sent."""
    return []


@pytest.fixture
def sdk(api, client, sent):
    with sdk_of(api, client.member, sent) as made:
        yield made


def sdk_of(api, member, sent=None, **options):
    hooks = {"request": [(sent if sent is not None else []).append]}
    http_client = openai.DefaultHttpxClient(event_hooks=hooks, verify=PLAIN)
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key=member.key, http_client=http_client, **options)


@pytest.fixture
def strict(api, client):
    """It refuses an answer in which a required field is missing or has another type."""
    with sdk_of(api, client.member, _strict_response_validation=True) as made:
        yield made


def upload(sdk, content=ROW, name="rows.jsonl"):
    return sdk.files.create(file=(name, content), purpose="fine-tune")


def submit(sdk, **fields):
    if "training_file" not in fields:
        fields["training_file"] = upload(sdk).id
    return sdk.fine_tuning.jobs.create(model=MODEL, **fields)


def required(model):
    """The fields that the contract's spec requires: those that the SDK declares, optional values among them."""
    return {name for name, field in model.model_fields.items() if field.is_required() or field.default is None}


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_goes_up_and_comes_back_as_it_was(sdk, strict, client):
    content = ROW * 100
    file = upload(strict, content, "my rows.jsonl")
    assert (file.object, file.bytes, file.filename, file.purpose) == (
        "file",
        len(content),
        "my rows.jsonl",
        "fine-tune",
    )
    assert file.status == "uploaded"
    assert strict.files.retrieve(file.id) == file
    assert sdk.files.content(file.id).read() == content


def test_a_file_from_a_path_and_one_from_a_stream_go_up(sdk, tmp_path):
    path = tmp_path / "training.jsonl"
    path.write_bytes(ROW)
    assert sdk.files.create(file=path, purpose="fine-tune").filename == "training.jsonl"
    with path.open("rb") as stream:
        assert sdk.files.create(file=stream, purpose="fine-tune").bytes == len(ROW)


def test_files_are_listed_newest_first_and_pages_follow_each_other(strict):
    made = [upload(strict).id for _ in range(5)]
    assert [file.id for file in strict.files.list(limit=2)] == made[::-1]
    assert [file.id for file in strict.files.list(limit=2, order="asc")] == made
    assert strict.files.list(purpose="user_data").data == []


def test_waiting_for_a_file_ends_with_its_verdict(sdk, client):
    good, bad = upload(sdk), upload(sdk)
    client.check_file(good.id)
    client.check_file(bad.id, error="Row 1 has no messages.")
    assert sdk.files.wait_for_processing(good.id).status == "processed"
    checked = sdk.files.wait_for_processing(bad.id)
    assert (checked.status, checked.status_details) == ("error", "Row 1 has no messages.")
    assert checked.validation["rows"] == 1


def test_a_deleted_file_is_gone_from_the_disk_too(strict, api, client):
    stored = api.settings.storage_dir / "files" / client.member.team_id
    file = upload(strict)
    assert len(list(stored.iterdir())) == 1
    assert strict.files.delete(file.id).deleted is True
    assert list(stored.iterdir()) == []
    with pytest.raises(openai.NotFoundError):
        strict.files.retrieve(file.id)


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_a_job_carries_every_field_of_the_contract(strict):
    job = submit(strict, suffix="support", seed=7, metadata={"team": "a"})
    assert required(FineTuningJob) <= job.model_dump().keys() | {"estimated_finish"}
    assert (job.object, job.status, job.model, job.seed) == ("fine_tuning.job", "validating_files", MODEL, 7)
    assert (job.fine_tuned_model, job.finished_at, job.trained_tokens, job.error) == (None, None, None, None)
    assert (job.result_files, job.integrations, job.metadata) == ([], [], {"team": "a"})
    assert job.hyperparameters.n_epochs == "auto"
    assert job.method.type == "supervised"
    assert job.user_provided_suffix == "support"
    assert strict.fine_tuning.jobs.retrieve(job.id) == job


def test_a_seed_is_chosen_where_none_is_given(sdk):
    assert isinstance(submit(sdk).seed, int)


@pytest.mark.parametrize("place", ["method", "hyperparameters"])
def test_hyperparameters_are_taken_from_the_new_and_the_old_place(sdk, place):
    values = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 0.5}
    fields = {
        "hyperparameters": {"hyperparameters": values},
        "method": {"method": {"type": "supervised", "supervised": {"hyperparameters": values}}},
    }[place]
    job = submit(sdk, **fields)
    assert job.hyperparameters.to_dict() == values
    assert job.method.supervised.hyperparameters.to_dict() == values


def test_resolved_numbers_replace_auto_once_they_are_known(strict, client):
    job = submit(strict)
    client.admit(job.id)
    found = strict.fine_tuning.jobs.retrieve(job.id)
    assert found.status == "queued"
    assert (found.hyperparameters.n_epochs, found.hyperparameters.batch_size) == (1, 1)
    assert found.hyperparameters.learning_rate_multiplier == 1.0
    assert found.shadow["tuning"]["rank"] == 4


def test_what_is_ours_goes_both_ways_through_the_sdk(sdk):
    job = submit(sdk, extra_body={"shadow": {"strategy": "shadow", "graft": {"scale": 0.5}}})
    defaults = {"scope": "linear", "include": [], "exclude": [], "output_dtype": "auto"}
    assert job.shadow["graft"] == {"scale": 0.5, **defaults}
    assert (job.pair, job.phase, job.attempt) == (MODEL, None, 0)


@pytest.mark.parametrize("model", [MODEL, "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B"])
def test_a_model_is_named_by_its_pair_its_instruct_or_its_base_and_echoed(sdk, model):
    job = sdk.fine_tuning.jobs.create(model=model, training_file=upload(sdk).id)
    assert (job.model, job.pair) == (model, MODEL)


def test_jobs_are_paged_through_to_the_end(strict):
    file_id = upload(strict).id
    made = [submit(strict, training_file=file_id).id for _ in range(5)]
    page = strict.fine_tuning.jobs.list(limit=2)
    assert (len(page.data), page.has_more) == (2, True)
    assert [job.id for job in page] == made[::-1]
    assert [job.id for job in strict.fine_tuning.jobs.list(limit=2, after=made[3])] == made[2::-1]


def test_a_page_is_stable_while_new_jobs_arrive(sdk):
    file_id = upload(sdk).id
    made = [submit(sdk, training_file=file_id).id for _ in range(4)]
    first = sdk.fine_tuning.jobs.list(limit=2)
    submit(sdk, training_file=file_id)
    assert [job.id for job in first.get_next_page().data] == made[1::-1]


def test_jobs_are_found_by_their_metadata(sdk):
    file_id = upload(sdk).id
    both = submit(sdk, training_file=file_id, metadata={"team": "a", "run": "1"}).id
    one = submit(sdk, training_file=file_id, metadata={"team": "a", "a key.with $[0]": "x y"}).id
    none = submit(sdk, training_file=file_id).id
    listed = sdk.fine_tuning.jobs.list
    assert [job.id for job in listed(metadata={"team": "a"})] == [one, both]
    assert [job.id for job in listed(metadata={"team": "a", "run": "1"})] == [both]
    assert [job.id for job in listed(metadata={"team": "b"})] == []
    assert [job.id for job in listed(metadata={"absent": "x"})] == []
    assert [job.id for job in listed(metadata={"a key.with $[0]": "x y"})] == [one]
    assert [job.id for job in listed(extra_query={"metadata": "null"})] == [none]


def test_events_are_listed_newest_first_page_by_page(strict, api):
    job = submit(strict)
    with api.database.writing() as session:
        add_events(session, job.id, [NewEvent("Step 1/2: training loss=1.5", type="metrics", data={"step": 1})])
        session.commit()
    events = list(strict.fine_tuning.jobs.list_events(job.id, limit=1))
    assert [event.message for event in events[1:]] == [
        f"Validating training file: {job.training_file}",
        f"Created fine-tuning job: {job.id}",
    ]
    assert (events[0].type, events[0].data, events[0].level) == ("metrics", {"step": 1}, "info")
    assert required(FineTuningJobEvent) <= events[0].model_dump().keys()


def test_a_job_is_cancelled_once_and_again(strict):
    job = submit(strict)
    cancelled = strict.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled"
    assert cancelled.finished_at >= cancelled.created_at
    assert strict.fine_tuning.jobs.cancel(job.id) == cancelled


def test_a_running_job_is_asked_to_end_and_says_so(strict, client):
    job = submit(strict)
    client.start(job.id)
    asked = strict.fine_tuning.jobs.cancel(job.id)
    assert (asked.status, asked.phase) == ("running", "cancelling")


def test_a_success_names_its_model_and_its_files(strict, client):
    job = submit(strict)
    client.finish(job.id, {"model/config.json": b"{}", "model/w.safetensors": b"w" * 1000})
    done = strict.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.trained_tokens, done.error) == ("succeeded", 7, None)
    assert done.fine_tuned_model.startswith("ft:")
    assert strict.files.retrieve(done.result_files[0]).purpose == "fine-tune-results"
    listed = client.http.get(f"/fine_tuning/jobs/{job.id}/artifacts", params={"kind": "model"}).json()["data"]
    assert {artifact["path"] for artifact in listed} == {"model/config.json", "model/w.safetensors"}
    for artifact in listed:
        content = client.http.get(f"/artifacts/{artifact['id']}/content").content
        assert hashlib.sha256(content).hexdigest() == artifact["sha256"]
        assert client.http.get(f"/artifacts/{artifact['id']}").json() == artifact
    assert client.http.get(f"/fine_tuning/jobs/{job.id}/evaluation").json() == {"verdict": "better"}
    assert done.graft_result == {"fidelity": 1.0}


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_wrong_value_is_a_bad_request_with_its_place(sdk, sent):
    with pytest.raises(openai.BadRequestError) as caught:
        submit(sdk, training_file="file-x", hyperparameters={"n_epochs": 0})
    error = caught.value
    assert (error.code, error.param, error.type) == (
        "invalid_value",
        "hyperparameters.n_epochs",
        "invalid_request_error",
    )
    assert error.request_id == error.response.headers["x-request-id"]
    assert len(sent) == 1


def test_an_unknown_id_is_not_found(sdk):
    for call in (sdk.files.retrieve, sdk.files.delete, sdk.fine_tuning.jobs.retrieve, sdk.fine_tuning.jobs.cancel):
        with pytest.raises(openai.NotFoundError):
            call("file-unknown")


def test_a_wrong_key_is_an_authentication_error(api, client):
    with sdk_of(api, client.member) as sdk, pytest.raises(openai.AuthenticationError) as caught:
        sdk.with_options(api_key="sft_x").files.list()
    assert caught.value.code == "invalid_api_key"


def test_an_admins_act_by_somebody_else_is_denied(sdk):
    with pytest.raises(openai.PermissionDeniedError):
        sdk.post("/pairs", cast_to=object, body={"name": "x", "base": "a/b", "instruct": "a/c"})


def conflict_of_cancel(sdk, client):
    job = submit(sdk)
    client.finish(job.id)
    return lambda: sdk.fine_tuning.jobs.cancel(job.id)


def conflict_of_delete(sdk, client):
    job = submit(sdk)
    return lambda: sdk.files.delete(job.training_file)


def conflict_of_evaluation(sdk, client):
    job = submit(sdk)
    return lambda: sdk.get(f"/fine_tuning/jobs/{job.id}/evaluation", cast_to=object)


def conflict_of_report(sdk, client):
    file = upload(sdk)
    return lambda: sdk.get(f"/files/{file.id}/report", cast_to=object)


@pytest.mark.parametrize("make", [conflict_of_cancel, conflict_of_delete, conflict_of_evaluation, conflict_of_report])
def test_a_conflict_is_told_once_and_not_tried_again(sdk, client, sent, make):
    call = make(sdk, client)
    sent.clear()
    with pytest.raises(openai.ConflictError):
        call()
    assert len(sent) == 1


def test_many_clients_at_once_lose_nothing(api, client):
    file_id, made = client.upload(), []

    def work():
        with sdk_of(api, client.member) as sdk:
            made.extend(submit(sdk, training_file=file_id).id for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with sdk_of(api, client.member) as sdk:
        assert sorted(job.id for job in sdk.fine_tuning.jobs.list(limit=7)) == sorted(made)
    assert len(made) == 30


def test_the_asynchronous_client_works_as_well(api, client):
    async def talk():
        async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key=client.member.key) as sdk:
            file = await sdk.files.create(file=("rows.jsonl", ROW), purpose="fine-tune")
            job = await sdk.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
            return [found.id async for found in sdk.fine_tuning.jobs.list()], job.id

    listed, job_id = asyncio.run(talk())
    assert listed == [job_id]


def test_raw_responses_carry_the_contracts_headers(sdk):
    answer = sdk.fine_tuning.jobs.with_raw_response.list()
    assert answer.headers["x-request-id"].startswith("req_")
    assert int(answer.headers["openai-processing-ms"]) >= 0
    assert answer.parse().data == []
