"""`shadowft jobs` against a real server: in this process where it can be, as a child where signals matter."""

from __future__ import annotations

import fcntl
import io
import json
import resource
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from sqlalchemy import update

from core import jobs
from core.errors import Cause
from core.jobs import NewEvent
from core.models import Artifact
from core.storage import LocalStorage
from tests.api.talk import MODEL, ROW
from tests.console import child, on_a_terminal
from tests.servers import die_with_parent, ended, wait_until
from tests.wire import Trouble

pytestmark = pytest.mark.parametrize("api", ["sqlite"], indirect=True)

EVALUATION = {
    "variants": ["instruct", "base_tuned", "grafted@1", "grafted@0.5"],
    "published": "grafted@1",
    "sets": {
        "validation": {
            "rows": 20,
            "exact_match_measured": True,
            "results": {
                "instruct": {"loss": 3.0, "exact_match": 0.1},
                "base_tuned": {"loss": 0.5, "exact_match": 0.9},
                "grafted@1": {"loss": 0.75, "exact_match": 0.8},
                "grafted@0.5": {"loss": 1.25, "exact_match": 0.5},
            },
        }
    },
    "verdict": {"summary": "The grafted model does better."},
}


@pytest.fixture
def env(monkeypatch, client):
    """For a child: the same server and team."""
    return {"SHADOWFT_URL": client.api.url, "SHADOWFT_API_KEY": client.member.key}


def listed(client):
    return client.http.get("/fine_tuning/jobs").json()["data"]


# --- create -----------------------------------------------------------------------------------------------------------


def test_every_option_stands_in_the_request(ours, client):
    training, validation = client.upload(), client.upload()
    done = ours(
        "jobs", "create", "--model", MODEL, "--training-file", training, "--validation-file", validation,
        "--suffix", "a",
        "--seed", 7, "--metadata", "team=blue", "--metadata", "run=a=b", "--epochs", 2, "--batch-size", 4,
        "--learning-rate-multiplier", 0.5, "--tuning", "full", "--learning-rate", 1e-4, "--max-length", 64,
        "--scale", 0.75, "--scope", "all", "--scales", "0.5,1", "--probe", f"old={validation}", "--publish-delta",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert f"shadowft jobs watch {done.out.strip()}" in done.err
    (job,) = listed(client)
    assert job["id"] == done.out.strip()
    shown = [job[name] for name in ("model", "training_file", "validation_file", "user_provided_suffix", "seed")]
    assert shown == [MODEL, training, validation, "a", 7]
    assert job["metadata"] == {"team": "blue", "run": "a=b"}
    assert job["hyperparameters"] == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
    shadow = job["shadow"]
    assert (shadow["strategy"], shadow["publish"]) == ("shadow", {"delta": True})
    assert [shadow["tuning"][name] for name in ("type", "learning_rate", "max_length")] == ["full", 1e-4, 64]
    assert [shadow["graft"][name] for name in ("scale", "scope")] == [0.75, "all"]
    assert shadow["evaluation"]["scales"] == [0.5, 1]
    assert shadow["evaluation"]["probes"] == {"old": validation}


def test_options_come_on_top_of_a_body(ours, client, monkeypatch):
    body = {"model": MODEL, "training_file": client.upload(), "shadow": {"tuning": {"rank": 8, "dropout": 0.1}}}
    Path("body.json").write_text(json.dumps(body))
    from_file = ours("jobs", "create", "--json", "body.json", "--rank", 4, "--format", "json")
    assert json.loads(from_file.out)["shadow"]["tuning"]["rank"] == 4
    assert json.loads(from_file.out)["shadow"]["tuning"]["dropout"] == 0.1
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(body)))
    from_stdin = ours("jobs", "create", "--json", "-", "--format", "json")
    assert json.loads(from_stdin.out)["shadow"]["tuning"]["rank"] == 8


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--model", MODEL), 2, "--training-file"),
        (("--metadata", "x", "--model", MODEL, "--training-file", "file-x"), 2, "NAME=VALUE"),
        (("--scales", "a", "--model", MODEL, "--training-file", "file-x"), 2, "0.5,0.75"),
        (("--json", "absent.json"), 1, "absent.json"),
        (("--model", MODEL, "--training-file", "absent.jsonl"), 1, "absent.jsonl"),
        (("--model", MODEL, "--training-file", "file-absent"), 1, "file-absent"),
        (("--model", "no-such", "--training-file", "file-x"), 1, "no-such"),
    ],
    ids=str,
)
def test_a_mistake_makes_no_job(ours, client, arguments, status, said):
    done = ours("jobs", "create", *arguments)
    assert (done.status, done.out) == (status, "")
    assert said in done.err
    if status == 1:
        assert done.err.startswith("shadowft: ")
        assert done.err.count("\n") == 1
    assert listed(client) == []


