"""A job that is paused, drained, hurt and taken up again: the real pipeline and real children, with a toy training."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading

import pytest
from sqlalchemy import update
from structlog.testing import capture_logs

from core import jobs
from core.errors import LeaseLost, StepFailed
from core.job_spec import ModelSource, PairSource
from core.models import Job, Team
from core.storage import LocalStorage
from tests.core.test_jobs import act, claim, make_job, make_spec, make_team, messages, point, read, sweep
from tests.servers import wait_until
from tests.worker import toy_train
from tests.worker.test_admission import write_model
from worker import pipeline
from worker.cleaning import remove_expired, remove_strays
from worker.pipeline import Context
from worker.resume_manifest import PointRefused, verify
from worker.resume_points import store
from worker.workspace import Workspace

pytestmark = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)

QUICK = {
    "steps": 60, "pace": 0.02, "saves": [], "faults": {}, "micro_batch": 8, "fits": 0, "grafting": 0, "deaf": False,
    "refuses": [],
}  # fmt: skip
#: Longer than any test takes.
LONG = {"steps": 100_000}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """`toy(steps=…)`: what the children do from their next start on."""
    plan, program = tmp_path / "toy.json", tmp_path / "toy"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {toy_train.__file__} {plan} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    def set_plan(**changes):
        plan.write_text(json.dumps(QUICK | changes))

    set_plan()
    return set_plan


@pytest.fixture
def context(settings, database, tmp_path, toy):
    settings.model_roots = (tmp_path / "models",)
    settings.lease_seconds, settings.save_grace_seconds = 20, 20
    for name in ("base", "instruct"):
        write_model(tmp_path / "models" / name)
    storage = LocalStorage(settings.storage_dir)
    incoming = storage.receive("k")
    incoming.write(b"rows")
    incoming.keep()
    return Context(settings=settings, database=database, storage=storage, device="cpu", draining=threading.Event())


@pytest.fixture
def job_id(context, database, tmp_path):
    made = make_job(database, make_team(database))
    local = {name: ModelSource(kind="local", location=str(tmp_path / "models" / name)) for name in ("base", "instruct")}
    spec = make_spec(made).model_copy(update={"pair": PairSource(name="tiny", **local)})
    put(database, made, spec=spec.model_dump(mode="json"))
    return made


def put(database, job_id, **values):
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == job_id).values(**values))
        session.commit()


class Working:
    """A worker that has claimed the job and is at it."""

    def __init__(self, context) -> None:
        self.claim = claim(context.database, lease=20.0)
        self._thread = threading.Thread(target=pipeline.run, args=(context, self.claim))
        self._thread.start()

    def leaves(self):
        self._thread.join(60)
        assert not self._thread.is_alive()


def work(context):
    """One attempt, to its end."""
    Working(context).leaves()


def at_step(context, job_id, step):
    wait_until(lambda: ((read(context.database, job_id).progress or {}).get("step") or 0) >= step, seconds=40)


def saved(context, job_id):
    with context.database.reading() as session:
        return [point.step for point in jobs.ready_points(session, job_id)]


def stored(context, job_id):
    folder = context.settings.storage_dir / "jobs" / job_id / "resume"
    return sorted(path.name for path in folder.rglob("step-*")) if folder.exists() else []


def said(context, job_id, words):
    return [message for message in messages(context.database, job_id) if words in message]


def begun(context, job_id):
    """The step behind which each attempt's training began."""
    return [int(message.rpartition(" ")[2]) for message in said(context, job_id, "Beginning behind")]


def ended_well(job):
    """The toy's training was gone through to its end, and then its graft gave up."""
    return (job.status, job.error["code"]) == ("failed", "toy_end")


# --- pause, resume, drain ---------------------------------------------------------------------------------------------


def test_a_paused_training_goes_on_elsewhere_where_it_was(context, job_id, toy):
    toy(**LONG)
    working = Working(context)
    at_step(context, job_id, 5)
    act(context.database, jobs.request_pause, job_id)
    working.leaves()
    (step,) = saved(context, job_id)
    assert read(context.database, job_id).status == "paused"
    assert stored(context, job_id) == [f"step-{step}"]

    shutil.rmtree(context.settings.work_dir)  # another machine
    toy(steps=step + 3)
    act(context.database, jobs.request_resume, job_id)
    work(context)

    assert ended_well(read(context.database, job_id))
    assert begun(context, job_id) == [0, step]


