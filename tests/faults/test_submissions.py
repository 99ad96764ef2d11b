"""An API that dies around a commit, and one that runs out of something: one job or none, never half of one."""

from __future__ import annotations

import httpx
import pytest
from sqlalchemy import func, select

from core.ids import new_id
from core.models import Job
from tests.faults.checker import check
from tests.faults.faults import MODEL
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


@pytest.mark.slow
def test_an_api_without_descriptors_answers_again_once_it_has_some(service):
    """F50."""
    import resource

    service.submit()
    pid = service.parts["api"].pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (8, limits[1]))
    codes = set()
    with service.http as http:
        for _ in range(5):
            try:
                body = {"model": MODEL, "training_file": service._file, "metadata": {"steps": "1"}}
                answer = http.post("/v1/fine_tuning/jobs", json=body, timeout=3)
            except httpx.TransportError:
                continue
            codes.add(answer.status_code)
            if answer.status_code == 200:
                service.accepted.append(answer.json()["id"])
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    wait_until(lambda: service.submit(), seconds=30)
    service.wait(service.accepted)
    check(service)
    assert service.parts["api"].pid == pid
    assert codes <= {200, 500, 503}
