"""The FastAPI app: the routes, and what stands around them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.responses import RedirectResponse
from fastapi_offline import FastAPIOffline

from api.auth import DOCS_SCRIPTS_PATH, Authentication, bearer
from api.deps import Service
from api.documented import document
from api.errors import ErrorBody, OneShape, install_error_handlers
from api.event_stream import EventFeed
from api.middleware import BodyLimit, CleanAddress, RequestFrame, UnreadBody
from api.polling import Polled, Polls
from api.routes import (
    artifacts,
    checkpoints,
    estimates,
    evaluations,
    events,
    files,
    grafts,
    health,
    jobs,
    metrics,
    models,
    pair_checks,
    pairs,
    unoffered,
    uploads,
)
from api.telemetry import Telemetry
from core.config import Settings, get_settings
from core.db import open_database
from core.logs import access_log, configure_logging
from core.storage import LocalStorage
from core.version import VERSION

DESCRIPTION = """
Fine-tune a language model on your own data, on your own machines, and get back a model that is better and not damaged.

**Shadow-FT** tunes the *base* model of a pair and grafts the learned change onto the *instruct* model:
`W_out = W_instruct + scale * (W_base_tuned - W_base)` (arXiv 2505.12716).

Files and jobs follow OpenAI's fine-tuning API: point the `openai` SDK at `http://HOST:PORT/v1`. What is ours stands in
the job's `shadow` object. Press *Authorize* and paste a key to try the routes here.
"""

#: Of every route, with a key or without.
_CRASH: dict[int | str, dict[str, Any]] = {
    500: {"model": ErrorBody, "description": "The server's own fault; its log tells it under the `x-request-id`."},
}

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "Something in the request cannot be used; `param` names it."},
    401: {"model": ErrorBody, "description": "No key, or a wrong one."},
    403: {"model": ErrorBody, "description": "The key may not do this."},
    404: {"model": ErrorBody, "description": "No such thing, or another team's."},
    408: {"model": ErrorBody, "description": "The body did not arrive in time."},
    409: {"model": ErrorBody, "description": "The thing's state forbids this; `x-should-retry` tells if it passes."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    415: {"model": ErrorBody, "description": "The body is not JSON in UTF-8 by its headers, or it is compressed."},
    # FastAPI would otherwise document a 422 of its own shape, which this service never answers.
    "4XX": {"model": ErrorBody, "description": "Any other fault of the request."},
    503: {"model": ErrorBody, "description": "A part that this needs is away; `Retry-After` says when to try again."},
}


#: What clients poll.
_POLLED = (
    Polled("/v1/fine_tuning/jobs/{job_id}", jobs.retrieve_job),
    Polled("/v1/grafts/{graft_id}", grafts.retrieve_graft),
)

#: `pair_checks` before `pairs`, whose `/pairs/{pair_id}` would take `check` for a pair.
_NOUNS = (
    files,
    uploads,
    jobs,
    estimates,
    grafts,
    events,
    checkpoints,
    evaluations,
    artifacts,
    models,
    pair_checks,
    pairs,
    unoffered,
)


def create_app(settings: Settings | None = None) -> FastAPI:
    settings = settings or get_settings()
    configure_logging(settings)
    database = open_database(settings)
    feed = EventFeed(database)
    storage = LocalStorage(settings.storage_dir)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with feed.open_until_exit():
            yield
        storage.close()
        database.close()

    # The pages /docs and /redoc with their scripts from this server: it may stand where nothing else can be reached.
    app = FastAPIOffline(
        title="Shadow-FT Service",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        static_url=DOCS_SCRIPTS_PATH,
        swagger_ui_parameters={"persistAuthorization": True},
        responses=_CRASH,
        redirect_slashes=False,  # it would send clients to whatever the `Host` header names
    )
    app.state.feed = feed
    app.state.service = Service(settings=settings, database=database, storage=storage)
    app.state.telemetry = Telemetry(database, settings)
    install_error_handlers(app)
    app.include_router(health.router)
    app.include_router(metrics.router)
    for noun in _NOUNS:
        app.include_router(noun.router, prefix="/v1", dependencies=[Depends(bearer)], responses=_ERRORS)
    document(app)
    app.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_bytes=settings.max_json_bytes)
    app.add_middleware(Polls, polled=_POLLED)
    app.add_middleware(CleanAddress)
    app.add_middleware(Authentication, database=database)
    app.add_middleware(UnreadBody)
    app.add_middleware(OneShape)
    app.add_middleware(RequestFrame, observe=app.state.telemetry.observe, access_log=access_log(settings))
    return app
