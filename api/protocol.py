"""The HTTP below the app: uvicorn's, but for what it refuses before there is a request to hand on."""

from __future__ import annotations

from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.errors import error_response
from api.middleware import new_request_id
from core.errors import InvalidInput, ShadowError

#: A request line and headers of more are nobody's; uvicorn itself would collect them without end.
MAX_HEAD_BYTES = 64 * 1024

log = structlog.get_logger("api")


class Protocol(HttpToolsProtocol):
    """One connection. What is no HTTP is told in the contract's shape, with an id that stands in the log."""

    _head_bytes: int | None = None

    def data_received(self, data: bytes) -> None:
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(InvalidInput(f"The headers are larger than {MAX_HEAD_BYTES:,} bytes.", code="bad_request"))
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(
            InvalidInput(
                "The request is not HTTP/1.1: its first line, a header, or the framing of its body cannot be read.",
                code="bad_request",
            )
        )

    def _refuse(self, error: ShadowError) -> None:
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self.transport.write(self._answer(error))
        self.transport.close()  # amid an answer there is no place for another one

    def _answer(self, error: ShadowError) -> bytes:
        request_id = new_request_id()
        log.warning("request_unreadable", request_id=request_id, reason=error.message)
        answer = error_response(error)
        answer.headers.update({"x-request-id": request_id, "connection": "close"})
        headers = b"".join(b"%b: %b\r\n" % one for one in [*self.server_state.default_headers, *answer.raw_headers])
        return b"HTTP/1.1 400 Bad Request\r\n" + headers + b"\r\n" + answer.body


#: For uvicorn. There are no websockets here: who asks to change over gets an answer in plain HTTP.
SERVER: dict[str, Any] = {
    "http": Protocol,
    "ws": "none",
    "log_config": None,
    "access_log": False,
    "server_header": False,
}
