"""The FastAPI app: the routes, and what stands around them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import RedirectResponse
from fastapi_offline import FastAPIOffline

from api.auth import DOCS_SCRIPTS_PATH, Authentication, bearer
from api.deps import Service
from api.errors import ErrorBody, install_error_handlers
from api.middleware import BodyLimit, CleanAddress, RequestFrame
from api.routes import artifacts, evaluations, events, files, grafts, health, jobs, pairs
from core.config import Settings, get_settings
from core.db import open_database
from core.logs import configure_logging
from core.storage import LocalStorage
from core.version import VERSION

DESCRIPTION = """
Fine-tune a language model on your own data, on your own machines, and get back a model that is better and not damaged.

**Shadow-FT** tunes the *base* model of a pair and grafts the learned change onto the *instruct* model:
`W_out = W_instruct + scale * (W_base_tuned - W_base)` (arXiv 2505.12716).

Files and jobs follow OpenAI's fine-tuning API: point the `openai` SDK at `http://HOST:PORT/v1`. What is ours stands in
the job's `shadow` object. Press *Authorize* and paste a key to try the routes here.
"""

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "Something in the request cannot be used; `param` names it."},
    401: {"model": ErrorBody, "description": "No key, or a wrong one."},
    403: {"model": ErrorBody, "description": "The key may not do this."},
    404: {"model": ErrorBody, "description": "No such thing, or another team's."},
    409: {"model": ErrorBody, "description": "The thing's state forbids this; asking again changes nothing."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    # FastAPI would otherwise document a 422 of its own shape, which this service never answers.
    "4XX": {"model": ErrorBody, "description": "Any other fault of the request."},
    503: {"model": ErrorBody, "description": "A part that this needs is away; `Retry-After` says when to try again."},
}


def create_app(settings: Settings | None = None) -> FastAPI:
    settings = settings or get_settings()
    configure_logging(settings)
    database = open_database(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        database.close()

    # The pages /docs and /redoc with their scripts from this server: it may stand where nothing else can be reached.
    app = FastAPIOffline(
        title="Shadow-FT Service",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        static_url=DOCS_SCRIPTS_PATH,
        swagger_ui_parameters={"persistAuthorization": True},
    )
    app.state.service = Service(settings=settings, database=database, storage=LocalStorage(settings.storage_dir))
    install_error_handlers(app)
    app.include_router(_v1())
    app.include_router(health.router)
    app.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_bytes=settings.max_json_bytes)
    app.add_middleware(CleanAddress)
    app.add_middleware(Authentication, database=database)
    app.add_middleware(RequestFrame)
    return app


def _v1() -> APIRouter:
    router = APIRouter(prefix="/v1", dependencies=[Depends(bearer)], responses=_ERRORS)
    for noun in (files, jobs, grafts, events, evaluations, artifacts, pairs):
        router.include_router(noun.router)
    return router
