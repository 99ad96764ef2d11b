"""The life of a job, on both databases: legal moves, the fence, claims, races, the sweep. Any order of them is in
test_job_machine.py."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import pytest
from sqlalchemy import delete, event, inspect, select, text, update
from sqlalchemy.exc import IntegrityError

from core import jobs
from core.db import db_now
from core.errors import Cause, Conflict, LeaseLost
from core.ids import new_id
from core.job_spec import DataSource, Evaluation, Graft, JobSpec, ModelSource, PairSource, Tuning
from core.jobs import Claim, NewEvent, Outcome
from core.keys import create_team
from core.models import Artifact, File, Job, JobEvent, Metric, ResumePoint, Worker

CAUSE = Cause(code="some_code", message="It broke.")
LIVE = ("validating_files", "queued", "running", "paused")
STATES = (*LIVE, "succeeded", "failed", "cancelled")


# --- given ------------------------------------------------------------------------------------------------------------


def make_team(database, name="blue"):
    with database.writing() as session:
        team = create_team(session, name)
        session.commit()
        return team.id


def make_job(database, team_id, status="queued", *, kind="fine_tune", **values):
    """A job that is already in `status`, as the verbs would have left it."""
    running = {"phase": "training", "lease_until": db_now(60), "attempt": 1, "worker_id": "worker-1"}
    request = {"pair": {"name": "tiny"}, "hyperparameters": {}, "shadow": {"evaluation": {"probes": {}}}}
    if kind == "graft":
        request = {"pair": {"name": "tiny"}, "delta": {"job_id": "ftjob-1"}, "files": {"training_file": "file-1"}}
    job = Job(team_id=team_id, kind=kind, model="tiny", training_file_id="file-1", seed=1, request=request)
    with database.writing() as session:
        job_id = jobs.create(session, job).id
        spec = make_spec(job_id, kind=kind).model_dump(mode="json")
        changes = {"status": status, "spec": spec, "memory_bytes": 1000}
        changes |= running if status == "running" else {}
        session.execute(update(Job).where(Job.id == job_id).values(**changes | values))
        session.commit()
    return job_id


def make_spec(job_id, *, kind="fine_tune", tuning="lora", left_out=None):
    nowhere = DataSource(file_id="file-1", filename="rows.jsonl", storage_key="k", sha256="0" * 64)
    local = {name: ModelSource(kind="local", location=f"/models/{name}") for name in ("base", "instruct")}
    return JobSpec(
        job_id=job_id,
        kind=kind,
        strategy="shadow",
        pair=PairSource(name="tiny", **local),
        training=nowhere,
        validation=None,
        holdout_ratio=0.1,
        seed=1,
        tuning=Tuning(
            type=tuning, n_epochs=1, batch_size=1, learning_rate=1e-3, lr_scheduler="cosine", warmup_ratio=0.1,
            weight_decay=0, max_grad_norm=1, max_length=128, precision="auto", rank=4, alpha=8, dropout=0,
        ),
        graft=Graft(scale=1, scope="linear"),
        evaluation=Evaluation(
            scales=(), exact_match="auto", max_rows=1, max_new_tokens=1, probes={}, left_out=left_out
        ),
        fine_tuned_model=f"ft:tiny:blue::{job_id[-8:]}",
    )  # fmt: skip


def point(held, step=10, **values):
    """A saved state whose files are in storage."""
    made = {
        "id": new_id("rpt_"),
        "job_id": held.job_id,
        "attempt": held.attempt,
        "step": step,
        "spec_sha256": make_spec(held.job_id).training_sha256,
        "prefix": f"jobs/{held.job_id}/resume/a{held.attempt}/step-{step}",
        "bytes": 1,
        "manifest": {"step": step, "files": {}},
    }
    return ResumePoint(**made | values)


def outcome(job_id, team_id):
    shared = {"team_id": team_id, "bytes": 1, "sha256": "0" * 64, "storage_key": "k"}
    return Outcome(
        artifacts=[Artifact(id=new_id("art_"), job_id=job_id, kind="model", path="model/config.json", **shared)],
        result_files=[
            File(id=new_id("file-"), filename="r.csv", purpose="fine-tune-results", status="processed", **shared)
        ],
        trained_tokens=7,
        evaluation={"verdict": "better"},
        graft_result={"fidelity": 1.0},
    )


# --- what is grafted --------------------------------------------------------------------------------------------------


def test_of_scales_that_are_written_alike_the_published_one_is_grafted():
    spec = make_spec("ftjob-1")
    graft = spec.graft.model_copy(update={"scale": 0.70000001})
    evaluation = spec.evaluation.model_copy(update={"scales": (0.5, 0.7, 0.50000001)})
    assert spec.model_copy(update={"graft": graft, "evaluation": evaluation}).scales == (0.70000001, 0.5)


# --- when -------------------------------------------------------------------------------------------------------------


def act(database, verb: Callable, *args, **kwargs):
    """Call the verb and commit, as its callers do; roll back what it raises."""
    with database.writing() as session:
        answer = verb(session, *args, **kwargs)
        session.commit()
        return answer


def claim(database, worker_id="worker-1", lane=10_000, lease=60.0):
    return act(database, jobs.claim_next, worker_id=worker_id, lane_memory_bytes=lane, lease_seconds=lease)


def sweep(database, max_lost_workers=3):
    seconds = {"stale_worker_seconds": 60, "silent_lease_seconds": 30}
    return act(database, jobs.sweep, max_lost_workers=max_lost_workers, **seconds)


def expire(database, job_id):
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=db_now(-1)))
        session.commit()


# --- then -------------------------------------------------------------------------------------------------------------


def read(database, job_id):
    with database.reading() as session:
        return session.get_one(Job, job_id)


def events(database, job_id):
    with database.reading() as session:
        return list(session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)))


def messages(database, job_id):
    return [event.message for event in events(database, job_id)]


def snapshot(database):
    """Every row of every table."""
    with database.reading() as session:
        names = inspect(database.engine).get_table_names()
        return {name: sorted(map(repr, session.execute(text(f"SELECT * FROM {name}")))) for name in names}  # noqa: S608


def run_together(count, work):
    """`work(number)` in as many threads, begun at once; their answers."""
    together = threading.Barrier(count)

    def begin(number):
        together.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


# --- legal moves and refusals -----------------------------------------------------------------------------------------

#: verb -> (from -> to). A state that is not named is left as it is.
MOVES = {
    "admit": {"validating_files": "queued"},
    "refuse": {"validating_files": "failed"},
    "claim": {"queued": "running"},
    "beat": {"running": "running"},
    "enter_phase": {"running": "running"},
    "record": {"running": "running"},
    "succeed": {"running": "succeeded"},
    "fail": {"running": "failed"},
    "finish_cancelled": {"running": "cancelled"},
    "put_back": {"running": "queued"},
    "sweep (lease holds)": {},
    "sweep (lease ran out)": {"running": "queued"},
    "request_cancel": {**dict.fromkeys(jobs.CANCELLED_AT_ONCE, "cancelled"), "running": "running"},
    "request_pause": {**dict.fromkeys(jobs.PAUSED_AT_ONCE, "paused"), "running": "running"},
    "request_resume": {"paused": "queued"},
    "add_point": {"running": "running"},
    "set_point_aside": {"running": "running"},
    "drop_old_points": {"running": "running"},
}


def perform(database, verb, job_id):
    team_id, held = read(database, job_id).team_id, Claim(job_id, 1)
    if verb == "sweep (lease ran out)" and read(database, job_id).status == "running":
        expire(database, job_id)
    calls = {
        "admit": lambda: act(database, jobs.admit, job_id, make_spec(job_id), memory_bytes=5),
        "refuse": lambda: act(database, jobs.refuse, job_id, CAUSE),
        "claim": lambda: claim(database),
        "beat": lambda: act(database, jobs.beat, held, lease_seconds=60),
        "enter_phase": lambda: act(database, jobs.enter_phase, held, "grafting", "Grafting"),
        "record": lambda: act(database, jobs.record, held, progress={"step": 1}, metrics=[{"step": 1}]),
        "succeed": lambda: act(database, jobs.succeed, held, outcome(job_id, team_id)),
        "fail": lambda: act(database, jobs.fail, held, CAUSE),
        "finish_cancelled": lambda: act(database, jobs.finish_cancelled, held),
        "put_back": lambda: act(database, jobs.put_back, held, "The worker drains"),
        "sweep (lease holds)": lambda: sweep(database),
        "sweep (lease ran out)": lambda: sweep(database),
        "request_cancel": lambda: act(database, jobs.request_cancel, job_id),
        "request_pause": lambda: act(database, jobs.request_pause, job_id),
        "request_resume": lambda: act(database, jobs.request_resume, job_id),
        "add_point": lambda: act(database, jobs.add_point, held, point(held)),
        "set_point_aside": lambda: act(database, jobs.set_point_aside, held, point(held), "It is damaged"),
        "drop_old_points": lambda: act(database, jobs.drop_old_points, held, point(held)),
    }
    with suppress(LeaseLost, Conflict):
        calls[verb]()


@pytest.mark.parametrize("verb", MOVES)
def test_a_verb_moves_a_job_only_along_the_table(database, verb):
    team_id = make_team(database)
    for state in STATES:
        job_id = make_job(database, team_id, state)
        before = snapshot(database)
        perform(database, verb, job_id)
        assert read(database, job_id).status == MOVES[verb].get(state, state), f"{verb} of a job that was {state}"
        if state not in MOVES[verb]:
            assert snapshot(database) == before, f"{verb} changed something about a job that is {state}"
        act(database, lambda session, done=job_id: session.execute(delete(Job).where(Job.id == done)))


@pytest.mark.parametrize("status", ["succeeded", "failed"])
def test_a_cancel_of_an_ended_job_says_how_it_ended(database, status):
    job_id = make_job(database, make_team(database), status)
    with pytest.raises(Conflict, match=status) as caught:
        act(database, jobs.request_cancel, job_id)
    assert caught.value.code == "job_not_cancellable"


def test_a_new_job_begins_with_its_first_events(database):
    job_id = make_job(database, make_team(database), "validating_files")
    assert messages(database, job_id) == [f"Created fine-tuning job: {job_id}", "Validating training file: file-1"]


def test_a_graft_is_called_a_graft_from_its_first_event_to_its_success(database):
    team_id = make_team(database)
    job_id = make_job(database, team_id, "validating_files", kind="graft")
    act(database, jobs.admit, job_id, make_spec(job_id, kind="graft"), memory_bytes=1)
    assert act(database, jobs.succeed, claim(database), outcome(job_id, team_id)) is True
    assert messages(database, job_id) == [
        f"Created graft job: {job_id}",
        "Checking that what ftjob-1 learned fits tiny",
        "The change fits, moving job to queued state",
        "Graft job started",
        f"New fine-tuned model created: ft:tiny:blue::{job_id[-8:]}",
        "The job has successfully completed",
    ]
    assert read(database, job_id).files == {"training_file": "file-1"}


def test_a_spec_from_before_grafts_had_options_is_still_read():
    """Of a job that waits while the service is updated, and of one whose change is grafted later."""
    kept = make_spec("ftjob-1").model_dump(mode="json")
    for part, names in (("graft", ("include", "exclude", "output_dtype")), ("evaluation", ("left_out",))):
        for name in names:
            del kept[part][name]
    del kept["publish"], kept["delta"]
    assert JobSpec.model_validate(kept) == make_spec("ftjob-1")


def test_a_success_carries_everything_that_the_job_publishes(database):
    team_id = make_team(database)
    job_id = make_job(database, team_id)
    assert act(database, jobs.succeed, claim(database), outcome(job_id, team_id)) is True
    job = read(database, job_id)
    assert (job.status, job.trained_tokens, job.evaluation) == ("succeeded", 7, {"verdict": "better"})
    assert job.graft_result == {"fidelity": 1.0}
    assert job.fine_tuned_model == f"ft:tiny:blue::{job_id[-8:]}"
    assert (job.phase, job.lease_until, job.worker_id) == (None, None, None)
    assert job.finished_at >= job.started_at >= job.created_at
    with database.reading() as session:
        assert [file.id for file in session.scalars(select(File))] == job.result_file_ids
        assert session.scalars(select(Artifact.path)).all() == ["model/config.json"]
    assert [message for message in messages(database, job_id) if "completed" in message] == messages(database, job_id)[
        -1:
    ]


def test_a_failure_keeps_its_cause(database):
    job_id = make_job(database, make_team(database))
    act(database, jobs.fail, claim(database), CAUSE)
    assert read(database, job_id).error == CAUSE.as_dict()
    assert events(database, job_id)[-1].level == "error"
    assert messages(database, job_id)[-1] == "The job failed: It broke."


def test_what_a_step_said_is_kept_and_a_step_trained_again_overwrites(database):
    job_id = make_job(database, make_team(database))
    held = claim(database)
    for loss in (2.0, 1.0):
        metrics = [{"step": 1, "train_loss": 9.0}, {"step": 1, "train_loss": loss}]
        act(database, jobs.record, held, progress={"step": 1}, metrics=metrics, events=[NewEvent(f"loss {loss}")])
    with database.reading() as session:
        assert session.scalars(select(Metric.data)).all() == [{"step": 1, "train_loss": 1.0}]
    assert messages(database, job_id)[-2:] == ["loss 2.0", "loss 1.0"]


def test_however_much_a_step_said_it_is_as_many_statements(database):
    """The lease's beat waits for them, and a slow database may take seconds for each."""
    make_job(database, make_team(database))
    held = claim(database)

    def statements(metrics):
        asked = []

        def hear(_connection, _cursor, statement, *_):
            asked.append(statement.split("VALUES")[0])

        event.listen(database.engine, "before_cursor_execute", hear)
        act(database, jobs.record, held, progress={"step": 1}, metrics=metrics, events=[NewEvent("x")] * len(metrics))
        event.remove(database.engine, "before_cursor_execute", hear)
        return asked

    few, many = statements([{"step": 1}]), statements([{"step": step} for step in range(50)])
    assert few == many


