"""Models and checkpoints over HTTP: listed, found by any of their names, deleted whole."""

from __future__ import annotations

import openai
import pytest

from core.ids import new_id
from core.models import Artifact, Checkpoint, Job
from tests.api.talk import MODEL, told
from tests.api.test_openai_sdk import sdk_of

INSTRUCT = "Qwen/Qwen2.5-0.5B-Instruct"
FILES = {
    "model/w.safetensors": b"w" * 100,
    "model/config.json": b"{}",
    "adapter/adapter_model.safetensors": b"a",
    "report.json": b"{}",
}


@pytest.fixture
def sdk(api, client):
    with sdk_of(api, client.member) as made:
        yield made


@pytest.fixture
def strict(api, client):
    with sdk_of(api, client.member, _strict_response_validation=True) as made:
        yield made


def finished(client, **fields):
    job_id = client.submit(**fields)
    client.finish(job_id, FILES)
    return job_id, client.http.get(f"/fine_tuning/jobs/{job_id}").json()["fine_tuned_model"]


def add_checkpoints(client, job_id, *steps):
    """Rows of epochs' ends, the last one the adapter's."""
    ids = [new_id("ftckpt_") for _ in steps]
    with client.api.database.writing() as session:
        for checkpoint_id, step in zip(ids, steps, strict=True):
            folder = "adapter" if step == max(steps) else f"checkpoints/step-{step}"
            metrics = {"step": step, "train_loss": 1 / step}
            session.add(Checkpoint(id=checkpoint_id, job_id=job_id, step=step, metrics=metrics, folder=folder))
        session.commit()
    return ids


def stored(client, job_id):
    folder = client.api.settings.storage_dir / "jobs" / job_id
    return {path.name for path in folder.rglob("*") if path.is_file()}


# --- models -----------------------------------------------------------------------------------------------------------


def test_the_list_begins_with_the_teams_models_newest_first_and_goes_on_with_the_pairs(strict, client):
    made = [finished(client)[1] for _ in range(2)]
    listed = strict.models.list().data
    assert [model.id for model in listed[:2]] == made[::-1]
    assert MODEL in {model.id for model in listed[2:]}
    assert {model.kind for model in listed[2:]} == {"pair"}
    assert (listed[0].owned_by, listed[0].bytes) == (client.member.team_id, 102)


@pytest.mark.parametrize("model", [MODEL, INSTRUCT, "Qwen/Qwen2.5-0.5B"])
def test_a_model_of_a_pair_is_found_by_each_name_that_a_job_takes(strict, client, model):
    found = strict.models.retrieve(model)
    assert (found.id, found.pair, found.instruct) == (model, MODEL, INSTRUCT)
    raw = client.http.get(f"/models/{model}")  # as openai 1.x sends it
    assert raw.json() == found.to_dict()


def test_a_fine_tuned_model_is_found_by_its_name(strict, client):
    job_id, name = finished(client)
    found = strict.models.retrieve(name)
    assert (found.id, found.kind, found.job_id, found.checkpoint_id) == (name, "fine_tuned", job_id, None)
    assert found.created > 0


def test_a_checkpoints_name_is_found_as_what_it_is(strict, client):
    job_id, name = finished(client)
    (checkpoint_id,) = add_checkpoints(client, job_id, 12)
    found = strict.models.retrieve(f"{name}:ckpt-step-12")
    assert (found.kind, found.job_id, found.checkpoint_id) == ("checkpoint", job_id, checkpoint_id)


@pytest.mark.parametrize("name", ["nothing", "a/b", "ft:tiny:blue::x", "ft:x:ckpt-step-1", "x:ckpt-step-9999999999999"])
def test_an_unknown_model_is_not_found(client, name):
    told(client.http.get(f"/models/{name}"), 404, "model_not_found")
    told(client.http.delete(f"/models/{name}"), 404, "model_not_found")


def test_another_teams_model_is_absent(api, client, sdk):
    job_id, name = finished(client)
    add_checkpoints(client, job_id, 3)
    with sdk_of(api, api.member()) as other:
        assert name not in {model.id for model in other.models.list()}
        for call in (other.models.retrieve, other.models.delete):
            for each in (name, f"{name}:ckpt-step-3"):
                with pytest.raises(openai.NotFoundError):
                    call(each)
    assert sdk.models.retrieve(name).id == name


def test_a_model_of_a_job_that_has_not_succeeded_is_none(client):
    job_id = client.submit()
    client.start(job_id)
    assert [one for one in client.http.get("/models").json()["data"] if one["kind"] != "pair"] == []


# --- deleting ---------------------------------------------------------------------------------------------------------


def test_a_deleted_model_is_gone_with_all_that_was_learned_and_its_job_stays(strict, client):
    job_id, name = finished(client)
    add_checkpoints(client, job_id, 1, 2)
    assert strict.models.delete(name).deleted is True

    assert stored(client, job_id) == {"report.json"}
    kept = client.http.get(f"/fine_tuning/jobs/{job_id}/artifacts").json()["data"]
    assert [artifact["path"] for artifact in kept] == ["report.json"]
    assert client.http.get(f"/fine_tuning/jobs/{job_id}/checkpoints").json()["data"] == []
    job = strict.fine_tuning.jobs.retrieve(job_id)
    assert (job.status, job.fine_tuned_model) == ("succeeded", name)
    for call in (strict.models.retrieve, strict.models.delete):
        with pytest.raises(openai.NotFoundError):
            call(name)


