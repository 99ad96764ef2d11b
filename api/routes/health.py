"""Whether this process lives, and whether it can serve."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from api.deps import ServiceDep

router = APIRouter(tags=["Health"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """This process answers."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(service: ServiceDep) -> JSONResponse:
    """Whether requests can be served: database, schema and disk; where they cannot, the status is 503. A broker or
    workers that are away delay jobs and make it `degraded`, no more."""
    answer = service.readiness.answer()
    return JSONResponse(answer, status_code=503 if answer["status"] == "unavailable" else 200)