def test_a_drained_worker_leaves_its_job_to_the_next_one_at_no_cost(context, job_id, toy):
    toy(**LONG)
    working = Working(context)
    at_step(context, job_id, 5)
    context.draining.set()
    working.leaves()
    job = read(context.database, job_id)
    assert (job.status, job.lost_count, job.infra_retries, job.not_before > job.started_at) == ("queued", 0, 0, True)

    context.draining.clear()
    (step,) = saved(context, job_id)
    toy(steps=step + 1)
    work(context)
    assert begun(context, job_id) == [0, step]


def test_a_pause_during_the_graft_does_not_cost_the_training(context, job_id, toy):
    toy(steps=3, grafting=1000)
    working = Working(context)
    wait_until(lambda: read(context.database, job_id).phase == "grafting", seconds=40)
    act(context.database, jobs.request_pause, job_id)
    working.leaves()
    assert read(context.database, job_id).status == "paused"

    toy()
    act(context.database, jobs.request_resume, job_id)
    work(context)
    assert ended_well(read(context.database, job_id))
    assert begun(context, job_id) == [0]


def test_a_training_that_does_not_save_in_time_is_ended_and_its_last_saved_state_counts(context, job_id, toy):
    context.settings.save_grace_seconds = 0.5
    toy(**LONG, saves=[4], deaf=True)
    working = Working(context)
    wait_until(lambda: saved(context, job_id) == [4], seconds=40)
    context.draining.set()
    working.leaves()
    assert (read(context.database, job_id).status, saved(context, job_id)) == ("queued", [4])
    assert said(context, job_id, "did not save its state within 0.5 s and is ended; its last saved one counts")


def test_a_pause_waits_for_the_step_under_way_however_long_it_takes(context, job_id, toy):
    context.settings.save_grace_seconds = 0.01
    toy(**LONG, pace=0.4)
    working = Working(context)
    at_step(context, job_id, 1)
    act(context.database, jobs.request_pause, job_id)
    working.leaves()
    assert (read(context.database, job_id).status, len(saved(context, job_id))) == ("paused", 1)


def test_a_cancel_does_not_wait_for_a_state_to_be_saved(context, job_id, toy):
    toy(**LONG, deaf=True)
    working = Working(context)
    at_step(context, job_id, 2)
    act(context.database, jobs.request_pause, job_id)
    act(context.database, jobs.request_cancel, job_id)
    working.leaves()
    assert (read(context.database, job_id).status, stored(context, job_id)) == ("cancelled", [])


# --- saved states -----------------------------------------------------------------------------------------------------


def test_of_many_saved_states_the_newest_two_stay_and_none_stays_behind_the_job(context, job_id, toy):
    toy(pace=0.1, steps=30, saves=[1, 10, 20])
    work(context)
    assert saved(context, job_id) == [20, 10]
    assert stored(context, job_id) == ["step-10", "step-20"]

    put(context.database, job_id, status="cancelled")
    remove_expired(context.database, context.storage)
    assert (saved(context, job_id), stored(context, job_id)) == ([], [])


def interrupted(context, job_id, toy, **plan):
    """The job as a drain left it, after the training had saved its states at steps 4 and (the newest) another."""
    toy(**LONG, saves=[4], **plan)
    working = Working(context)
    wait_until(lambda: saved(context, job_id) == [4], seconds=40)
    context.draining.set()
    working.leaves()
    context.draining.clear()
    newest, four = saved(context, job_id)
    assert four == 4
    return newest


@pytest.mark.parametrize("damage", ["a flipped bit", "a missing file", "another manifest", "no folder"])
def test_a_damaged_state_is_set_aside_and_the_one_before_is_taken(context, job_id, toy, damage):
    newest = interrupted(context, job_id, toy)
    folder = context.settings.storage_dir / "jobs" / job_id / "resume" / "a1" / f"step-{newest}"
    hurt(folder, damage)
    shutil.rmtree(context.settings.work_dir)  # another machine
    toy(steps=6)
    work(context)
    assert begun(context, job_id) == [0, 4]
    (event,) = said(context, job_id, "is set aside")
    assert event.startswith(f"The state that was saved at step {newest} is set aside: ")


def hurt(folder, damage):
    if damage == "a flipped bit":
        content = bytearray((folder / "state").read_bytes())
        content[500] ^= 1
        (folder / "state").write_bytes(content)
    elif damage == "a missing file":
        (folder / "state").unlink()
    elif damage == "another manifest":
        manifest = json.loads((folder / "manifest.json").read_bytes())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"step": 1}))
    else:
        shutil.rmtree(folder)


def test_a_state_of_another_training_is_not_gone_on_from(context, job_id, toy):
    interrupted(context, job_id, toy)
    spec = read(context.database, job_id).spec
    put(context.database, job_id, spec=spec | {"seed": spec["seed"] + 1})
    toy(steps=2)
    work(context)
    assert begun(context, job_id) == [0, 0]
    assert said(context, job_id, "No saved state can be gone on from")
    assert saved(context, job_id) == []