def test_a_phase_begins_without_the_progress_of_the_one_before(database):
    job_id = make_job(database, make_team(database))
    held = claim(database)
    act(database, jobs.record, held, progress={"step": 9, "total_steps": 9})
    act(database, jobs.enter_phase, held, "grafting", "Grafting")
    assert (read(database, job_id).phase, read(database, job_id).progress) == ("grafting", None)


def test_a_phase_does_not_hide_a_cancel(database):
    job_id = make_job(database, make_team(database))
    held = claim(database)
    act(database, jobs.request_cancel, job_id)
    assert act(database, jobs.enter_phase, held, "grafting", "Grafting") == "cancel"
    assert read(database, job_id).phase == "cancelling"


def test_a_long_message_is_cut_and_not_refused(database):
    job_id = make_job(database, make_team(database))
    act(database, jobs.record, claim(database), progress=None, events=[NewEvent("x" * 5000)])
    assert len(messages(database, job_id)[-1]) == 2048


# --- the fence --------------------------------------------------------------------------------------------------------

UNDER_A_CLAIM = {
    "beat": lambda s, held, team: jobs.beat(s, held, lease_seconds=60),
    "enter_phase": lambda s, held, team: jobs.enter_phase(s, held, "grafting", "Grafting"),
    "record": lambda s, held, team: jobs.record(s, held, progress={}, metrics=[{"step": 1}], events=[NewEvent("x")]),
    "succeed": lambda s, held, team: jobs.succeed(s, held, outcome(held.job_id, team)),
    "fail": lambda s, held, team: jobs.fail(s, held, CAUSE),
    "finish_cancelled": lambda s, held, team: jobs.finish_cancelled(s, held),
    "put_back": lambda s, held, team: jobs.put_back(s, held, "why", charge="oom_level", delay_seconds=9),
    "add_point": lambda s, held, team: jobs.add_point(s, held, point(held)),
    "set_point_aside": lambda s, held, team: jobs.set_point_aside(s, held, point(held), "It is damaged"),
    "drop_old_points": lambda s, held, team: jobs.drop_old_points(s, held, point(held)),
}  # fmt: skip


