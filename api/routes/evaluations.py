"""A job's evaluation: untouched, tuned and grafted, side by side."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from api.deps import CallerDep, ServiceDep
from api.routes.jobs import own_job
from api.strict_json import StrictRoute
from core.errors import Conflict
from core.models import Job

router = APIRouter(prefix="/fine_tuning/jobs/{job_id}/evaluation", tags=["Fine-tuning jobs"], route_class=StrictRoute)


@router.get("")
def retrieve_evaluation(job_id: str, caller: CallerDep, service: ServiceDep) -> dict[str, Any]:
    """Loss and exact match of every variant on every set, a few answers, and a verdict in plain words. Of a graft:
    its target and each graft, on rows which the source job held out."""
    with service.database.reading() as session:
        job = own_job(session, job_id, caller)
    if job.evaluation is None:
        raise _no_evaluation(job)
    return job.evaluation


def _no_evaluation(job: Job) -> Conflict:
    if job.status == "succeeded" and job.spec is not None:
        why = job.spec["evaluation"]["left_out"]
        return Conflict(f"The job {job.id} compared no models: {why}.", code="evaluation_left_out")
    return Conflict(f"The job {job.id} has no evaluation: its status is '{job.status}'.", code="evaluation_not_ready")