def test_a_lost_answer_makes_no_second_job(ours, client, wire):
    wire.troubles = [Trouble("down", 0)]
    done = ours("jobs", "create", "--model", MODEL, "--training-file", client.upload())
    assert (done.status, wire.met) == (0, 1), done.err
    assert [job["id"] for job in listed(client)] == [done.out.strip()]


def test_a_command_given_again_with_its_key_makes_no_second_job(ours, client):
    command = ("jobs", "create", "--model", MODEL, "--training-file", client.upload(), "--idempotency-key", "mine")
    assert ours(*command).out == ours(*command).out
    assert len(listed(client)) == 1


def test_a_file_of_this_machine_is_checked_sent_and_sent_once(ours, client):
    Path("rows.jsonl").write_bytes(ROW * 3)
    Path("bad.jsonl").write_bytes(b"no json\n")
    command = ("jobs", "create", "--model", MODEL, "--training-file")
    bad = ours(*command, "bad.jsonl")
    assert (bad.status, bad.out) == (1, "")
    assert "shadowft files check bad.jsonl" in bad.err
    assert client.http.get("/files").json()["data"] == []
    for _ in range(2):
        done = ours(*command, "rows.jsonl")
        assert done.status == 0, done.err
        assert "3 rows in chat format" in done.err
    (file,) = client.http.get("/files").json()["data"]
    assert {job["training_file"] for job in listed(client)} == {file["id"]}


# --- list, get, cancel ------------------------------------------------------------------------------------------------


def test_jobs_are_listed_shown_and_cancelled(ours, client):
    red, blue = client.submit(metadata={"team": "red"}, suffix="r"), client.submit(metadata={"team": "blue"})
    assert json.loads(ours("jobs", "list", "--format", "json").out) == client.http.get("/fine_tuning/jobs").json()
    table = ours("jobs", "list").out
    assert table.index(blue) < table.index(red)
    found = ours("jobs", "list", "--metadata", "team=red").out
    assert (red in found, blue in found) == (True, False)
    assert f"--after {blue}" in ours("jobs", "list", "--limit", 1).err

    assert (
        json.loads(ours("jobs", "get", red, "--format", "json").out)
        == client.http.get(f"/fine_tuning/jobs/{red}").json()
    )
    shown = ours("jobs", "get", red).out
    for word in (red, "validating_files", MODEL, "team red"):
        assert word in shown
    assert ours("jobs", "cancel", red).out == f"{red} is cancelled.\n"
    assert ours("jobs", "cancel", red).status == 0
    client.finish(blue)
    late = ours("jobs", "cancel", blue)
    assert (late.status, "already succeeded" in late.err) == (1, True)
    assert ours("jobs", "get", "ftjob-absent").status == 1
    assert ours("jobs", "get", "../models").status == 1


