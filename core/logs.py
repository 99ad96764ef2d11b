"""Structured logs: an event with keys, ids bound once, one format for ours and the libraries' lines."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec
import structlog
from structlog.typing import Processor

from core.config import Settings

#: What a console's line shows without quotes; a client's path may hold anything.
_PLAIN = re.compile(r"[!#-&(-<>-~]+")

#: Told of a request: its id, method, path, status, milliseconds, and how often its client had tried before.
AccessLog = Callable[[str, str, str, int, float, str | None], None]


def configure_logging(settings: Settings) -> None:
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(settings)],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())
    for name in ("httpx", "httpx2", "kombu", "amqp", "alembic", "celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)


def access_log(settings: Settings) -> AccessLog:
    """A line for each request, which looks like structlog's of the logger `api` with the level `info`. It is put
    together here, since structlog and logging take as long for a line as a poll takes for everything else."""
    if settings.log_level not in {"debug", "info"}:
        return lambda *_: None
    return _print_for_console if settings.log_format == "console" else _print_as_json


def _print_for_console(request_id: str, method: str, path: str, status: int, ms: float, retry: str | None) -> None:
    sys.stderr.write(
        f"{_now()} [info     ] request                        [api] method={_shown(method)} ms={ms} "
        f"path={_shown(path)} request_id={request_id} retry={_shown(retry)} status={status}\n"
    )


def _print_as_json(request_id: str, method: str, path: str, status: int, ms: float, retry: str | None) -> None:
    fields = {"method": method, "path": path, "status": status, "ms": ms, "retry": retry, "event": "request"}
    bound = {"request_id": request_id, "level": "info", "logger": "api", "timestamp": _now()}
    sys.stderr.write(msgspec.json.encode(fields | bound).decode() + "\n")


def _now() -> str:
    return f"{datetime.now(UTC).replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


def _shown(value: str | None) -> str:
    return value if value is not None and _PLAIN.fullmatch(value) else repr(value)


def _renderers(settings: Settings) -> list[Processor]:
    if settings.log_format == "console":
        # Plain tracebacks: rich ones print local variables, and a key or a customer's row may be among them.
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