def lose_by_expiry(database, held):
    expire(database, held.job_id)


def lose_by_a_newer_attempt(database, held):
    expire(database, held.job_id)
    sweep(database)
    assert claim(database, "worker-2") == Claim(held.job_id, held.attempt + 1)


def lose_by_a_cancel_after_the_lease(database, held):
    act(database, jobs.request_cancel, held.job_id)
    expire(database, held.job_id)
    sweep(database)
    assert read(database, held.job_id).status == "cancelled"


@pytest.mark.parametrize("lose", [lose_by_expiry, lose_by_a_newer_attempt, lose_by_a_cancel_after_the_lease])
def test_no_verb_of_a_worker_that_lost_its_lease_changes_anything(database, lose):
    team_id = make_team(database)
    make_job(database, team_id)
    held = claim(database)
    lose(database, held)
    before = snapshot(database)
    for name, verb in UNDER_A_CLAIM.items():
        with database.writing() as session:
            with pytest.raises(LeaseLost):
                verb(session, held, team_id)
            session.commit()  # even a caller that goes on has nothing to commit
        assert snapshot(database) == before, name


def test_a_claim_from_the_future_changes_nothing_either(database):
    team_id = make_team(database)
    job_id = make_job(database, team_id)
    claim(database)
    before = snapshot(database)
    for verb in UNDER_A_CLAIM.values():
        with database.writing() as session, pytest.raises(LeaseLost):
            verb(session, Claim(job_id, 2), team_id)
    assert snapshot(database) == before


