"""What a sweep removes from storage, and what it leaves alone."""

from __future__ import annotations

import os
import threading
import time

import pytest
from sqlalchemy import select

from core import files, jobs, pair_checks, uploads
from core.db import db_now
from core.ids import new_id
from core.models import File, PairCheck, Upload, UploadPart, Worker
from core.storage import LocalStorage
from tests.core.test_jobs import act, make_job, make_team
from worker.cleaning import forget_pair_checks, remove_expired, remove_strays
from worker.pipeline import Context
from worker.sweep import Sweeper


@pytest.fixture
def context(settings, database):
    storage = LocalStorage(settings.storage_dir)
    return Context(settings=settings, database=database, storage=storage, device="cpu", draining=threading.Event())


@pytest.fixture
def team_id(database):
    return make_team(database)


@pytest.fixture
def store(context, team_id):
    """`store(**fields)`: the id of a file that lies in storage."""

    def make(**fields):
        key = put(context, new_id(f"files/{team_id}/"))
        file = File(team_id=team_id, filename="r", purpose="fine-tune", bytes=1, sha256="0" * 64, storage_key=key)
        act(context.database, files.add, file, lifetime_seconds=None)
        act(context.database, lambda session: set_fields(session.get_one(File, file.id), fields))
        return file.id

    return make


@pytest.fixture
def begin(context, team_id):
    """`begin(**fields)`: the id of an upload of which one part lies in storage."""

    def make(**fields):
        upload = Upload(
            id=new_id("upload_"), team_id=team_id, filename="r", mime_type="m", purpose="fine-tune", bytes=1
        )
        part_id = new_id("part_")
        key = put(context, f"uploads/{part_id}")
        part = UploadPart(id=part_id, upload_id=upload.id, bytes=1, sha256="0" * 64, storage_key=key)
        act(context.database, uploads.create, upload)
        act(context.database, uploads.add_part, part, quota_bytes=None)
        act(context.database, lambda session: set_fields(session.get_one(Upload, upload.id), fields))
        return upload.id

    return make


def set_fields(row, fields):
    for name, value in fields.items():
        setattr(row, name, value)


def put(context, key):
    incoming = context.storage.receive(key)
    incoming.write(b"x")
    incoming.keep()
    return key


def stored(context):
    return sorted(path.name for path in context.settings.storage_dir.rglob("*") if path.is_file())


def make_old(context):
    for path in context.settings.storage_dir.rglob("*"):
        os.utime(path, (time.time() - 4000, time.time() - 4000))


def read(context, table, row_id):
    with context.database.reading() as session:
        return session.get(table, row_id)


def test_an_expired_file_goes_and_the_others_stay(context, store):
    late, early, for_ever = store(expires_at=db_now(-1)), store(expires_at=db_now(60)), store()
    remove_expired(context.database, context.storage)
    assert len(stored(context)) == 2
    assert read(context, File, late) is None
    for kept in (early, for_ever):
        assert context.storage.path(read(context, File, kept).storage_key).is_file()


def test_an_expired_file_stays_while_a_live_job_reads_it(context, store, team_id):
    file_id = store(expires_at=db_now(-1))
    job_id = make_job(context.database, team_id, training_file_id=file_id)
    remove_expired(context.database, context.storage)
    assert len(stored(context)) == 1
    act(context.database, jobs.request_cancel, job_id)
    remove_expired(context.database, context.storage)
    assert stored(context) == []


def test_an_upload_whose_hour_is_over_expires_with_its_parts(context, begin):
    late, early = begin(expires_at=db_now(-1)), begin()
    remove_expired(context.database, context.storage)
    assert len(stored(context)) == 1
    assert (read(context, Upload, late).status, read(context, Upload, early).status) == ("expired", "pending")


def test_what_no_row_names_goes_once_it_is_old(context, store, begin):
    store()
    begin()
    kept = stored(context)
    put(context, "files/team-x/file-stray")
    put(context, "uploads/part_stray")
    half = context.storage.receive("files/team-x/file-half")
    half.write(b"half")
    remove_strays(context.database, context.storage)
    assert len(stored(context)) == len(kept) + 3, "it may be on its way into the database still"
    make_old(context)
    remove_strays(context.database, context.storage)
    assert stored(context) == kept
    half.drop()  # whose file is gone already


def test_a_jobs_artifacts_are_no_strays(context):
    put(context, "jobs/ftjob-1/a1/model/w")
    make_old(context)
    remove_strays(context.database, context.storage)
    assert stored(context) == ["w"]