def test_a_job_is_paused_resumed_and_run_again(ours, client):
    job_id = client.submit()
    for _ in range(2):
        assert ours("jobs", "pause", job_id).out == f"{job_id} is paused.\n"
    assert json.loads(ours("jobs", "resume", job_id, "--format", "json").out)["status"] == "validating_files"
    assert ours("jobs", "resume", job_id).out == f"{job_id} goes on.\n"
    early = ours("jobs", "retry", job_id)
    assert (early.status, "only one that failed or was cancelled" in early.err) == (1, True)
    ours("jobs", "cancel", job_id)
    again = ours("jobs", "retry", job_id).out.strip()
    assert client.http.get(f"/fine_tuning/jobs/{again}").json()["retry_of"] == job_id
    assert "is 'cancelled' and cannot be paused" in ours("jobs", "pause", job_id).err


def test_nothing_that_a_pipe_gets_is_a_control_character(ours, client):
    job_id = client.submit(metadata={"a\x1b[31m": "b\x07\r"})
    add_event(client, job_id, "A message\x1b[2J with \u202e tricks\nand a line")
    for command in (("get", job_id), ("events", job_id), ("list",)):
        out = ours("jobs", *command).out
        assert all(letter.isprintable() or letter == "\n" for letter in out)
    assert " \n" not in ours("jobs", "get", job_id).out


# --- events -----------------------------------------------------------------------------------------------------------


def add_event(client, job_id, message):
    with client.api.database.writing() as session:
        jobs.add_events(session, job_id, [NewEvent(message)])
        session.commit()


@pytest.fixture
def talkative(client):
    """A job with more events than one page of the list has."""
    job_id = client.submit()
    with client.api.database.writing() as session:
        jobs.add_events(session, job_id, [NewEvent(f"event {number} \u2028") for number in range(150)])
        session.commit()
    return job_id


def expected(client, job_id):
    return client.http.get(f"/fine_tuning/jobs/{job_id}/events", params={"limit": 1000}).json()["data"][::-1]


def test_events_are_printed_oldest_first(ours, client, talkative):
    printed = ours("jobs", "events", talkative, "--format", "json").out.split("\n")[:-1]
    assert [json.loads(line) for line in printed] == expected(client, talkative)
    assert [line[9:] for line in ours("jobs", "events", talkative).out.splitlines()[-2:]] == [
        "event 148  ",
        "event 149  ",
    ]


def test_events_are_followed_to_the_last_one_over_a_wire_that_breaks(ours, client, talkative, wire):
    wire.troubles = [Trouble("down", after, asking=b"stream=true") for after in (20_000, 10_000, 3_000)]
    canceller = threading.Timer(1.5, lambda: client.http.post(f"/fine_tuning/jobs/{talkative}/cancel"))
    canceller.start()
    done = ours("jobs", "events", talkative, "-f", "--format", "json")
    canceller.join()
    assert (done.status, wire.met) == (0, 3), done.err
    assert [json.loads(line) for line in done.out.split("\n")[:-1]] == expected(client, talkative)


def test_where_nothing_streams_the_events_are_asked_for(ours, client, talkative, wire, monkeypatch):
    monkeypatch.setattr("cli.events.POLL_SECONDS", 0.1)
    monkeypatch.setattr("cli.events.SILENCE_SECONDS", 0.3)
    wire.troubles = [Trouble("down", 0, "hold", asking=b"stream=true", always=True)]
    canceller = threading.Timer(4, lambda: client.http.post(f"/fine_tuning/jobs/{talkative}/cancel"))
    canceller.start()
    done = ours("jobs", "events", talkative, "-f", "--format", "json")
    canceller.join()
    assert (done.status, wire.met) == (0, 3), done.err
    assert [json.loads(line) for line in done.out.split("\n")[:-1]] == expected(client, talkative)


# --- watch ------------------------------------------------------------------------------------------------------------


def test_a_job_is_watched_to_its_success_and_the_comparison(ours, client):
    job_id = client.submit()
    finisher = threading.Timer(1, lambda: client.finish(job_id, evaluation=EVALUATION))
    finisher.start()
    done = ours("jobs", "watch", job_id)
    finisher.join()
    assert done.status == 0, done.err
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert any(line.endswith(f"Created fine-tuning job: {job_id}") for line in lines)
    assert "untouched instruct 3.000 0.10" in lines
    assert "grafted instruct x 1 (published) 0.750 0.80" in lines
    assert lines[-1] == "The grafted model does better."
    assert f"shadowft jobs download {job_id}" in done.err
    assert json.loads(ours("jobs", "watch", job_id, "--format", "json").out)["status"] == "succeeded"