def test_a_beat_moves_the_lease_by_the_databases_clock(database):
    job_id = make_job(database, make_team(database))
    held = claim(database, lease=5)
    first = read(database, job_id).lease_until
    act(database, jobs.beat, held, lease_seconds=500)
    assert 400 < (read(database, job_id).lease_until - first).total_seconds() <= 500


# --- claims -----------------------------------------------------------------------------------------------------------


def test_a_claim_takes_the_oldest_job_and_is_its_first_heartbeat(database):
    team_id = make_team(database)
    oldest, _ = make_job(database, team_id), make_job(database, team_id)
    held = claim(database, "worker-9")
    job = read(database, held.job_id)
    assert (job.id, held.attempt) == (oldest, 1)
    assert (job.phase, job.worker_id, job.attempt) == ("preparing", "worker-9", 1)
    assert job.lease_until > job.started_at


def test_a_team_with_fewer_running_jobs_goes_first(database):
    busy, idle = make_team(database, "busy"), make_team(database, "idle")
    for _ in range(3):
        make_job(database, busy)
    late = make_job(database, idle)
    claim(database)
    assert claim(database).job_id == late


def test_teams_take_turns_until_nothing_is_left(database):
    teams = [make_team(database, name) for name in ("red", "green", "blue")]
    for team_id in teams:
        for _ in range(4):
            make_job(database, team_id)
    order = [read(database, claim(database).job_id).team_id for _ in range(12)]
    assert all(set(order[start : start + 3]) == set(teams) for start in range(0, 12, 3))
    assert claim(database) is None


def test_a_lane_takes_only_what_it_can_hold(database):
    team_id = make_team(database)
    large, small = (make_job(database, team_id, memory_bytes=size) for size in (2000, 1000))
    assert claim(database, lane=1000).job_id == small
    assert claim(database, lane=1999) is None
    assert claim(database, lane=2000).job_id == large


def test_a_job_is_left_alone_before_its_time(database):
    job_id = make_job(database, make_team(database), not_before=db_now(100))
    assert claim(database) is None
    assert sweep(database).jobs is False
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == job_id).values(not_before=db_now(-1)))
        session.commit()
    assert sweep(database).jobs is True
    assert claim(database).job_id == job_id
    assert read(database, job_id).not_before is None


def test_a_job_put_back_waits_as_long_as_it_was_told(database):
    job_id = make_job(database, make_team(database))
    act(database, jobs.put_back, claim(database), "The hub is away", charge="infra_retries", delay_seconds=100)
    assert claim(database) is None
    assert (read(database, job_id).infra_retries, read(database, job_id).status) == (1, "queued")


def test_a_drained_job_is_free_at_once_and_pays_nothing(database):
    job_id = make_job(database, make_team(database))
    act(database, jobs.put_back, claim(database), "The worker drains")
    assert claim(database) == Claim(job_id, 2)
    assert read(database, job_id).infra_retries == 0
    assert messages(database, job_id)[-1] == "Fine-tuning job started again (attempt 2)"


def test_threads_that_claim_at_once_never_take_the_same_job(database):
    teams = [make_team(database, name) for name in ("red", "blue")]
    waiting = {make_job(database, teams[number % 2]) for number in range(50)}

    def work(number):
        taken = []
        while held := claim(database, f"worker-{number}"):
            taken.append(held)
        return taken

    taken = [held for each in run_together(16, work) for held in each]
    assert Counter(held.job_id for held in taken) == Counter(waiting)
    assert {held.attempt for held in taken} == {1}


# --- cancel, and its races --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", LIVE)
def test_a_cancel_repeated_changes_nothing_more(database, status):
    job_id = make_job(database, make_team(database), status)
    act(database, jobs.request_cancel, job_id)
    once = snapshot(database)
    act(database, jobs.request_cancel, job_id)
    assert snapshot(database) == once


def test_a_cancel_reaches_the_worker_with_its_next_beat(database):
    job_id = make_job(database, make_team(database))
    held = claim(database)
    assert act(database, jobs.beat, held, lease_seconds=60) == "run"
    act(database, jobs.request_cancel, job_id)
    assert act(database, jobs.beat, held, lease_seconds=60) == "cancel"
    assert read(database, job_id).status == "running"
    act(database, jobs.finish_cancelled, held)
    assert messages(database, job_id)[-1] == "The job has been cancelled"


@pytest.mark.parametrize("leave", [jobs.put_back, jobs.fail])
def test_a_job_that_is_cancelled_is_neither_finished_nor_put_back_nor_failed(database, leave):
    team_id = make_team(database)
    job_id = make_job(database, team_id)
    held = claim(database)
    act(database, jobs.request_cancel, job_id)
    assert act(database, jobs.succeed, held, outcome(job_id, team_id)) is False
    act(database, leave, held, CAUSE if leave is jobs.fail else "The worker drains")
    assert read(database, job_id).status == "cancelled"
    with database.reading() as session:
        assert session.scalars(select(Artifact)).all() == []


