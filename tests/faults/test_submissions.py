"""An API that dies around a commit, and one that runs out of something: one job or none, never half of one."""

from __future__ import annotations

import httpx
import pytest
from sqlalchemy import func, select

from core.ids import new_id
from core.models import Job
from tests.faults.checker import check
from tests.servers import wait_until

#: They share their services.
pytestmark = pytest.mark.xdist_group("faults")


def order_death(service, when):
    (service.data_dir / "die-at-commit").write_text(when)


def count(service):
    with service.database.reading() as session:
        return session.scalar(select(func.count()).select_from(Job))


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_api_that_dies_at_a_commit_makes_one_job_of_two_tries(service, when):
    """F01, F02: the client hears nothing, tries again with the same key, and there is one job."""
    service.submit()
    key, before = new_id("try-"), count(service)
    order_death(service, when)
    with pytest.raises(httpx.TransportError):
        service.submit(key=key)
    wait_until(lambda: not service.parts["api"].is_alive())
    assert count(service) == before + (when == "after")
    service.start("api")
    first = service.submit(key=key)
    assert service.submit(key=key) == first
    assert count(service) == before + 1
    service.wait(first)
    check(service)


def test_a_job_whose_nudge_died_with_the_api_starts_at_the_next_sweep(service):
    """F03: the commit stands, nobody was told, no client asks again."""
    service.submit()
    order_death(service, "after")
    with pytest.raises(httpx.TransportError):
        service.submit()
    with service.database.reading() as session:
        newest = session.scalars(select(Job.id).order_by(Job.id.desc()).limit(1)).one()
    service.accepted.append(newest)
    service.wait([newest], seconds=30)
    check(service)