def test_on_a_terminal_a_bar_tells_phase_step_loss_and_time_left(client, env):
    job_id = client.submit()
    claim = client.start(job_id)
    with on_a_terminal("jobs", "watch", job_id, env=env) as terminal:
        with client.api.database.writing() as session:
            jobs.enter_phase(session, claim, "training", "Training")
            step = NewEvent("Step 3/10: training loss=1.25", type="metrics", data={"step": 3})
            jobs.record(session, claim, progress={"step": 3, "total_steps": 10, "loss": 1.25}, events=[step])
            session.commit()
        wait_until(lambda: all(word in terminal.shown for word in ("training", "step 3/10  loss 1.250  ETA ")))
        client.http.post(f"/fine_tuning/jobs/{job_id}/cancel")
        with client.api.database.writing() as session:
            jobs.finish_cancelled(session, claim)
            session.commit()
        assert terminal.wait() == 1
    assert "Created fine-tuning job" in terminal.shown
    assert "training loss=1.25" not in terminal.shown  # the bar has told it
    assert "was cancelled" in terminal.shown


def test_a_connection_that_breaks_while_a_job_is_watched_is_borne(ours, client, wire):
    job_id = client.submit()
    wire.troubles = [Trouble("down", 0, asking=f"/{job_id} HTTP".encode()) for _ in range(2)]
    canceller = threading.Timer(3, lambda: client.http.post(f"/fine_tuning/jobs/{job_id}/cancel"))
    canceller.start()
    done = ours("jobs", "watch", job_id)
    canceller.join()
    assert (done.status, wire.met) == (1, 2)
    assert "The connection is lost; trying again." in done.err
    assert done.err.endswith(f"The job {job_id} was cancelled.\n")


def test_a_server_that_stays_away_is_given_up_and_the_job_is_not(ours, client, wire, monkeypatch):
    monkeypatch.setattr("cli.watch.PATIENCE_SECONDS", 1.0)
    job_id = client.submit()
    wire.troubles = [Trouble("up", 0, always=True)]
    done = ours("jobs", "watch", job_id)
    assert done.status == 1
    assert f"shadowft jobs watch {job_id}" in done.err
    assert "Traceback" not in done.err


def test_a_job_that_is_cancelled_while_it_is_watched_ends_with_1(ours, client):
    canceller = threading.Timer(1, lambda: client.http.post(f"/fine_tuning/jobs/{listed(client)[0]['id']}/cancel"))
    canceller.start()
    done = ours("jobs", "create", "--model", MODEL, "--training-file", client.upload(), "--watch")
    canceller.join()
    assert done.status == 1
    assert done.err == f"shadowft: The job {listed(client)[0]['id']} was cancelled.\n"
    again = ours("jobs", "watch", listed(client)[0]["id"], "--format", "json")
    assert (again.status, json.loads(again.out)["status"]) == (1, "cancelled")


def test_a_job_that_failed_tells_its_cause_and_what_to_do(ours, client):
    job_id = client.submit()
    claim = client.start(job_id)
    with client.api.database.writing() as session:
        jobs.fail(session, claim, Cause(code="x", message="The rows are odd.", hint="Mend them."))
        session.commit()
    done = ours("jobs", "watch", job_id)
    assert done.status == 1
    assert done.err == f"shadowft: The job {job_id} failed: The rows are odd. Mend them.\n"