def test_a_hundred_cancels_at_once_are_one(database):
    job_id = make_job(database, make_team(database), "running")
    run_together(10, lambda _: [act(database, jobs.request_cancel, job_id) for _ in range(10)])
    assert len([message for message in messages(database, job_id) if message.startswith("Cancelling")]) == 1


def test_a_cancel_and_a_success_that_meet_leave_one_of_the_two(database):
    team_id = make_team(database)
    ends = Counter()
    for _ in range(30):
        job_id = make_job(database, team_id)
        held = claim(database)
        ends[race(database, job_id, lambda held=held: succeed_or_cancel(database, held, team_id))] += 1
    assert set(ends) <= {"succeeded", "cancelled"}


def succeed_or_cancel(database, held, team_id):
    """What the pipeline does at the end of a job."""
    with suppress(LeaseLost):
        if not act(database, jobs.succeed, held, outcome(held.job_id, team_id)):
            act(database, jobs.finish_cancelled, held)


def test_a_cancel_is_never_forgotten_by_a_worker_that_puts_the_job_back(database):
    team_id = make_team(database)
    for _ in range(30):
        job_id = make_job(database, team_id)
        held = claim(database)
        end = race(database, job_id, lambda held=held: act(database, jobs.put_back, held, "The worker drains"))
        assert end == "cancelled"


def test_a_cancel_is_never_forgotten_by_the_sweep(database):
    team_id = make_team(database)
    for _ in range(30):
        job_id = make_job(database, team_id)
        claim(database)
        expire(database, job_id)
        end = race(database, job_id, lambda: sweep(database))
        if end == "running":  # the sweep was first to look, and the next one ends it
            sweep(database)
        assert read(database, job_id).status == "cancelled"


def race(database, job_id, other):
    """A cancel and `other` at once: the status after both. A cancel that was refused must have been refused rightly."""

    def cancel():
        try:
            act(database, jobs.request_cancel, job_id)
        except Conflict:
            assert read(database, job_id).status in {"succeeded", "failed"}

    run_together(2, lambda number: cancel() if number else other())
    job, said = read(database, job_id), messages(database, job_id)
    ended = [m for m in said if m in {"The job has been cancelled", "The job has successfully completed"}]
    assert len(ended) == (job.status in jobs.TERMINAL)
    return job.status


# --- pause, resume, and their races -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["validating_files", "queued", "running", "paused"])
@pytest.mark.parametrize("verb", [jobs.request_pause, jobs.request_resume])
def test_a_pause_and_a_resume_repeated_change_nothing_more(database, status, verb):
    job_id = make_job(database, make_team(database), status)
    act(database, verb, job_id)
    once = snapshot(database)
    act(database, verb, job_id)
    assert snapshot(database) == once


@pytest.mark.parametrize("verb", [jobs.request_pause, jobs.request_resume])
@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled", "cancelling"])
def test_what_has_ended_is_neither_paused_nor_resumed(database, verb, status):
    state = {"status": "running", "wish": "cancel"} if status == "cancelling" else {"status": status}
    job_id = make_job(database, make_team(database), **state)
    before = snapshot(database)
    with pytest.raises(Conflict, match="is being cancelled" if status == "cancelling" else status) as caught:
        act(database, verb, job_id)
    assert caught.value.code == ("job_not_pausable" if verb is jobs.request_pause else "job_not_resumable")
    assert snapshot(database) == before


def test_a_running_job_is_paused_once_its_worker_has_left_it(database):
    job_id = make_job(database, make_team(database))
    held = claim(database)
    act(database, jobs.request_pause, job_id)
    assert act(database, jobs.beat, held, lease_seconds=60) == "pause"
    assert read(database, job_id).status == "running"
    act(database, jobs.put_back, held, None)
    job = read(database, job_id)
    assert (job.status, job.wish, job.phase, job.lease_until) == ("paused", "run", None, None)
    assert claim(database) is None
    act(database, jobs.request_resume, job_id)
    assert claim(database) == Claim(job_id, 2)
    assert messages(database, job_id)[-4:] == [
        "Pausing: the worker saves what it has done",
        "The job is paused",
        "The job is resumed",
        "Fine-tuning job started again (attempt 2)",
    ]


def test_a_pause_that_is_taken_back_in_time_leaves_the_job_in_the_queue(database):
    job_id = make_job(database, make_team(database))
    held = claim(database)
    act(database, jobs.request_pause, job_id)
    act(database, jobs.request_resume, job_id)
    assert act(database, jobs.beat, held, lease_seconds=60) == "run"
    act(database, jobs.put_back, held, None)
    assert read(database, job_id).status == "queued"


def test_a_job_that_was_never_admitted_is_resumed_to_where_it_was(database):
    job_id = make_job(database, make_team(database), "validating_files", spec=None)
    act(database, jobs.request_pause, job_id)
    assert act(database, jobs.admit, job_id, make_spec(job_id), memory_bytes=1) is False
    act(database, jobs.request_resume, job_id)
    assert read(database, job_id).status == "validating_files"


def test_a_resumed_job_waits_no_longer_for_what_it_had_waited_for(database):
    job_id = make_job(database, make_team(database), not_before=db_now(100))
    act(database, jobs.request_pause, job_id)
    act(database, jobs.request_resume, job_id)
    assert claim(database) == Claim(job_id, 1)


def test_a_job_whose_worker_dies_while_it_is_to_be_paused_is_paused(database):
    job_id = make_job(database, make_team(database))
    claim(database)
    act(database, jobs.request_pause, job_id)
    expire(database, job_id)
    assert sweep(database).lost == [job_id]
    job = read(database, job_id)
    assert (job.status, job.wish, job.lost_count) == ("paused", "run", 1)


