"""Strict JSON in front of every handler: what Python's own parser lets through (NaN, a value cut short) is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute

#: Deeper nesting has no meaning in any request of ours.
MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1


class StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            value = msgspec.json.decode(body, strict=True)
            _check(value, 0)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise json.JSONDecodeError(_words(error), "", 0) from error
        return value


class StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            strict = StrictRequest(request.scope, request.receive)
            if self.body_field is not None:
                await strict.body()  # read here, since FastAPI would turn what that raises into an error of its own
            return await handle(strict)

        return handle_strictly


def _check(value: Any, depth: int) -> None:
    """Refuse what a database or a parser further in would stumble over."""
    if depth > MAX_DEPTH:
        raise msgspec.DecodeError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str) and "\0" in value:
        raise msgspec.DecodeError("a string holds the character U+0000")
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise msgspec.DecodeError("an integer needs more than 64 bits")
    for part in _parts(value):
        _check(part, depth + 1)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list) else []


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, msgspec.DecodeError) else "it is not UTF-8 text, or nested too deeply"