@pytest.mark.parametrize(
    ("status", "attempt", "kept"),
    [
        ("failed", 2, []),
        ("cancelled", 2, []),
        ("succeeded", 2, ["a2"]),
        ("queued", 2, ["a1", "a2"]),
        ("running", 2, ["a1", "a2"]),
        ("paused", 2, ["a1", "a2"]),
    ],
)
def test_what_was_to_be_published_goes_with_a_job_that_ended_otherwise(context, team_id, status, attempt, kept):
    """Also where no worker was there to see it end: cancelled in the queue, or given up by a sweep."""
    job_id = make_job(context.database, team_id, status, attempt=attempt)
    for number in (1, 2):
        put(context, f"jobs/{job_id}/a{number}/model/w")
    put(context, f"jobs/{job_id}/resume/a1/step-1/state")
    remove_strays(context.database, context.storage)
    folder = context.settings.storage_dir / "jobs" / job_id
    assert sorted(path.name for path in folder.glob("a*")) == kept
    assert (folder / "resume/a1/step-1/state").exists(), "it may be on its way into the database still"


def check_pair(context, team_id, status="completed", **fields):
    pair_check = PairCheck(
        id=new_id("pchk_"), team_id=team_id, base={}, instruct={}, depth="full", status=status, findings=[], **fields
    )
    act(context.database, lambda session: session.add(pair_check))
    return pair_check.id


def pair_check_ids(context):
    with context.database.reading() as session:
        return set(session.scalars(select(PairCheck.id)))


def test_ended_pair_checks_are_kept_for_thirty_days(context, team_id):
    month = 30 * 24 * 3600
    check_pair(context, team_id, finished_at=db_now(-month - 1))
    check_pair(context, team_id, "failed", finished_at=db_now(-month - 1))
    young = check_pair(context, team_id, finished_at=db_now(60 - month))
    waiting = check_pair(context, team_id, "queued", created_at=db_now(-month - 1))
    forget_pair_checks(context.database)
    assert pair_check_ids(context) == {young, waiting}


def test_of_a_team_the_newest_ended_pair_checks_are_kept(context, team_id, monkeypatch):
    monkeypatch.setattr(pair_checks, "KEPT_OF_A_TEAM", 2)
    waiting = check_pair(context, team_id, "running")
    mine = sorted(check_pair(context, team_id, finished_at=db_now()) for _ in range(4))
    other = check_pair(context, make_team(context.database, "red"), finished_at=db_now())
    forget_pair_checks(context.database)
    assert pair_check_ids(context) == {waiting, *mine[2:], other}


@pytest.fixture
def sweep(context):
    """`sweep()`: as a worker does it."""
    row = {"host": "h", "pid": 1, "queue": "light", "device": "cpu", "lane_memory_bytes": 1, "version": "1"}
    return Sweeper(context, lambda: Worker(id="worker-1", **row), announce=print).sweep


def test_every_workers_sweep_does_it(context, store, team_id, sweep):
    store(expires_at=db_now(-1))
    check_pair(context, team_id, finished_at=db_now(-(10**7)))
    put(context, "uploads/part_stray")
    make_old(context)
    sweep()
    assert stored(context) == []
    assert pair_check_ids(context) == set()


def test_workspaces_of_jobs_that_have_ended_go_and_those_of_live_ones_stay(context, team_id, sweep):
    work = context.settings.work_dir
    live = [make_job(context.database, team_id, status) for status in ("queued", "running", "paused")]
    ended = [make_job(context.database, team_id, status) for status in ("succeeded", "failed", "cancelled")]
    for job_id in (*live, *ended, "ftjob-unknown"):
        leave_behind(work / f"{job_id}-a12")
    sweep()
    assert {folder.name for folder in work.iterdir()} == {f"{job_id}-a12" for job_id in live}


def test_a_workspace_that_goes_while_it_is_looked_at_holds_up_no_sweep(context, sweep):
    work = context.settings.work_dir
    leave_behind(work / "ftjob-1-a1")
    (work / "ftjob-2-a1").symlink_to(work / "nowhere")  # what it looks like to whoever has just read its name
    sweep()
    assert [path.name for path in work.iterdir()] == ["ftjob-2-a1"]


def leave_behind(folder):
    folder.mkdir(parents=True)
    os.utime(folder, (time.time() - 100, time.time() - 100))