def test_a_state_that_the_training_refuses_is_set_aside_and_the_one_before_is_taken_at_no_cost(context, job_id, toy):
    """As one that another version of a library wrote."""
    newest = interrupted(context, job_id, toy)
    toy(steps=6, refuses=[newest])
    work(context)
    job = read(context.database, job_id)
    assert (ended_well(job), job.attempt, job.infra_retries) == (True, 2, 0)
    assert begun(context, job_id) == [0, 4]
    assert said(context, job_id, f"saved at step {newest} is set aside: The toy does not like it.")


def test_a_training_goes_on_where_its_state_cannot_be_stored(context, job_id, toy):
    place = context.settings.storage_dir / "jobs" / job_id
    place.mkdir(parents=True)
    (place / "resume").write_text("in the way")
    toy(saves=[1], steps=50)
    work(context)
    assert ended_well(read(context.database, job_id))
    (event,) = said(context, job_id, "could not be stored")
    assert event.startswith("The state of step 1 could not be stored: ")


def test_a_state_that_changed_on_its_way_into_storage_is_not_recorded(context, job_id, tmp_path):
    workspace = Workspace(tmp_path)
    folder = workspace.resume_points / "step-3"
    folder.mkdir(parents=True)
    (folder / "state").write_bytes(b"as it was")
    toy_train.seal(folder, step=3, spec="spec")
    (folder / "state").write_bytes(b"as it is.")
    with pytest.raises(PointRefused, match="other bytes"):
        store(workspace, 3, jobs.Claim(job_id, 1), context.storage, lambda: None)


