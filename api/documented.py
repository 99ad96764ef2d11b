"""What the OpenAPI page says beside what FastAPI makes of the handlers: parameters that mean the same on every route,
and the nulls of the examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

_PATH: dict[str, tuple[str, str]] = {
    "artifact_id": ("The id of one of the team's artifacts.", "art_01kqp3v9w8d6m4t2s0x7z5y1ab"),
    "check_id": ("The id of one of the team's checks.", "pchk_01kqp3v9w8d6m4t2s0x7z5y1ab"),
    "file_id": ("The id of one of the team's files.", "file-01kqp3v9w8d6m4t2s0x7z5y1ab"),
    "graft_id": ("The id of one of the team's grafts.", "ftjob-01kqp3v9w8d6m4t2s0x7z5y1ab"),
    "job_id": ("The id of one of the team's jobs; a graft is one, too.", "ftjob-01kqp3v9w8d6m4t2s0x7z5y1ab"),
    "model": ("A model's name. `/` may be sent as it is or as `%2F`.", "ft:qwen3-0.6b:default:support:z5y1abcd"),
    "pair_id": ("A pair's name, or its id.", "qwen3-0.6b"),
    "upload_id": ("The id of one of the team's uploads.", "upload_01kqp3v9w8d6m4t2s0x7z5y1ab"),
}
_QUERY = {
    "kind": "Only artifacts of this kind.",
    "limit": "How many items the page holds at most. More than the maximum is an error, not cut to it.",
    "order": "`desc`: the newest first. `asc`: the oldest first.",
    "purpose": "Only files with this purpose.",
}


def document(app: FastAPI) -> None:
    """Add it to the app's page."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        schema = plain()
        for described in schema["components"]["schemas"].values():
            for example in [*described.get("examples", []), *filter(None, [described.get("example")])]:
                _put_nulls_back(example, described)
        for parameter in _parameters(schema):
            name = parameter["name"]
            if parameter["in"] == "path":
                parameter["description"], parameter["example"] = _PATH[name]
            elif name in _QUERY:
                parameter["description"] = _QUERY[name]
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend the page


def _put_nulls_back(example: dict[str, Any], schema: dict[str, Any]) -> None:
    """FastAPI leaves every null out of the page, those of the examples, too: what is required and missing was one."""
    missing = [name for name in schema.get("required", []) if name not in example]
    example.update(dict.fromkeys(missing))


def _parameters(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for methods in schema["paths"].values():
        for operation in methods.values():
            yield from operation.get("parameters", [])
