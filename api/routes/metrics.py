"""Prometheus' view of the service."""

from __future__ import annotations

import hmac
from ipaddress import ip_address

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from api.deps import ServiceDep
from api.errors import ErrorBody
from api.telemetry import Telemetry
from core.errors import AuthenticationFailed

router = APIRouter(tags=["Health"])

#: What a proxy adds: then this machine's own address is the proxy's, and says nothing about who asks.
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {
            "description": "Prometheus' text format.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
        401: {"model": ErrorBody, "description": "Not this machine, and not the token of the metrics."},
    },
)
def metrics(request: Request, service: ServiceDep) -> Response:
    """Requests, jobs by state, the age of what waits, durations of phases, workers, this process.

    Open to this machine itself; from elsewhere it needs `Authorization: Bearer` with the operator's
    `SHADOWFT_METRICS_TOKEN`, which opens nothing else. Without that setting it is closed to others.
    """
    token = service.settings.metrics_token.get_secret_value()
    if not (_is_local(request) or _has_token(request, token)):
        raise AuthenticationFailed(
            "/metrics is open to the server itself; from elsewhere send the header `Authorization: Bearer TOKEN` with "
            "the token that the operator has set as SHADOWFT_METRICS_TOKEN.",
            code="invalid_metrics_token",
        )
    telemetry: Telemetry = request.app.state.telemetry
    return Response(telemetry.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


def _is_local(request: Request) -> bool:
    if request.client is None or any(name in request.headers for name in _FORWARDED):
        return False
    try:
        return ip_address(request.client.host).is_loopback
    except ValueError:  # the name of a test's or a socket's client
        return False


def _has_token(request: Request, token: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return bool(token) and scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())
