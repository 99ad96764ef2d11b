"""One shape for every error: OpenAI's `{"error": {"message", "type", "param", "code"}}`, whatever went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from core.errors import Conflict, InvalidInput, NotFound, ShadowError, Unavailable

#: What pydantic adds to an error's path to say which branch of a union it tried.
_BRANCHES = ("literal[", "constrained-", "function-", "list[", "dict[", "tuple[", "nullable[", "lax-or-strict")
_BRANCH_NAMES = frozenset({"int", "float", "str", "bool", "none"})
#: What pydantic puts before the words of our own validators.
_PREFIX = "Value error, "


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every answer with a status of 400 or more holds."""

    error: ErrorDetail


def error_response(error: ShadowError) -> JSONResponse:
    message = f"{error.message} {error.hint}".strip()
    body = {"error": {"message": message, "type": error.type, "param": error.param, "code": error.code}}
    return JSONResponse(body, status_code=error.status, headers=_headers(error))


def _headers(error: ShadowError) -> dict[str, str]:
    # The SDK retries a 409 by itself; the state that made this one will not change by asking again.
    if isinstance(error, Conflict):
        return {"x-should-retry": "false"}
    if isinstance(error, Unavailable):
        return {"retry-after": "5"}
    return {"www-authenticate": "Bearer"} if error.status == 401 else {}


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
    return response


def _from_http(request: Request, error: HTTPException) -> ShadowError:
    route = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return NotFound(f"There is no route {route}. /docs lists the routes.", code="unknown_url")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return InvalidInput(f"The route {route} does not exist; this path takes {allowed}.", code="method_not_allowed")
    return InvalidInput(str(error.detail))


def from_validation(errors: Sequence[Any], *, known: Sequence[str] = ()) -> InvalidInput:
    """The first problem, in words. Where a union failed, the branch that says most is taken."""
    first = errors[0]
    param = _param(first["loc"])
    same_place = [error for error in errors if _param(error["loc"]) == param]
    if first["type"] == "missing":
        return InvalidInput(f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)
    if first["type"] == "extra_forbidden":
        return _unknown_parameter(param, known)
    if first["type"] == "json_invalid":
        return InvalidInput(f"The body is not valid JSON: {first['ctx']['error']}.", code="invalid_json")
    said = " or ".join(dict.fromkeys(_lowered(error["msg"]) for error in same_place))
    return InvalidInput(
        f"Invalid value for '{param}': {said}; found {_shown(first.get('input'))}.", param=param or None
    )


def _unknown_parameter(param: str, known: Sequence[str]) -> InvalidInput:
    near = get_close_matches(param.rpartition(".")[2], known, n=1)
    meant = f" Did you mean '{near[0]}'?" if near else ""
    return InvalidInput(f"Unknown parameter: '{param}'.{meant}", code="unknown_parameter", param=param)


def _param(location: Sequence[str | int]) -> str:
    parts = [str(part) for part in location if part not in {"body", "query", "path", "header"}]
    return ".".join(part for part in parts if not _is_branch(part))


def _is_branch(part: str) -> bool:
    return part in _BRANCH_NAMES or part.startswith(_BRANCHES)


def _lowered(message: str) -> str:
    words = message.removeprefix(_PREFIX)
    return words[:1].lower() + words[1:]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _field_names(request: Request) -> list[str]:
    """Every field of the route's body, nested ones too: what a misspelt one may have meant."""
    field = getattr(request.scope.get("route"), "body_field", None)
    annotation = field.field_info.annotation if field else None
    return sorted(_fields_of(annotation)) if annotation else []


def _fields_of(annotation: Any) -> set[str]:
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return set().union(*(_fields_of(part) for part in getattr(annotation, "__args__", ())))
    names = set(annotation.model_fields)
    return names.union(*(_fields_of(field.annotation) for field in annotation.model_fields.values()))
