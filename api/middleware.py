"""Around every request: an id, a log line, a limit on the body, and an answer even where a handler breaks."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable

import structlog
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import error_response
from core.errors import InvalidInput, ShadowError, TooLarge, Unavailable
from core.logs import AccessLog

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

#: The paths whose bodies may be large; they count for themselves.
_UPLOAD_PATH = re.compile(r"/v1/files/?|/v1/uploads/[^/]+/parts/?")

#: So much of a body that nobody reads is let through, so that the connection can be used again.
MAX_DRAINED_BYTES = 64 * 1024

log = structlog.get_logger("api")


class RequestFrame:
    """Outermost, so that errors of every layer below carry the id and the shape that the contract promises.

    `observe` is told of every request: its scope, its status (0 without an answer), and the seconds until the answer
    began.
    """

    def __init__(self, app: ASGIApp, observe: Callable[[Scope, int, float], None], access_log: AccessLog) -> None:
        self._app = app
        self._observe = observe
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        structlog.contextvars.bind_contextvars(request_id=request_id)
        started = time.perf_counter()
        status, waited = 0, 0.0

        async def send_framed(message: Message) -> None:
            nonlocal status, waited
            if message["type"] == "http.response.start":
                status, waited = message["status"], time.perf_counter() - started
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = request_id
                answer["openai-processing-ms"] = str(round(waited * 1000))
            await send(message)

        try:
            await self._app(scope, receive, send_framed)
        except Exception as error:  # the last line: the client gets an answer, the log gets the traceback
            log.exception("request_crashed", method=scope["method"], path=scope["path"])
            if status == 0:
                await error_response(_in_words(error, request_id))(scope, receive, send_framed)
        finally:
            self._observe(scope, status, waited if status else time.perf_counter() - started)
            ms = round((time.perf_counter() - started) * 1000, 1)
            retry = headers.get("x-stainless-retry-count")
            self._access_log(request_id, scope["method"], scope["path"], status, ms, retry)
            structlog.contextvars.unbind_contextvars("request_id")


class CleanAddress:
    """No NUL in the path or the query: none of our ids or values holds one, and PostgreSQL does not take it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and ("\0" in scope["path"] or b"%00" in scope["query_string"]):
            error = InvalidInput("The address holds the character U+0000.", code="invalid_url")
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class BodyLimit:
    """No body of more than `max_bytes`, whether it says so or not; an upload of a file counts its own."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _UPLOAD_PATH.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, receive_limited, send)

    def _too_large(self) -> TooLarge:
        return TooLarge(f"The body is larger than {self._max_bytes:,} bytes.")


class UnreadBody:
    """An answer that comes before the body has ends the connection: a gigabyte for which nobody has a use is not read.

    Without this the server would read the rest, to find the next request behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = _announced(Headers(scope=scope)) if scope["type"] == "http" else 0
        if not left:
            await self._app(scope, receive, send)
            return

        async def receive_counted() -> Message:
            nonlocal left
            message = await receive()
            left = left - len(message.get("body", b"")) if message.get("more_body") else 0
            return message

        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and left > MAX_DRAINED_BYTES:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self._app(scope, receive_counted, send_closing)


def _announced(headers: Headers) -> float:
    """Bytes of body that the headers tell of; infinite where they tell of one without its size."""
    if "transfer-encoding" in headers:
        return math.inf
    declared = headers.get("content-length", "0")
    return int(declared) if declared.isdecimal() else 0


def new_request_id() -> str:
    return f"req_{os.urandom(16).hex()}"


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else new_request_id()


def _in_words(error: Exception, request_id: str) -> ShadowError:
    if isinstance(error, OperationalError | PoolTimeout):
        return Unavailable(
            f"The database does not answer. The operator finds the reason in the log under {request_id}."
        )
    return ShadowError(f"The server met an unexpected error. Its operator finds it in the log under {request_id}.")