@pytest.mark.parametrize("name", ["l/../../../admin.key", "../admin.key", "/admin.key", ".hidden", ".."])
@pytest.mark.usefixtures("backend")
def test_a_state_whose_manifest_names_what_is_no_file_of_its_folder_is_not_stored(tmp_path, name):
    workspace = Workspace(tmp_path / "job")
    folder = workspace.resume_points / "step-3"
    folder.mkdir(parents=True)
    manifest = {"step": 3, "spec": "spec", "files": {name: {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PointRefused):
        store(workspace, 3, jobs.Claim("ftjob-1", 1), LocalStorage(tmp_path / "storage"), lambda: None)


@pytest.mark.usefixtures("backend")
def test_a_state_that_holds_a_link_is_neither_stored_nor_gone_on_from(tmp_path):
    (tmp_path / "key").write_bytes(b"secret")
    workspace = Workspace(tmp_path / "job")
    folder = workspace.resume_points / "step-3"
    folder.mkdir(parents=True)
    (folder / "state").write_bytes(b"secret")
    toy_train.seal(folder, step=3, spec="spec")
    (folder / "state").unlink()
    (folder / "state").symlink_to(tmp_path / "key")
    with pytest.raises(StepFailed, match="The job left train/resume/step-3/state, which is no plain file"):
        store(workspace, 3, jobs.Claim("ftjob-1", 1), LocalStorage(tmp_path / "storage"), lambda: None)
    with pytest.raises(PointRefused, match="state, which is no plain file"):
        verify(folder, spec="spec")


def test_a_state_that_nobody_recorded_is_swept_up(context, job_id, monkeypatch):
    for owner, attempt in ((job_id, 1), ("ftjob-gone", 1)):
        incoming = context.storage.receive(f"jobs/{owner}/resume/a{attempt}/step-1/state")
        incoming.write(b"x")
        incoming.keep()
    monkeypatch.setattr("worker.cleaning.UNFINISHED_SECONDS", -1)
    claim(context.database)  # the first may be on its way in
    remove_strays(context.database, context.storage)
    assert (stored(context, job_id), stored(context, "ftjob-gone")) == (["step-1"], [])


def test_an_attempt_that_lost_its_lease_records_no_state(context, job_id):
    held = claim(context.database)
    put(context.database, job_id, attempt=2)
    with pytest.raises(LeaseLost):
        act(context.database, jobs.add_point, held, point(held))
    assert saved(context, job_id) == []


# --- memory, disk, stalls, time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["memory", "killed"])
def test_a_training_without_enough_memory_goes_on_with_fewer_rows_at_a_time(context, job_id, toy, fault):
    toy(steps=40, pace=0.1, saves=[5], faults={"20": fault}, fits=2)
    for _ in range(3):
        work(context)
    job = read(context.database, job_id)
    assert (ended_well(job), job.oom_level, job.infra_retries) == (True, 2, 0)
    assert begun(context, job_id) == [0, 5, 5]
    assert len(said(context, job_id, "half the rows at a time and the same effective batch")) == 2


@pytest.mark.parametrize(("micro_batch", "attempts"), [(64, 4), (2, 2), (1, 1)])
def test_memory_that_is_never_enough_fails_the_job_with_advice(context, job_id, toy, micro_batch, attempts):
    toy(steps=3, faults={"2": "memory"}, micro_batch=micro_batch)
    for _ in range(attempts):
        work(context)
    job = read(context.database, job_id)
    assert (job.status, job.error["code"], job.error["fault"]) == ("failed", "out_of_memory", "memory")
    assert (job.attempt, "smaller batch_size" in job.error["hint"]) == (attempts, True)


@pytest.mark.parametrize("step", ["graft", "train"])
def test_a_step_that_is_killed_and_would_not_need_less_another_time_is_tried_again_once(context, job_id, toy, step):
    toy(steps=3, micro_batch=1, **({"grafting": "killed"} if step == "graft" else {"faults": {"2": "killed"}}))
    work(context)
    job = read(context.database, job_id)
    assert (job.status, job.infra_retries, job.oom_level) == ("queued", 1, 0)
    assert said(context, job_id, f"The step '{step}' was killed by the operating system")

    put(context.database, job_id, not_before=None)
    work(context)
    job = read(context.database, job_id)
    assert (job.status, job.error["code"], job.error["fault"]) == ("failed", "step_killed", "memory")


def test_a_full_disk_keeps_what_there_is_and_waits(context, job_id, toy):
    toy(steps=40, pace=0.1, saves=[5], faults={"20": "disk"})
    for waits in (1, 2):
        put(context.database, job_id, not_before=None)
        work(context)
        job = read(context.database, job_id)
        assert (job.status, job.infra_retries, saved(context, job_id)) == ("queued", 0, [5])
        assert job.disk_waits == waits
    assert claim(context.database) is None
    assert "tried again in about 120 s. The operator frees space" in messages(context.database, job_id)[-1]

    put(context.database, job_id, not_before=None)
    toy(steps=7)
    work(context)
    assert ended_well(read(context.database, job_id))
    assert begun(context, job_id) == [0, 5, 5]


def test_a_training_that_makes_no_step_is_ended_and_begun_again_once(context, job_id, toy, monkeypatch):
    monkeypatch.setattr("worker.step_runner.STACKS_SECONDS", 0.5)
    context.settings.stall_seconds = 1.5
    toy(faults={"4": "stall"})
    with capture_logs() as logs:
        work(context)
    job = read(context.database, job_id)
    assert (job.status, job.stall_count, job.infra_retries) == ("queued", 1, 0)
    assert said(context, job_id, "The step 'train' made no progress for")
    (told,) = [entry for entry in logs if entry["event"] == "step_stalled"]
    assert " in meet\n" in told["stacks"]  # where it stood

    work(context)
    job = read(context.database, job_id)
    assert (job.status, job.error["code"], job.error["fault"]) == ("failed", "step_stalled", "infrastructure")


def test_a_graft_that_says_nothing_is_ended_and_begun_again_once_too(context, job_id, toy, monkeypatch):
    monkeypatch.setattr("worker.step_runner.STACKS_SECONDS", 0.1)
    monkeypatch.setattr("worker.step_runner.STALL_EDGES", 1)
    monkeypatch.setattr("worker.pipeline.QUIET_TIMES", 0.1)
    context.settings.stall_seconds = 10
    toy(steps=1, grafting=1000)
    work(context)
    job = read(context.database, job_id)
    assert (job.status, job.stall_count) == ("queued", 1)
    assert said(context, job_id, "The step 'graft' made no progress for 1 s")


def test_a_jobs_time_is_limited_over_all_its_attempts_and_it_can_be_run_again(context, job_id, toy):
    team_id = read(context.database, job_id).team_id
    with context.database.writing() as session:
        session.execute(update(Team).where(Team.id == team_id).values(max_job_seconds=100))
        session.commit()
    put(context.database, job_id, run_seconds=97)
    toy(**LONG, saves=[1])
    work(context)
    job = read(context.database, job_id)
    assert (job.status, job.error["code"], job.error["fault"]) == ("failed", "time_limit", "user")
    assert job.run_seconds > 99
    step = saved(context, job_id)[0]

    again = act(context.database, jobs.retry, job_id).id
    spec = job.spec | {"job_id": again, "fine_tuned_model": "ft:again"}
    put(context.database, again, status="queued", spec=spec, memory_bytes=1)
    toy(steps=step + 1)
    work(context)
    assert ended_well(read(context.database, again))
    assert begun(context, again) == [step]
    assert sweep(context.database).lost == []