def test_a_cancel_comes_before_a_pause_and_a_success_too(database):
    team_id = make_team(database)
    for end in ("cancelled", "succeeded"):
        job_id = make_job(database, team_id)
        held = claim(database)
        act(database, jobs.request_pause, job_id)
        if end == "cancelled":
            act(database, jobs.request_cancel, job_id)
            act(database, jobs.put_back, held, None)
        else:
            assert act(database, jobs.succeed, held, outcome(job_id, team_id))
        assert read(database, job_id).status == end


def test_owners_who_pause_resume_and_cancel_at_once_leave_one_state(database):
    team_id = make_team(database)
    for _ in range(15):
        job_id = make_job(database, team_id)
        held = claim(database)
        verbs = (jobs.request_pause, jobs.request_resume, jobs.request_cancel)

        def ask(number, job_id=job_id, held=held, verbs=verbs):
            with suppress(Conflict, LeaseLost):
                if number < 3:
                    act(database, verbs[number], job_id)
                else:
                    act(database, jobs.put_back, held, "The worker drains")

        run_together(4, ask)
        job = read(database, job_id)
        if job.status == "running":  # the worker was refused by nobody: it has not been heard yet
            pytest.fail("a job that was put back is still running")
        assert (job.status, job.lease_until) == ("cancelled", None)
        assert sum(said == "The job has been cancelled" for said in messages(database, job_id)) == 1


def test_a_worker_that_is_ended_while_it_drains_costs_its_job_nothing(database):
    job_id = make_job(
        database, make_team(database), "running", worker_id="worker-1", lost_count=2, lease_until=db_now(-1)
    )
    row = {"host": "h", "pid": 1, "queue": "jobs", "device": "cpu", "lane_memory_bytes": 1, "version": "1"}
    act(database, lambda session: session.add(Worker(id="worker-1", draining=True, **row)))
    assert sweep(database).lost == [job_id]
    job = read(database, job_id)
    assert (job.status, job.lost_count) == ("queued", 2)


# --- saved states, and jobs run again --------------------------------------------------------------------------------


def save(database, held, *steps, **values):
    for step in steps:
        act(database, jobs.add_point, held, point(held, step, **values))


def saved(database, job_id):
    with database.reading() as session:
        return [found.step for found in jobs.ready_points(session, job_id)]


def test_the_newest_saved_states_are_kept_and_the_others_are_to_be_deleted(database):
    job_id = make_job(database, make_team(database))
    held = claim(database)
    save(database, held, 10, 20, 30)
    save(database, held, 40, status="bad")
    assert act(database, jobs.drop_old_points, held, point(held, 30)) == [
        f"jobs/{job_id}/resume/a1/step-10",
        f"jobs/{job_id}/resume/a1/step-40",
    ]
    assert saved(database, job_id) == [30, 20]
    assert messages(database, job_id)[-1] == "Saved the training's state at step 40"


def test_saved_states_of_another_training_make_room_for_those_of_this_one(database):
    """As of a job that is run again, whose model or defaults have changed meanwhile."""
    job_id = make_job(database, make_team(database))
    held = claim(database)
    save(database, held, 300, 400, spec_sha256="of another training")
    save(database, held, 10)
    assert len(act(database, jobs.drop_old_points, held, point(held, 10))) == 2
    assert saved(database, job_id) == [10]


def test_a_saved_state_that_is_recorded_twice_is_there_once(database):
    """Of the first commit only the answer was lost."""
    job_id = make_job(database, make_team(database))
    held = claim(database)
    one = point(held, 10)
    for _ in range(2):
        act(database, jobs.add_point, held, point(held, 10, id=one.id))
    assert saved(database, job_id) == [10]
    assert sum("at step 10" in said for said in messages(database, job_id)) == 1


def test_a_saved_state_set_aside_is_not_gone_on_from(database):
    job_id = make_job(database, make_team(database))
    held = claim(database)
    save(database, held, 10, 20)
    with database.reading() as session:
        newest = jobs.ready_points(session, job_id)[0]
    act(database, jobs.set_point_aside, held, newest, "The state of step 20 is damaged")
    assert saved(database, job_id) == [10]
    assert messages(database, job_id)[-1] == "The state of step 20 is damaged"


def end_long_ago(database, job_id, status, seconds):
    with database.writing() as session:
        values = {"status": status, "phase": None, "lease_until": None, "finished_at": db_now(-seconds)}
        session.execute(update(Job).where(Job.id == job_id).values(**values))
        session.commit()


@pytest.mark.parametrize(
    ("status", "seconds", "kept"),
    [("succeeded", 0, []), ("cancelled", 0, []), ("failed", 3600, [10]), ("failed", 8 * 24 * 3600, [])],
)
def test_what_an_ended_job_saved_is_kept_only_where_it_can_be_run_again(database, status, seconds, kept):
    job_id = make_job(database, make_team(database))
    save(database, claim(database), 10)
    end_long_ago(database, job_id, status, seconds)
    gone = act(database, jobs.drop_ended_points)
    assert saved(database, job_id) == kept
    assert gone == ([] if kept else [f"jobs/{job_id}/resume/a1/step-10"])


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_job_run_again_is_a_new_one_that_goes_on_from_what_the_old_one_saved(database, status):
    team_id = make_team(database)
    old = make_job(database, team_id, suffix="mine", labels={"a": "b"})
    save(database, claim(database), 10, 20)
    end_long_ago(database, old, status, 1)

    new = act(database, jobs.retry, old)

    job, before = read(database, new.id), read(database, old)
    assert (job.status, job.parent_id, job.attempt) == ("validating_files", old, 0)
    assert (job.request, job.seed, job.suffix, job.labels) == (before.request, before.seed, "mine", {"a": "b"})
    assert saved(database, new.id) == [20, 10]
    assert messages(database, new.id)[-1] == f"This job runs {old} again from the state that it saved at step 20"
    assert before.status == status

    # The files stay as long as either job may go on from them.
    end_long_ago(database, old, "failed", 8 * 24 * 3600)
    assert act(database, jobs.drop_ended_points) == []
    end_long_ago(database, new.id, "succeeded", 0)
    assert len(act(database, jobs.drop_ended_points)) == 2


