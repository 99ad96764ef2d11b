"""The HTTP side of `core.idempotency`: which headers make two requests one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from fastapi import Depends, Header, Request, Response
from sqlalchemy.orm import Session

from api.deps import CallerDep, json_answer
from core.idempotency import Intent, earlier_answer, remember

Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern="^[ -~]+$",
        description="Any text of yours, unique to what you want made once. A request with the same key and body gets "
        "the first one's answer again, for 24 hours; one with the same key and another body is an error. Without a key "
        "the SDK's own retries (`x-stainless-retry-count` above 0) make nothing twice either.",
    ),
]
RetryCount = Annotated[str, Header(alias="x-stainless-retry-count", include_in_schema=False)]


async def _bare_intent(request: Request, caller: CallerDep, key: Key = None, retry_count: RetryCount = "0") -> Intent:
    return Intent(
        team_id=caller.team_id,
        route=f"{request.method} {request.url.path.rstrip('/')}",
        body_sha256=hashlib.sha256(b"").hexdigest(),
        key=key,
        is_retry=retry_count.strip("0") != "",
    )


#: Of a route that reads no body.
BareIntentDep = Annotated[Intent, Depends(_bare_intent)]


async def _intent(request: Request, bare: BareIntentDep) -> Intent:
    canonical = json.dumps(await request.json(), sort_keys=True)
    return replace(bare, body_sha256=hashlib.sha256(canonical.encode()).hexdigest())


IntentDep = Annotated[Intent, Depends(_intent)]


def replayed(session: Session, intent: Intent) -> Response | None:
    """The answer that this intent got before; None: it is new, and whoever repeats it waits for this session."""
    answer = earlier_answer(session, intent)
    if answer is None:
        return None
    return Response(answer, media_type="application/json", headers={"idempotent-replayed": "true"})


def first_answer(session: Session, intent: Intent, value: dict[str, Any]) -> Response:
    """The answer, kept for whoever repeats the request. The caller commits."""
    remember(session, intent, msgspec.json.encode(value).decode())
    return json_answer(value)
