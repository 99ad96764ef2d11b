"""What a job would take, told before it is submitted, and without a trace of having been asked."""

from __future__ import annotations

import json

import huggingface_hub.constants
import pytest
from sqlalchemy import update

from api.routes import estimates
from core.models import File, Job, PhaseTime, Worker
from core.pairs import checked_pair, model_source, register
from tests import fake_hub
from tests.api.talk import Client, told, traces
from tests.conftest import BACKENDS
from tests.servers import run_api
from tests.worker.weights.made_checkpoints import cast, draw, save_model

REPORT = {
    "ok": True, "rows": 100, "characters": 60_000, "longest_row": {"number": 1, "characters": 900}, "warnings": {}
}  # fmt: skip
SHADOW = {"tuning": {"rank": 2}}
PARAMETERS = sum(tensor.numel() for tensor in draw(0).values())


@pytest.fixture(scope="module", params=BACKENDS)
def api(request, fresh_settings, tmp_path_factory):
    """With a local pair, `tiny`, and one of the Hub, `far`."""
    folder = tmp_path_factory.mktemp("estimates")
    base, instruct = (save_model(folder / name, cast(draw(seed))) for seed, name in enumerate(("base", "instruct")))
    with (
        fresh_settings(request.param, folder / "data", model_roots=(folder,)) as made,
        run_api(made) as ran,
        ran.database.writing() as session,
    ):
        for name, pair in (("tiny", (str(base), str(instruct))), ("far", ("acme/base", "acme/instruct"))):
            sources = [model_source(location, None) for location in pair]
            register(session, checked_pair(name=name, base=sources[0], instruct=sources[1], roots=(folder,)))
        session.commit()
        yield ran


@pytest.fixture
def checked(client):
    """A file of 100 rows, as the light worker would have left it."""
    return check(client, client.upload())


def check(client, file_id, **report):
    with client.api.database.writing() as session:
        session.execute(update(File).where(File.id == file_id).values(status="processed", report=REPORT | report))
        session.commit()
    return file_id


@pytest.fixture
def lanes(api):
    """`lanes(cpu=BYTES, ...)`: the workers that run; none before."""

    def run(**memory):
        with api.database.writing() as session:
            session.query(Worker).delete()
            for number, (device, memory_bytes) in enumerate(memory.items()):
                session.add(
                    Worker(
                        id=f"worker-{number}", host="h", pid=1, queue="jobs", device=device.replace("_", ":"),
                        lane_memory_bytes=memory_bytes, version="1",
                    )
                )  # fmt: skip
            session.commit()

    run()
    yield run
    run()