@pytest.mark.parametrize("status", [*LIVE, "succeeded"])
def test_only_what_failed_or_was_cancelled_is_run_again(database, status):
    job_id = make_job(database, make_team(database), status)
    before = snapshot(database)
    with pytest.raises(Conflict, match=status) as caught:
        act(database, jobs.retry, job_id)
    assert caught.value.code == "job_not_retryable"
    assert snapshot(database) == before


def test_a_spec_hash_tells_what_the_training_depends_on_and_nothing_else():
    spec = make_spec("ftjob-1")
    others = {"job_id": "ftjob-2", "fine_tuned_model": "ft:x", "graft": Graft(scale=2, scope="all")}
    assert spec.model_copy(update=others).training_sha256 == spec.training_sha256
    for name, value in {
        "seed": 2,
        "holdout_ratio": 0.2,
        "strategy": "direct",
        "training": spec.training.model_copy(update={"sha256": "1" * 64}),
        "tuning": spec.tuning.model_copy(update={"learning_rate": 2e-3}),
    }.items():
        assert spec.model_copy(update={name: value}).training_sha256 != spec.training_sha256, name


def test_what_a_return_to_the_queue_costs_is_counted_where_it_belongs(database):
    job_id = make_job(database, make_team(database))
    for budget in ("infra_retries", "stall_count", "disk_waits", "oom_level"):
        act(database, jobs.put_back, claim(database), budget, charge=budget)
        with database.reading() as session:
            assert getattr(jobs.budgets(session, job_id), budget) == 1


def test_a_job_that_gets_on_gets_its_budgets_back_and_one_that_goes_in_circles_does_not(database):
    job_id = make_job(database, make_team(database))
    budgets = ("infra_retries", "stall_count", "disk_waits", "oom_level", "lost_count")

    def spent_after(*steps):
        with database.writing() as session:
            session.execute(update(Job).where(Job.id == job_id).values(dict.fromkeys(budgets, 1)))
            session.commit()
        save(database, held, *steps)
        job = read(database, job_id)
        return [name for name in budgets if getattr(job, name)]

    held = claim(database)
    assert spent_after(10) == ["oom_level"]
    assert spent_after(20) == ["oom_level"]
    assert spent_after(15, 20) == list(budgets)
    assert spent_after(21) == ["oom_level"]


def test_waits_for_room_on_a_disk_grow_to_a_quarter_of_an_hour():
    assert [jobs.disk_wait_seconds(waited) for waited in range(6)] == [60, 120, 240, 480, 900, 900]


def test_the_time_that_workers_had_a_job_is_summed_over_its_attempts(database):
    job_id = make_job(database, make_team(database))
    for _ in range(2):
        held = claim(database)
        act(database, jobs.beat, held, lease_seconds=60, ran_seconds=1.5)
        act(database, jobs.put_back, held, "The worker drains")
    assert read(database, job_id).run_seconds == 3.0


# --- the sweep --------------------------------------------------------------------------------------------------------


def test_a_sweep_takes_a_job_from_a_worker_that_stopped_beating(database):
    team_id = make_team(database)
    dead, alive = make_job(database, team_id), make_job(database, team_id)
    claim(database), claim(database)
    expire(database, dead)
    waiting = sweep(database)
    assert (waiting.lost, waiting.jobs) == ([dead], True)
    assert [read(database, job_id).status for job_id in (dead, alive)] == ["queued", "running"]
    assert read(database, dead).lost_count == 1
    assert sweep(database).lost == []


def test_a_job_that_loses_its_workers_is_not_tried_for_ever(database):
    job_id = make_job(database, make_team(database))
    for attempt in (1, 2, 3):
        assert claim(database) == Claim(job_id, attempt)
        expire(database, job_id)
        sweep(database, max_lost_workers=3)
    job = read(database, job_id)
    assert (job.status, job.error["code"], job.error["fault"]) == ("failed", "worker_lost", "infrastructure")
    assert claim(database) is None


def test_a_sweep_ends_what_was_to_be_cancelled_when_its_worker_died(database):
    job_id = make_job(database, make_team(database))
    claim(database)
    act(database, jobs.request_cancel, job_id)
    expire(database, job_id)
    sweep(database, max_lost_workers=1)
    assert read(database, job_id).status == "cancelled"


def test_a_cancel_does_not_wait_out_the_lease_of_a_worker_that_has_fallen_silent(database):
    team_id = make_team(database)
    silent, beating, _not_cancelled = (make_job(database, team_id) for _ in range(3))
    held = [claim(database, lease=20), claim(database, lease=60), claim(database, lease=20)]
    for job_id in (silent, beating):
        act(database, jobs.request_cancel, job_id)
    assert sweep(database).lost == [silent]
    assert [read(database, one.job_id).status for one in held] == ["cancelled", "running", "running"]
    with pytest.raises(LeaseLost):
        act(database, jobs.beat, held[0], lease_seconds=60)


def test_sweeps_at_once_take_a_job_back_once(database):
    team_id = make_team(database)
    for _ in range(10):
        expire(database, make_job(database, team_id, "running"))

    lost = [job_id for each in run_together(4, lambda _: sweep(database).lost) for job_id in each]
    assert len(lost) == len(set(lost)) == 10
    with database.reading() as session:
        assert set(session.scalars(select(Job.lost_count))) == {1}


