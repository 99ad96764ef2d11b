"""The least that a FastAPI server of job statuses can be: a bare `def` route, one prepared select, the same check of
the key, and the same bytes as ours, which lie in its table as they are sent.

    python bench/yardsticks/bare_api.py DATABASE PORT

`DATABASE` is a SQLite file with the tables `job(id, body)` and `api_key(digest, team)`.
"""

from __future__ import annotations

import hashlib
import sqlite3
import sys
import threading
import time
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Header, HTTPException, Response

CACHE_SECONDS = 5.0

app = FastAPI()
database = sys.argv[1]
local = threading.local()
known: dict[bytes, tuple[float, str]] = {}


def connection() -> sqlite3.Connection:
    """One to a thread; it keeps the prepared statement."""
    if not hasattr(local, "connection"):
        local.connection = sqlite3.connect(database)
    opened: sqlite3.Connection = local.connection
    return opened


def team_of(key: str) -> str:
    digest = hashlib.sha256(key.encode()).digest()
    until, team = known.get(digest, (0.0, ""))
    if time.monotonic() < until:
        return team
    row = connection().execute("SELECT team FROM api_key WHERE digest = ?", (digest,)).fetchone()
    if row is None:
        raise HTTPException(401)
    known[digest] = (time.monotonic() + CACHE_SECONDS, row[0])
    return str(row[0])


@app.get("/v1/fine_tuning/jobs/{job_id}")
def status(job_id: str, authorization: Annotated[str, Header()]) -> Response:
    team_of(authorization.removeprefix("Bearer "))
    row = connection().execute("SELECT body FROM job WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise HTTPException(404)
    return Response(row[0], media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[2]), log_config=None, access_log=False, server_header=False)