def ask(client, file_id, **fields):
    answer = client.http.post(
        "/fine_tuning/jobs/estimate", json={"model": "tiny", "training_file": file_id, "shadow": SHADOW} | fields
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def learn(client, file_id, *, tokens, seconds=100.0, **spec):
    """An earlier job on this file that took so long for every phase."""
    job_id = client.submit(file_id, model="tiny")
    client.finish(job_id, **spec)
    work = {"preparing": 0, "training": tokens, "grafting": 1000, "evaluating": 10, "publishing": 1000}
    with client.api.database.writing() as session:
        # The spec that `finish` writes cuts rows at 128 tokens.
        session.execute(update(Job).where(Job.id == job_id).values(spec=with_length(session.get_one(Job, job_id).spec)))
        for phase, amount in work.items():
            session.add(
                PhaseTime(
                    job_id=job_id, pair="tiny", tuning="lora", phase=phase, device="cpu", seconds=seconds,
                    busy_seconds=seconds, parameters=PARAMETERS, work=amount,
                )
            )  # fmt: skip
        session.commit()
    return job_id


def with_length(spec):
    return spec | {"tuning": spec["tuning"] | {"max_length": 4096}}


# --- what it tells ----------------------------------------------------------------------------------------------------


def test_rows_steps_and_every_auto_are_the_jobs_own(client, checked, lanes):
    told = ask(client, checked, hyperparameters={"n_epochs": 3})
    assert (told["rows"], told["rows_held_out"]) == (95, 5)
    assert told["hyperparameters"] == {"n_epochs": 3, "batch_size": 32, "learning_rate_multiplier": 1.0}
    assert told["steps"] == 3 * 3
    assert told["tuning"]["rank"] == 2
    assert told["tuning"]["alpha"] == 4
    assert (told["model"], told["pair"]) == ("tiny", "tiny")


def test_a_validation_file_leaves_all_rows_to_the_training(client, checked, lanes):
    other = check(client, client.upload(), rows=7)
    told = ask(client, checked, validation_file=other)
    assert (told["rows"], told["rows_held_out"]) == (100, 7)


def test_nothing_is_left_of_having_asked(api, client, checked, lanes):
    before = traces(api)
    ask(client, checked)
    assert traces(api) == before


def test_tokens_are_a_range_where_only_characters_are_known(client, checked, lanes):
    tokens = ask(client, checked)["tokens"]
    assert tokens["source"] == "characters"
    assert tokens["low"] < 57_000 / 4.2 < tokens["high"]  # plain English
    terse = ask(client, check(client, client.upload(), rows=100, characters=100))["tokens"]
    assert terse["low"] >= 4 * 95  # a chat format takes tokens, too
    short = ask(client, checked, shadow={"tuning": {"max_length": 64}})["tokens"]
    assert short["high"] == 64 * 95


def test_tokens_are_counted_where_a_job_trained_on_the_file(client, checked, lanes):
    learn(client, checked, tokens=11_400)  # of 57,000 characters
    assert ask(client, checked)["tokens"] == {"low": 11_400, "high": 11_400, "source": "counted"}
    all_rows = check(client, client.upload(), rows=1)
    assert ask(client, checked, validation_file=all_rows)["tokens"]["low"] == 12_000


def test_tokens_of_another_file_are_taken_from_those_that_were_counted(client, checked, lanes):
    learn(client, checked, tokens=11_400)
    tokens = ask(client, check(client, client.upload(), characters=600_000))["tokens"]
    assert tokens["source"] == "other_files"
    assert tokens["low"] < 114_000 < tokens["high"] < 140_000
    assert ask(client, checked, shadow={"tuning": {"max_length": 64}})["tokens"]["source"] == "characters"


def test_full_tuning_needs_more_memory_and_disk_than_lora(client, checked, lanes):
    lora, full, kept = (
        ask(client, checked, shadow=shadow)
        for shadow in (SHADOW, {"tuning": {"type": "full"}}, {"tuning": {"type": "full"}, "publish": {"delta": True}})
    )
    assert lora["memory_bytes"]["cpu"] < full["memory_bytes"]["cpu"]
    stored = 2 * PARAMETERS
    assert full["disk_bytes"]["artifacts"] == stored
    assert full["disk_bytes"]["workspace"] == 4 * PARAMETERS + stored
    assert kept["disk_bytes"]["artifacts"] == stored + 4 * PARAMETERS
    assert lora["disk_bytes"]["download"] == 0
    assert lora["disk_bytes"]["free"] > 0


def test_epochs_and_scales_cost_disk_for_their_checkpoints_and_grafts(client, checked, lanes):
    def disk(n_epochs, scales):
        shadow = SHADOW | {"evaluation": {"scales": scales}}
        return ask(client, checked, hyperparameters={"n_epochs": n_epochs}, shadow=shadow)["disk_bytes"]

    one, two, ten, fifty = disk(1, []), disk(2, []), disk(10, [0.5]), disk(50, [])
    adapter = two["artifacts"] - one["artifacts"]
    assert adapter > 0
    assert fifty["artifacts"] == ten["artifacts"] == one["artifacts"] + 3 * adapter  # no more are kept
    assert ten["workspace"] == fifty["workspace"] + 2 * PARAMETERS


# --- time and place ---------------------------------------------------------------------------------------------------


def test_without_a_worker_it_says_that_the_job_would_wait(client, checked, lanes):
    told = ask(client, checked)
    assert (told["lanes"], told["fits"], told["verdict"]) == ([], None, "warn")
    assert "no_worker" in {finding["code"] for finding in told["findings"] if finding["level"] == "warn"}


def test_each_lane_is_told_and_whether_it_holds_the_job(client, checked, lanes):
    lanes(cpu=1000, cuda_0=2**40)
    told = ask(client, checked)
    assert {lane["device"]: lane["fits"] for lane in told["lanes"]} == {"cpu": False, "cuda:0": True}
    assert told["fits"] is True
    lanes(cpu=1000)
    told = ask(client, checked)
    assert told["fits"] is False
    assert "does_not_fit" in {finding["code"] for finding in told["findings"]}


def test_without_an_earlier_job_the_time_is_unknown_and_it_says_why(client, checked, lanes):
    lanes(cuda_0=2**40)
    told = ask(client, checked)
    assert told["seconds"] is None
    assert "training" in told["seconds_unknown"]
    assert "cuda" in told["seconds_unknown"]


def test_time_comes_from_earlier_jobs_and_grows_with_the_epochs(client, checked, lanes):
    lanes(cpu=2**40)
    learn(client, checked, tokens=11_400)
    one, three = (ask(client, checked, hyperparameters={"n_epochs": n}) for n in (1, 3))
    assert one["seconds_unknown"] is None
    assert one["seconds"]["device"] == "cpu"
    assert one["seconds"]["phases"].keys() == {"preparing", "training", "grafting", "evaluating", "publishing"}
    assert one["seconds"]["phases"]["training"]["low"] < 100 < one["seconds"]["phases"]["training"]["high"]
    assert three["seconds"]["phases"]["training"]["low"] < 300 < three["seconds"]["phases"]["training"]["high"]
    assert one["seconds"]["low"] < sum(phase["high"] for phase in one["seconds"]["phases"].values())


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"training_file": "file-x"}, "training_file"),
        ({"n_epoch": 3}, "n_epoch"),
        ({"hyperparameters": {"n_epochs": "3"}}, "hyperparameters.n_epochs"),
        ({"shadow": {"tuning": {"rank": 5}}}, "shadow.tuning.rank"),
        ({"method": {"type": "dpo"}}, "method.type"),
    ],
)
def test_a_body_that_a_job_would_be_refused_for_is_refused_here_too(client, checked, lanes, fields, param):
    body = {"model": "tiny", "training_file": checked} | fields
    told(client.http.post("/fine_tuning/jobs/estimate", json=body), 400, param=param)