def test_a_sweep_says_what_waits(database):
    team_id = make_team(database)
    idle = sweep(database)
    assert (idle.jobs, idle.admissions, idle.files) == (False, False, False)
    make_job(database, team_id, "validating_files")
    file = {"team_id": team_id, "filename": "f", "purpose": "fine-tune", "bytes": 1, "sha256": "0", "storage_key": "k"}
    with database.writing() as session:
        session.add(File(id="file-1", status="uploaded", **file))
        session.add(File(id="file-2", status="uploaded", check_lease_until=db_now(60), **file))
        session.commit()
    assert (sweep(database).admissions, sweep(database).files) == (True, True)
    act(database, lambda session: session.execute(delete(File).where(File.id == "file-1")))
    assert sweep(database).files is False


def make_worker(database, queue="jobs", **values):
    with database.writing() as session:
        worker = Worker(id=new_id("worker-"), host="h", pid=1, queue=queue, device="cpu", version="1", **values)
        session.add(worker)
        session.commit()


def test_a_sweep_forgets_workers_that_are_long_gone(database):
    make_worker(database, lane_memory_bytes=1, beat_at=db_now(-61))
    make_worker(database, lane_memory_bytes=2, beat_at=db_now(-30))
    sweep(database)
    with database.reading() as session:
        assert session.scalars(select(Worker.lane_memory_bytes)).all() == [2]


def test_a_job_that_does_not_move_says_why(database):
    job_id = make_job(database, make_team(database), memory_bytes=3 * 2**30)

    def why():
        with database.reading() as session:
            lanes_of = partial(jobs.living_lanes, session, stale_worker_seconds=60)
            return jobs.waiting_for(session.get_one(Job, job_id), lanes_of)

    assert "No worker for the queue 'jobs'" in why()
    make_worker(database, lane_memory_bytes=4 * 2**30, draining=True)
    make_worker(database, "light", lane_memory_bytes=4 * 2**30)
    assert "No worker for the queue 'jobs'" in why()
    make_worker(database, lane_memory_bytes=2 * 2**30)
    assert why() == "The job needs about 3.0 GiB and the largest lane holds 2.0 GiB; it waits for a larger worker."
    make_worker(database, lane_memory_bytes=3 * 2**30)
    assert why() is None


# --- events and constraints -------------------------------------------------------------------------------------------


def test_events_written_at_once_are_numbered_without_a_gap(database):
    job_id = make_job(database, make_team(database), "running")
    held = Claim(job_id, 1)

    def work(number):
        for turn in range(10):
            said = [NewEvent(f"{number}.{turn}.{part}") for part in range(random.randint(1, 3))]
            if number % 2:
                act(database, jobs.record, held, progress=None, events=said)
            else:
                act(database, jobs.add_events, job_id, said)

    run_together(6, work)
    found = events(database, job_id)
    assert [event.seq for event in found] == list(range(1, len(found) + 1))
    assert read(database, job_id).event_count == len(found)
    for number in range(6):  # each writer's own stay in its order
        own = [event.message for event in found if event.message.startswith(f"{number}.")]
        assert own == sorted(own)


def test_what_strangers_files_say_is_kept_without_what_a_database_or_an_answer_cannot_hold(database):
    odd = "a\ud800b\0c\\u0000 😀"
    data = {"remarks": [odd, 1.5, None], odd: {"deep": odd}, "plain": ["\\ud800", True]}
    job_id = make_job(database, make_team(database), labels={"face": "😀"})
    act(database, jobs.add_events, job_id, [NewEvent(odd, data=data)])
    kept, clean = events(database, job_id)[-1], r"a\ud800b\0c\u0000 😀"
    assert kept.message == clean
    assert kept.data == {"remarks": [clean, 1.5, None], clean: {"deep": clean}, "plain": ["\\ud800", True]}
    assert read(database, job_id).labels == {"face": "😀"}


def test_a_write_that_is_rolled_back_leaves_no_gap(database):
    job_id = make_job(database, make_team(database))
    with database.writing() as session:
        jobs.add_events(session, job_id, [NewEvent("never")])
        session.rollback()
    act(database, jobs.add_events, job_id, [NewEvent("kept")])
    assert [event.seq for event in events(database, job_id)] == [1, 2, 3]


IMPOSSIBLE = {
    "an unknown status": {"status": "done"},
    "an unknown wish": {"wish": "stop"},
    "running without a lease or a phase": {"status": "running"},
    "running without a lease": {"status": "running", "phase": "training"},
    "queued with a lease": {"status": "queued", "lease_until": db_now(9)},
    "ended with a phase": {"status": "succeeded", "phase": "publishing"},
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_the_database_refuses_a_row_that_no_verb_could_write(database, name):
    job_id = make_job(database, make_team(database))
    with database.writing() as session, pytest.raises(IntegrityError):
        session.execute(update(Job).where(Job.id == job_id).values(**IMPOSSIBLE[name]))


# --- admissions tried again -------------------------------------------------------------------------------------------


def test_a_postponed_admission_waits_says_why_and_ends_once_its_retries_are_spent(database):
    job_id = make_job(database, make_team(database), status="validating_files")

    for tried in range(2):
        act(database, jobs.postpone, job_id, CAUSE, max_retries=2)
        assert (read(database, job_id).status, read(database, job_id).infra_retries) == ("validating_files", tried + 1)
        assert not act(database, lambda session: session.scalars(select(Job.id).where(jobs.admissible())).all())
    act(database, jobs.postpone, job_id, CAUSE, max_retries=2)

    assert read(database, job_id).status == "failed"
    assert sum("is tried again in about" in message for message in messages(database, job_id)) == 2