def test_nothing_is_grafted_from_a_deleted_model(client):
    job_id, name = finished(client)
    assert client.http.delete(f"/models/{name}").status_code == 200
    answer = client.http.post("/grafts", json={"target": MODEL, "source": job_id})
    assert answer.status_code in {400, 404, 409}
    assert "delete" in answer.json()["error"]["message"]


def test_a_model_whose_change_a_graft_reads_is_in_conflict_until_it_has_ended(sdk, client):
    job_id, name = finished(client)
    graft = client.graft(job_id)
    with pytest.raises(openai.ConflictError, match=graft):
        sdk.models.delete(name)
    assert len(stored(client, job_id)) == len(FILES)
    client.http.post(f"/fine_tuning/jobs/{graft}/cancel")
    assert sdk.models.delete(name).deleted


def test_a_grafted_model_can_be_deleted_and_its_source_stays(client):
    job_id, name = finished(client)
    graft = client.graft(job_id)
    client.finish(graft, {"model/w": b"w"}, kind="graft")
    grafted = client.http.get(f"/grafts/{graft}").json()["fine_tuned_model"]
    assert client.http.delete(f"/models/{grafted}").json() == {"id": grafted, "object": "model", "deleted": True}
    assert client.http.get(f"/models/{name}").status_code == 200


@pytest.mark.parametrize("model", [MODEL, INSTRUCT])
def test_a_pairs_model_is_nobodys_to_delete(client, model):
    error = told(client.http.delete(f"/models/{model}"), 403, "model_not_deletable")
    assert MODEL in error["message"]


def test_a_checkpoint_is_not_deleted_alone(client):
    job_id, name = finished(client)
    add_checkpoints(client, job_id, 5)
    error = told(client.http.delete(f"/models/{name}:ckpt-step-5"), 403, "model_not_deletable")
    assert name in error["message"]


def test_a_deletion_that_fails_leaves_all_of_it(client, monkeypatch):
    """The bytes go only once the rows are gone for good."""
    job_id, name = finished(client)
    monkeypatch.setattr("sqlalchemy.orm.Session.commit", _break)
    told(client.http.delete(f"/models/{name}"), 500)
    monkeypatch.undo()
    assert len(stored(client, job_id)) == len(FILES)
    assert client.http.get(f"/models/{name}").status_code == 200


def _break(_session):
    raise RuntimeError("the commit failed")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_are_listed_newest_first_page_by_page(strict, client):
    job_id, name = finished(client)
    ids = add_checkpoints(client, job_id, 10, 20, 30)
    listed = strict.fine_tuning.jobs.checkpoints.list(job_id, limit=2)
    assert ([one.id for one in listed.data], listed.has_more) == ([ids[2], ids[1]], True)
    assert (listed.first_id, listed.last_id) == (ids[2], ids[1])
    assert [one.step_number for one in listed] == [30, 20, 10]
    first = listed.data[0]
    assert (first.object, first.fine_tuning_job_id) == ("fine_tuning.job.checkpoint", job_id)
    assert first.fine_tuned_model_checkpoint == f"{name}:ckpt-step-30"
    assert (first.metrics.step, first.metrics.train_loss, first.metrics.valid_loss) == (30, 1 / 30, None)


def test_the_ids_of_checkpoints_stay_the_same(strict, client):
    job_id, _ = finished(client)
    add_checkpoints(client, job_id, 10, 20)
    first, second = (strict.fine_tuning.jobs.checkpoints.list(job_id).data for _ in range(2))
    assert first == second


def test_a_cursor_of_another_job_is_an_error(client):
    job_id, _ = finished(client)
    other, _ = finished(client)
    (checkpoint_id,) = add_checkpoints(client, other, 1)
    for after in (checkpoint_id, "ftckpt_x"):
        told(client.http.get(f"/fine_tuning/jobs/{job_id}/checkpoints", params={"after": after}), 400, param="after")


def test_a_job_without_checkpoints_has_an_empty_list(client):
    answer = client.http.get(f"/fine_tuning/jobs/{client.submit()}/checkpoints").json()
    assert answer == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


def test_a_checkpoint_is_grafted_by_its_name_and_by_its_id(client):
    job_id, name = finished(client)
    early, _ = add_checkpoints(client, job_id, 1, 2)
    with client.api.database.writing() as session:
        published = session.get_one(Job, job_id)
        path = "checkpoints/step-1/adapter_model.safetensors"
        session.add(
            Artifact(
                id=new_id("art_"), job_id=job_id, team_id=published.team_id, kind="adapter", path=path, bytes=1,
                sha256="0" * 64, storage_key=path,
            )
        )  # fmt: skip
        session.commit()
    for source in (early, f"{name}:ckpt-step-1"):
        assert grafted_files(client, client.graft(source)) == [("adapter_model.safetensors", path)]
    for source in (job_id, f"{name}:ckpt-step-2"):  # the last one is what the job published
        ((_, key),) = grafted_files(client, client.graft(source))
        assert key.endswith("adapter/adapter_model.safetensors")


def grafted_files(client, graft):
    with client.api.database.reading() as session:
        request = session.get_one(Job, graft).request
    return [(file["path"], file["storage_key"]) for file in request["delta"]["files"]]
