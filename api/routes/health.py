"""Whether this process lives, and whether it can serve."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from sqlalchemy import func, select

from api.deps import ServiceDep
from core.db import db_now
from core.models import Worker

router = APIRouter(tags=["Health"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """This process answers."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(service: ServiceDep) -> dict[str, Any]:
    """The database answers. Workers that are away delay jobs and are reported, but requests can be served."""
    with service.database.reading() as session:
        alive = Worker.beat_at > db_now(-service.settings.lease_seconds)
        counts = session.execute(select(Worker.queue, func.count()).where(alive).group_by(Worker.queue)).all()
    workers = {"jobs": 0, "light": 0, **dict(counts)}
    return {"status": "ok" if all(workers.values()) else "degraded", "workers": workers}
