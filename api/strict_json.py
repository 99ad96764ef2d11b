"""Strictness in front of every handler: JSON that Python's own parser lets through and query parameters that nobody
reads are refused, by name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from email.message import Message
from math import isfinite
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from api.errors import unknown_parameter
from core.errors import InvalidInput, TooSlow, UnsupportedMedia

#: Deeper nesting has no meaning in any request of ours.
MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1
#: A JSON body is at most a megabyte; who needs longer for it holds a connection for nothing.
BODY_SECONDS = 30.0


class NotStrictJson(ValueError):
    """Says in words what is wrong."""


class StrictRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = await self._parsed()
        return self._json

    async def _parsed(self) -> Any:
        try:
            return parse(await self.body())
        except NotStrictJson as error:
            # The one form in which FastAPI takes a parser's complaint.
            raise json.JSONDecodeError(str(error), "", 0) from error


class StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        known = sorted(_query_names(self.dependant))

        async def handle_strictly(request: Request) -> Response:
            strict = StrictRequest(request.scope, request.receive)
            if request.scope["query_string"]:
                refuse_unknown(strict, known)
            if "content-encoding" in strict.headers:
                raise UnsupportedMedia("A compressed body is not read here; send it without Content-Encoding.")
            if self.body_field is not None:
                await _receive(strict)  # here, since FastAPI would turn what this raises into an error of its own
            return await handle(strict)

        return handle_strictly


def _query_names(dependant: Dependant) -> set[str]:
    inner = (_query_names(part) for part in dependant.dependencies)
    return {parameter.alias for parameter in dependant.query_params}.union(*inner)


def parse(body: bytes) -> Any:
    """The value of a JSON text as RFC 8259 has it, in UTF-8, with no key twice, no number that a database or another
    parser would stumble over, and no text that is none. Raises NotStrictJson."""
    try:
        text = body.decode()
        if text.startswith("\ufeff"):
            raise NotStrictJson("it begins with a byte order mark")
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_float, parse_int=_integer
        )
    except UnicodeDecodeError as error:
        raise NotStrictJson(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise NotStrictJson(f"{_lowered(error.msg)} at character {error.pos}") from error
    except RecursionError as error:
        raise NotStrictJson(f"it is nested deeper than {MAX_DEPTH} levels") from error
    _check(value, 0)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    raise NotStrictJson(f"the key {_shown(twice)} occurs twice in one object")


def _no_constant(name: str) -> NoReturn:
    raise NotStrictJson(f"{name} is no JSON number")


def _float(digits: str) -> float:
    number = float(digits)
    if not isfinite(number):
        raise NotStrictJson(f"the number {_shown(digits)} is too large")
    return number


def _integer(digits: str) -> int:
    # The length first: turning very many digits into an integer is slow, and forbidden by Python itself.
    if len(digits) > 20 or abs(int(digits)) > MAX_INTEGER:
        raise NotStrictJson(f"the integer {_shown(digits)} needs more than 64 bits")
    return int(digits)


def _check(value: Any, depth: int) -> None:
    """Refuse what the grammar allows and what lies further in would stumble over."""
    if depth > MAX_DEPTH:
        raise NotStrictJson(f"it is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        _check_text(value)
    for part in _parts(value):
        _check(part, depth + 1)


def _check_text(text: str) -> None:
    if "\0" in text:
        raise NotStrictJson("a string holds the character U+0000")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise NotStrictJson("a string holds half of a surrogate pair")


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list) else []


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:].removesuffix(" at")


def _shown(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


async def _receive(request: Request) -> None:
    """The whole body, which must be JSON by its own account."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await request.body()
    except ClientDisconnect as error:
        raise InvalidInput("The request ended before its body did.", code="body_cut") from error
    except TimeoutError as error:
        raise TooSlow(f"The body did not arrive within {BODY_SECONDS:g} seconds.") from error
    if not body.strip():
        raise InvalidInput("The request has no body; send a JSON object.", code="missing_required_parameter")
    _check_type(request.headers.get("content-type", ""))


def _check_type(given: str) -> None:
    header = Message()
    header["content-type"] = given or "none/none"
    kind, charset = header.get_content_type(), header.get_content_charset("utf-8")
    if kind != "application/json":
        raise UnsupportedMedia(f"The body's Content-Type is {given[:100]!r}; send application/json.")
    if charset not in {"utf-8", "utf8"}:
        raise UnsupportedMedia(f"The body's charset is {charset[:50]!r}; send UTF-8.")


def refuse_unknown(request: Request, known: list[str]) -> None:
    """Raise for a query parameter that is not `known`; `metadata[key]` counts as `metadata`."""
    for name in request.query_params:
        stem, bracket, rest = name.partition("[")
        if stem not in known or (bracket and (stem != "metadata" or not rest.endswith("]"))):
            raise unknown_parameter(name[:100], known, what="query parameter")
