"""Who may come in.

A middleware around the whole app, so that a route cannot be forgotten and a wrong key is refused at the headers,
before one byte of a body is read. What needs no key is listed here, and nowhere else.
"""

from __future__ import annotations

import hashlib
import time

from anyio import to_thread
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import error_response
from core.db import Database
from core.errors import AuthenticationFailed, ShadowError
from core.keys import Caller, authenticate

#: `/metrics` looks for itself who asks.
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/metrics", "/docs", "/redoc", "/openapi.json"})

#: Below it lie the scripts of the OpenAPI page.
DOCS_SCRIPTS_PATH = "/docs-scripts"

#: A revoked key is refused everywhere within this time.
CACHE_SECONDS = 5.0
MAX_CACHED_KEYS = 10_000

#: Tells the OpenAPI page how to authorise; the middleware does the work.
bearer = HTTPBearer(
    auto_error=False, description="An API key: the service's admin.key, or one from `shadowft keys create`."
)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(f"{DOCS_SCRIPTS_PATH}/")


class Authentication:
    def __init__(self, app: ASGIApp, database: Database) -> None:
        self._app = app
        self._database = database
        self._known: dict[bytes, tuple[float, Caller]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["caller"] = await self._caller(Headers(scope=scope))
        except ShadowError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _caller(self, headers: Headers) -> Caller:
        scheme, _, text = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not text.strip():
            raise AuthenticationFailed(
                "You did not send an API key. Send the header `Authorization: Bearer KEY`; the first start of the "
                "service wrote an admin key to admin.key in its data folder.",
                code="missing_api_key",
            )
        return await self._known_caller(text.strip())

    async def _known_caller(self, text: str) -> Caller:
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
        until, caller = self._known.get(digest, (0.0, None))
        if caller is not None and time.monotonic() < until:
            return caller
        caller = await to_thread.run_sync(self._look_up, text)
        if len(self._known) >= MAX_CACHED_KEYS:
            self._known.clear()
        self._known[digest] = (time.monotonic() + CACHE_SECONDS, caller)
        return caller

    def _look_up(self, text: str) -> Caller:
        with self._database.reading() as session:
            return authenticate(session, text)
