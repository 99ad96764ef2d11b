"""A training's saved states on their way into storage and back, without a training."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from core import jobs
from core.errors import Unavailable
from core.storage import LocalStorage
from tests.core.test_jobs import claim, make_job, make_spec, make_team, messages
from tests.servers import wait_until
from tests.worker.toy_train import save
from worker.lease import Lease
from worker.resume_manifest import MANIFEST_FILE
from worker.resume_points import Place, PointKeeper, discard, restore
from worker.workspace import open_workspace

pytestmark = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)

SPEC = make_spec("ftjob-1")


@pytest.fixture
def place(settings, database):
    make_job(database, make_team(database))
    held = claim(database)
    workspace = open_workspace(settings.work_dir, held.job_id, held.attempt)
    workspace.inputs.mkdir()
    with Lease(lambda: "run", lease_seconds=60, beat_seconds=60, draining=threading.Event()) as lease:
        yield Place(held, workspace, database, LocalStorage(settings.storage_dir), lease)


def keep(place, *steps):
    with PointKeeper(place) as keeper:
        for step in steps:
            store(place, keeper, step)


def store(place, keeper, step):
    save(place.workspace, SPEC.training_sha256, step)
    keeper.take(step)
    wait_until(lambda: step in saved(place), seconds=20)


def saved(place):
    return [point.step for point in place.read(jobs.ready_points)]


def restored(place):
    point = restore(place, SPEC)
    return point and point.step


def execute(place, statement):
    with place.database.writing() as session:
        session.execute(text(statement))
        session.commit()


def elsewhere(place):
    """Another machine, where nothing was left."""
    shutil.rmtree(place.workspace.step("train"))


def test_states_are_stored_also_after_an_error_of_the_database(place):
    execute(place, "CREATE TRIGGER stuck BEFORE DELETE ON resume_point BEGIN SELECT RAISE(ABORT, 'no deleting'); END")
    with PointKeeper(place) as keeper, capture_logs() as logs:
        for step in (1, 2, 3):
            store(place, keeper, step)
        wait_until(lambda: "resume_point_crashed" in [entry["event"] for entry in logs])
        execute(place, "DROP TRIGGER stuck")
        store(place, keeper, 4)
    assert saved(place) == [4, 3]


def test_a_storage_that_is_away_for_a_moment_costs_no_state(place):
    keep(place, 1, 2)
    elsewhere(place)
    folder = place.storage.path("jobs")
    folder.rename(folder.with_name("unmounted"))
    with pytest.raises(Unavailable, match="cannot be read just now") as caught:
        restore(place, SPEC)
    assert caught.value.cause.retryable
    folder.with_name("unmounted").rename(folder)
    assert (saved(place), restored(place)) == ([2, 1], 2)


def test_a_state_that_was_not_stored_is_gone_on_from_where_it_lies(place):
    keep(place, 5)
    save(place.workspace, SPEC.training_sha256, 9)
    assert restored(place) == 9
    shutil.rmtree(place.workspace.step("train"))  # as each begin of the step does
    assert (place.workspace.resume_from / "state").is_file()
    assert restored(place) == 9, "the attempt died before it had saved another"

    discard(place, restore(place, SPEC), "The trainer refused it.")
    assert (restored(place), saved(place)) == (5, [5])


@pytest.mark.parametrize("damage", ["its bytes", "its place", "its training"])
def test_what_lies_here_is_not_gone_on_from_where_anything_is_wrong_with_it(place, damage, tmp_path):
    keep(place, 5)
    save(place.workspace, "another training" if damage == "its training" else SPEC.training_sha256, 9)
    if damage == "its bytes":
        (place.workspace.resume_points / "step-9" / "state").write_bytes(b"x" * 100_000)
    if damage == "its place":  # a link that a child left
        place.workspace.resume_points.rename(tmp_path / "resume")
        place.workspace.resume_points.symlink_to(tmp_path / "resume")
    assert restored(place) == 5


def test_states_of_another_training_or_format_are_set_aside_at_once(place):
    keep(place, 1, 2)
    elsewhere(place)
    manifest = place.storage.path(place.read(jobs.ready_points)[0].prefix) / MANIFEST_FILE
    manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | {"format": 2}))
    assert (restored(place), saved(place)) == (1, [1])

    other = SPEC.model_copy(update={"snapshots": ("of a model that was exchanged on disk",)})
    assert (restore(place, other), saved(place)) == (None, [])
    said = messages(place.database, place.claim.job_id)
    assert "written in format 2; this version reads 1" in said[-3]
    assert "by a training with another spec" in said[-2]
    assert said[-1].startswith("No saved state can be gone on from")