def test_an_interrupt_leaves_the_job_running_and_tells_how_to_come_back(client, env):
    job_id = client.submit()
    with ended(child("jobs", "watch", job_id, env=env), signal.SIGKILL) as process:
        assert process.stdout.readline().endswith(f"Created fine-tuning job: {job_id}\n")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"shadowft jobs watch {job_id}" in err
    assert f"shadowft jobs cancel {job_id}" in err
    assert "Traceback" not in err
    assert listed(client)[0]["status"] == "validating_files"


# --- download ---------------------------------------------------------------------------------------------------------

FILES = {
    "model/model.safetensors": bytes(range(256)) * 4000,
    "model/config.json": b"{}",
    "model/empty": b"",
    "adapter/a.safetensors": b"a" * 10_000,
    "card/README.md": b"# A model",
}


@pytest.fixture
def published(client):
    job_id = client.submit()
    client.finish(job_id, FILES)
    return job_id


def found(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def artifact(client, job_id, path, /, **changes):
    with client.api.database.writing() as session:
        session.execute(update(Artifact).where(Artifact.job_id == job_id, Artifact.path == path).values(**changes))
        session.commit()


def test_everything_is_downloaded_and_what_is_there_already_is_kept(ours, client, published):
    done = ours("jobs", "download", published)
    assert done.status == 0, done.err
    assert found(published) == FILES
    assert done.out.startswith("5 files, 1.03 MB, verified")
    again = ours("jobs", "download", published)
    assert again.out.startswith("0 files, 0 bytes")
    assert "5 files were there already" in again.out
    listing = json.loads(ours("jobs", "download", published, "--format", "json").out)
    assert {one["path"] for one in listing} == FILES.keys()


def test_what_is_damaged_cut_or_changed_is_fetched_again(ours, client, published):
    ours("jobs", "download", published, "--out", "x")
    Path("x/model/config.json").write_bytes(b"[]")
    Path("x/adapter/a.safetensors").write_bytes(b"a" * 9_000)
    Path("x/card/README.md").unlink()
    done = ours("jobs", "download", published, "--out", "x")
    assert done.out.startswith("3 files, 10 kB")
    assert found("x") == FILES


def test_one_kind_is_downloaded_alone(ours, published):
    done = ours("jobs", "download", published, "--out", "x", "--kind", "adapter", "--kind", "card")
    assert done.status == 0
    assert found("x").keys() == {"adapter/a.safetensors", "card/README.md"}
    assert ours("jobs", "download", published, "--kind", "wrong").status == 2
    none = ours("jobs", "download", published, "--kind", "delta")
    assert (none.status, "adapter, card, model" in none.err) == (1, True)


def test_a_job_without_files_says_why(ours, client):
    done = ours("jobs", "download", client.submit())
    assert (done.status, done.out) == (1, "")
    assert "validating_files" in done.err
    assert list(Path.cwd().iterdir()) == []


def test_a_cut_connection_is_taken_up_where_it_broke(ours, published, wire):
    wire.troubles = [Trouble("down", 300_000, asking=b"/content") for _ in range(3)]
    done = ours("jobs", "download", published, "--out", "x", "--kind", "model")
    assert (done.status, wire.met >= 1) == (0, True), done.err
    assert found("x") == {path: content for path, content in FILES.items() if path.startswith("model/")}
    assert wire.down < 1_400_000  # whole, and a little twice


def test_a_download_that_is_killed_goes_on_and_ends_with_the_same_bytes(ours, client, published, wire, env):
    wire.troubles = [Trouble("down", 600_000, "hold", asking=b"/content", always=True)]
    with ended(child("jobs", "download", published, "--out", "x", env=env | {"SHADOWFT_URL": wire.url}), 9) as process:
        wait_until(lambda: sum(map(len, found("x").values())) > 500_000)
        process.kill()
        process.communicate()
    assert "model/model.safetensors" not in found("x")
    wire.troubles, before = [], wire.down
    done = ours("jobs", "download", published, "--out", "x")
    assert done.status == 0, done.err
    assert found("x") == FILES
    assert wire.down - before < 600_000


def test_an_interrupted_download_ends_at_once_and_says_how_to_go_on(published, wire, env, tmp_path):
    wire.troubles = [Trouble("down", 600_000, "hold", asking=b"/content", always=True)]
    env = env | {"SHADOWFT_URL": wire.url}
    with ended(child("jobs", "download", published, "--out", "x", env=env), signal.SIGKILL) as process:
        wait_until(lambda: sum(map(len, found("x").values())) > 500_000)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "Interrupted. Give the command again to go on from here.\n"


def test_a_partial_file_of_other_bytes_is_thrown_away(ours, client, published):
    listing = client.http.get(f"/fine_tuning/jobs/{published}/artifacts").json()["data"]
    unfinished = Path("x/.shadowft-download")
    unfinished.mkdir(parents=True)
    for one in listing:
        (unfinished / f"{one['id']}-{one['sha256'][:16]}").write_bytes(b"wrong" * (one["bytes"] // 6 + 1))
    done = ours("jobs", "download", published, "--out", "x")
    assert done.status == 0, done.err
    assert found("x") == FILES


def test_bytes_that_are_not_those_of_the_hash_are_not_kept(ours, client, published):
    artifact(client, published, "model/config.json", sha256="0" * 64)
    done = ours("jobs", "download", published, "--out", "x")
    assert done.status == 1
    assert "model/config.json comes with other bytes" in done.err
    assert not Path("x/model/config.json").exists()


@pytest.mark.parametrize(
    "path", ["../out", "/etc/out", "model/../../out", "a//b", "./a", "a\\..\\b", "x\ny", ".shadowft-download/lock"]
)
def test_a_path_that_leads_out_of_the_folder_is_refused_before_anything_is_written(ours, client, published, path):
    artifact(client, published, "card/README.md", path=path)
    done = ours("jobs", "download", published, "--out", "x")
    assert (done.status, done.out) == (1, "")
    assert "nothing was downloaded" in done.err
    assert done.err.count("\n") == 1
    assert list(Path.cwd().iterdir()) == []


def test_a_link_that_leads_out_of_the_folder_is_not_followed(ours, published, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Path("x").mkdir()
    Path("x/model").symlink_to(tmp_path / "elsewhere")
    done = ours("jobs", "download", published, "--out", "x")
    assert (done.status, "nothing was downloaded" in done.err) == (1, True)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_what_is_in_the_way_is_told_in_a_sentence(ours, published):
    Path("x/model/config.json").mkdir(parents=True)
    done = ours("jobs", "download", published, "--out", "x")
    assert done.status == 1
    assert "config.json" in done.err
    Path("file").write_bytes(b"")
    assert ours("jobs", "download", published, "--out", "file").status == 1


def test_a_second_download_into_the_folder_waits_for_nobody(ours, published):
    Path("x/.shadowft-download").mkdir(parents=True)
    with Path("x/.shadowft-download/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = ours("jobs", "download", published, "--out", "x")
    assert (done.status, "--out" in done.err) == (1, True)


def test_a_file_that_the_disk_cannot_hold_is_told_in_a_sentence(published, env, tmp_path):
    def limited():
        die_with_parent()()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    with ended(child("jobs", "download", published, cwd=tmp_path, env=env, preexec_fn=limited), 9) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "The disk is full" in err
    assert "goes on where it stopped" in err


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(ours, published, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], check=False).returncode:
        pytest.skip("a small disk is mounted here, which needs root; the test above always runs")
    try:
        done = ours("jobs", "download", published, "--out", disk / "x")
        assert (done.status, done.out) == (1, "")
        assert "needs 1.03 MB more" in done.err
        assert found(disk) == {} or set(found(disk)) == {"x/.shadowft-download/lock"}
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_model_that_is_deleted_meanwhile_is_one_sentence(ours, client, published):
    storage = LocalStorage(client.api.settings.storage_dir)
    shutil.rmtree(storage.path(f"jobs/{published}"))
    done = ours("jobs", "download", published)
    assert (done.status, done.out) == (1, "")
    assert "deleted" in done.err
