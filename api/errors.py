"""One shape for every error: OpenAI's `{"error": {"message", "type", "param", "code"}}`, whatever went wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import Conflict, InFlight, InvalidInput, NotFound, QuotaExceeded, ShadowError, Unavailable

#: What pydantic adds to an error's path to say which branch of a union it tried.
_BRANCHES = ("literal[", "constrained-", "function-", "list[", "dict[", "tuple[", "nullable[", "lax-or-strict")
_BRANCH_NAMES = frozenset({"int", "float", "str", "bool", "none"})
#: What pydantic puts before the words of our own validators.
_PREFIX = "Value error, "
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")


class ErrorDetail(BaseModel):
    message: str = Field(description="What is wrong and what to do, in a sentence or two.")
    type: str = Field(description="`invalid_request_error`, `permission_error`, `rate_limit_error` or `server_error`.")
    param: str | None = Field(description="The field or parameter at fault, with dots. Null: none is.")
    code: str | None = Field(description="Stable; programs may test for it.")


class ErrorBody(BaseModel):
    """What every answer with a status of 400 or more holds."""

    error: ErrorDetail = Field(description="The only field.")


def error_response(error: ShadowError) -> JSONResponse:
    # Many a message has no period, since it stands within other sentences, too.
    message = f"{error.message.rstrip('.')}. {error.hint}" if error.hint else error.message
    body = {"error": {"message": message, "type": error.type, "param": error.param, "code": error.code}}
    return JSONResponse(body, status_code=error.status, headers=_headers(error))


def _headers(error: ShadowError) -> dict[str, str]:
    if isinstance(error, InFlight):
        return {"x-should-retry": "true", "retry-after": "1"}
    # The SDK retries a 409 and a 429 by itself; the state that made this one will not change by asking again.
    if isinstance(error, Conflict | QuotaExceeded):
        return {"x-should-retry": "false"}
    if isinstance(error, Unavailable):
        return {"retry-after": "5"}
    return {"www-authenticate": "Bearer"} if error.status == 401 else {}


class OneShape:
    """Around the app: an error that a library answers in a form of its own gets the one shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, text = 0, b""

        async def send_shaped(message: Message) -> None:
            nonlocal status, text
            if _is_foreign(message):
                status = message["status"]
                return
            if not status:
                await send(message)
                return
            text += message["body"]
            if not message.get("more_body"):
                await _reshaped(status, text.decode(errors="replace"))(scope, receive, send)

        await self._app(scope, receive, send_shaped)


def _is_foreign(message: Message) -> bool:
    if message["type"] != "http.response.start" or message["status"] < 400:
        return False
    return (b"content-type", b"application/json") not in message["headers"]


def _reshaped(status: int, text: str) -> JSONResponse:
    said = text[:200] or f"The request was refused with the status {status}."
    response = error_response(InvalidInput(said, code="refused"))
    response.status_code = status
    return response


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ShadowError, _on_shadow_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_shadow_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ShadowError)  # noqa: S101 - tells the type checker what the registration says
    return error_response(error)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as above
    return error_response(from_validation(error.errors(), known=_field_names(request)))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - as above
    response = error_response(_from_http(request, error))
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        response.headers["allow"] = ", ".join(_allowed(request, request.scope["path"]))
    return response


def _from_http(request: Request, error: HTTPException) -> ShadowError:
    route = f"{request.method} {request.url.path[:200]}"
    path: str = request.scope["path"]
    if error.status_code == 404:
        meant = path.rstrip("/")
        instead = (
            f"Leave out the slash at its end: {meant[:200]}" if _allowed(request, meant) else "/docs lists the routes"
        )
        return NotFound(f"There is no route {route}. {instead}.", code="unknown_url")
    if error.status_code == 405:
        allowed = " or ".join(_allowed(request, path))
        return InvalidInput(f"The route {route} does not exist; this path takes {allowed}.", code="method_not_allowed")
    return InvalidInput(str(error.detail))


def _allowed(request: Request, path: str) -> list[str]:
    """Every method that the path takes. The exception names those of one route only, and two may share a path."""
    found = []
    for method in _METHODS:
        scope = {**request.scope, "method": method, "path": path}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes):
            found.append(method)
    return found


def from_validation(errors: Sequence[Any], *, known: Sequence[str] = ()) -> InvalidInput:
    """The first problem, in words. `known` holds the path of every field of the body. Where a union failed, the branch
    that says most is taken."""
    first = errors[0]
    param = _param(first["loc"])
    same_place = [error for error in errors if _param(error["loc"]) == param]
    if first["type"] == "missing":
        return InvalidInput(f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)
    if first["type"] == "extra_forbidden":
        return unknown_parameter(param, known)
    if first["type"] == "json_invalid":
        return InvalidInput(f"The body is not valid JSON: {first['ctx']['error']}.", code="invalid_json")
    if not param and first["type"].endswith("_type"):
        return InvalidInput(f"The body must be a JSON object; found {_shown(first.get('input'))}.")
    said = " or ".join(dict.fromkeys(_lowered(error["msg"]) for error in same_place))
    if not param:
        return InvalidInput(f"The body cannot be used: {said}.")
    return InvalidInput(f"Invalid value for '{param}': {said}; found {_shown(first.get('input'))}.", param=param)


def unknown_parameter(param: str, known: Sequence[str], *, what: str = "parameter") -> InvalidInput:
    """With the field that was probably meant: one at the same place first, then nearly the same of any place."""
    parent, _, name = param.rpartition(".")
    beside = [path for path in known if path.rpartition(".")[0] == parent]
    near = _nearest(name, beside, likeness=0.6) or _nearest(name, known, likeness=0.85)
    meant = f" Did you mean '{near}'?" if near else ""
    return InvalidInput(f"Unknown {what}: '{param}'.{meant}", code="unknown_parameter", param=param)


def _nearest(name: str, paths: Sequence[str], *, likeness: float) -> str | None:
    by_name = {path.rpartition(".")[2]: path for path in reversed(paths)}
    near = get_close_matches(name, by_name, n=1, cutoff=likeness)
    return by_name[near[0]] if near else None


def _param(location: Sequence[str | int]) -> str:
    parts = [str(part) for part in location if part not in {"body", "query", "path", "header"}]
    return ".".join(part for part in parts if not _is_branch(part))


def _is_branch(part: str) -> bool:
    return part in _BRANCH_NAMES or part.startswith(_BRANCHES)


def _lowered(message: str) -> str:
    words = message.removeprefix(_PREFIX)
    return words[:1].lower() + words[1:]


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _field_names(request: Request) -> list[str]:
    """The path of every field of the route's body: what a misspelt one may have meant."""
    field = getattr(request.scope.get("route"), "body_field", None)
    annotation = field.field_info.annotation if field else None
    return sorted(_fields_of(annotation)) if annotation else []


def _fields_of(annotation: Any, prefix: str = "") -> set[str]:
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return set().union(*(_fields_of(part, prefix) for part in getattr(annotation, "__args__", ())))
    fields = annotation.model_fields
    inner = (_fields_of(field.annotation, f"{prefix}{name}.") for name, field in fields.items())
    return {f"{prefix}{name}" for name in fields}.union(*inner)
