"""A job's evaluation: untouched, tuned and grafted, side by side."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from api.deps import CallerDep, ServiceDep
from api.routes.jobs import own_job
from core.errors import Conflict

router = APIRouter(prefix="/fine_tuning/jobs/{job_id}/evaluation", tags=["Fine-tuning jobs"])


@router.get("")
def retrieve_evaluation(job_id: str, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """Loss and exact match of every variant on every set, a few answers, and a verdict in plain words."""
    with service.database.reading() as session:
        job = own_job(session, job_id, caller)
    if job.evaluation is None:
        raise Conflict(
            f"The job {job_id} has no evaluation: its status is '{job.status}'.", code="evaluation_not_ready"
        )
    return job.evaluation
