"""Lists and their cursors rest on ids: what is committed later is listed later, whoever began first."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from sqlalchemy import select

from core import files, uploads
from core.errors import Conflict
from core.ids import new_id
from core.models import File, Upload
from tests.core.test_jobs import make_team


def new_file(team_id):
    return File(
        team_id=team_id, filename="rows.jsonl", purpose="fine-tune", bytes=1, sha256="0" * 64, storage_key=new_id("k-")
    )


def test_ids_of_one_millisecond_come_in_order():
    made = [new_id("") for _ in range(2000)]
    assert all(earlier < later for earlier, later in pairwise(made))


def test_a_file_that_is_committed_later_has_a_later_id(database):
    """Whoever reads on behind the newest file that he has seen misses none."""
    team_id = make_team(database)

    def add(count):
        for _ in range(count):
            with database.writing() as session:
                files.add(session, new_file(team_id), lifetime_seconds=None)
                session.commit()

    seen = []
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(add, 15) for _ in range(4)]
        while not all(writer.done() for writer in writers):
            seen += behind(database, seen)
    for writer in writers:
        writer.result()
    seen += behind(database, seen)
    assert len(seen) == len(set(seen)) == 60


def behind(database, seen):
    with database.reading() as session:
        return list(session.scalars(select(File.id).where(File.id > (seen[-1] if seen else "")).order_by(File.id)))


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_cancel_sees_the_completion_that_came_between(database):
    team_id = make_team(database)
    with database.writing() as session:
        upload = Upload(
            id=new_id("upload_"), team_id=team_id, filename="f", purpose="fine-tune", bytes=1, mime_type="text/plain"
        )
        upload.status = "pending"
        uploads.create(session, upload)
        session.commit()
    with database.writing() as cancelling:
        cancelling.get_one(Upload, upload.id)  # as the route has looked whose it is
        with database.writing() as completing:
            held = uploads.require_pending(completing, upload.id)
            uploads.complete(completing, held, new_file(team_id), [], None)
            completing.commit()
        with pytest.raises(Conflict, match="completed"):
            uploads.cancel(cancelling, upload.id)