def test_an_unknown_model_is_not_found(client, checked, lanes):
    body = {"model": "tinny", "training_file": checked}
    told(client.http.post("/fine_tuning/jobs/estimate", json=body), 404, "model_not_found")


def test_a_file_that_is_still_being_checked_is_a_conflict(client, lanes):
    body = {"model": "tiny", "training_file": client.upload()}
    answer = client.http.post("/fine_tuning/jobs/estimate", json=body)
    told(answer, 409, "file_not_checked", "training_file")
    assert answer.headers["x-should-retry"] == "false"


def test_another_teams_file_is_absent(api, checked, lanes):
    other = Client(api, api.member())
    with other.http:
        told(
            other.http.post("/fine_tuning/jobs/estimate", json={"model": "tiny", "training_file": checked}),
            400,
            "file_not_found",
        )


def test_odd_rows_of_the_file_are_a_warning(client, lanes):
    told = ask(client, check(client, client.upload(), warnings={"duplicate": 3}))
    (finding,) = [finding for finding in told["findings"] if finding["code"] == "file_warnings"]
    assert "duplicate (3)" in finding["message"]


# --- models of the Hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(trouble)`: a Hub that serves the pair `far`, with this trouble."""
    with fake_hub.serve(tmp_path) as url:
        # What HF_ENDPOINT sets when the client is imported, in this process or in a child.
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

        def serve(**trouble):
            for seed, name in enumerate(("base", "instruct")):
                folder = save_model(tmp_path / "acme" / name, cast(draw(seed)))
                (folder / fake_hub.TROUBLE).write_text(json.dumps(trouble))

        yield serve


def test_a_models_headers_are_read_from_the_hub_and_its_download_is_counted(client, checked, lanes, hub):
    hub()
    told = ask(client, checked, model="far")
    assert told["disk_bytes"]["download"] == 2 * 2 * PARAMETERS
    assert told["memory_bytes"]["cpu"] > 2**30


def test_a_hub_that_does_not_answer_is_unavailable_within_seconds(client, checked, lanes, hub, monkeypatch):
    hub(silent=True)
    monkeypatch.setattr(estimates, "HEADER_SECONDS", 0.2)
    body = {"model": "far", "training_file": checked}
    answer = client.http.post("/fine_tuning/jobs/estimate", json=body)
    assert told(answer, 503, "hub_unavailable")["message"].endswith(". Try again later.")
    assert answer.headers["retry-after"]


def test_a_gated_model_leaves_unknown_what_its_headers_would_tell(client, checked, lanes, hub):
    hub(gated=True)
    lanes(cpu=2**40)
    told = ask(client, checked, model="far")
    assert (told["memory_bytes"], told["disk_bytes"], told["seconds"], told["fits"]) == (None,) * 4
    assert (told["steps"], told["verdict"]) == (3, "ok")
    assert {finding["code"] for finding in told["findings"]} == {"gated_model"}
