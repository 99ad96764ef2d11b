"""Who gets in, and in what shape everybody else hears why not."""

from __future__ import annotations

import socket
import sqlite3
import time
from contextlib import closing

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.engine import make_url

from api import readiness
from api.auth import OPEN_PATHS
from api.readiness import FRESH_SECONDS
from core.errors import NotFound
from core.keys import revoke_key
from core.models import Worker
from tests.api.talk import routes, told
from tests.servers import PLAIN, free_port, run_api, wait_until


@pytest.fixture
def nobody(api):
    with httpx.Client(base_url=api.url, timeout=30, verify=PLAIN) as http:
        yield http


@pytest.fixture(scope="module")
def openapi(api):
    return httpx.get(f"{api.url}/openapi.json", timeout=60).json()


def test_every_route_but_the_open_ones_needs_a_key(nobody, openapi):
    seen = 0
    for method, path in routes(openapi):
        if path in OPEN_PATHS:
            assert nobody.request(method, path).status_code == 200
            continue
        for key in (None, "Bearer x", "Basic abc", "Bearer", "Bearer sft_1_2_3", "x"):
            answer = nobody.request(method, path, headers={"authorization": key} if key else {})
            assert told(answer, 401)["code"] in {"missing_api_key", "invalid_api_key"}
            assert answer.headers["www-authenticate"] == "Bearer"
            seen += 1
    assert seen > 50


@pytest.mark.parametrize(
    "path", ["/v1", "/v1/", "/v1/anything", "//v1/files", "/V1/files", "/v1/files/", "/v1/%2e%2e/healthz"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE"])
def test_what_is_no_route_needs_a_key_too(nobody, method, path):
    assert nobody.request(method, path).status_code == 401


def test_a_key_in_the_address_opens_nothing(api, nobody):
    for name in ("api_key", "key", "access_token", "authorization"):
        told(nobody.get("/v1/files", params={name: api.admin_key}), 401)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_schemes_letters_may_be_of_any_size(api, nobody, scheme):
    assert nobody.get("/v1/files", headers={"authorization": f"{scheme} {api.admin_key}"}).status_code == 200


def test_a_key_with_strange_bytes_is_refused(api):
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as connection:
        connection.sendall(b"GET /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sft_\xff\xfe_\x80_1\r\n\r\n")
        assert connection.recv(100).split()[1] in {b"401", b"400"}


def test_a_revoked_key_is_refused_once_the_cache_has_forgotten_it(api):
    """A key that no request has shown yet is in no cache."""
    member = api.member()
    with api.database.writing() as session:
        key_id = "key_" + member.key.split("_")[1]
        revoke_key(session, key_id)
        session.commit()
        with pytest.raises(NotFound):
            revoke_key(session, key_id)
    told(httpx.get(f"{api.url}/v1/files", headers=member.headers), 401, "invalid_api_key")


def test_only_an_admin_registers_a_pair(api, client):
    body = {"name": "ours", "base": "a/b", "instruct": "a/c"}
    told(client.http.post("/pairs", json=body), 403, "permission_denied")
    answer = api.http.post("/v1/pairs", json=body)
    assert (answer.status_code, answer.json()["origin"]) == (200, "registered")
    told(api.http.post("/v1/pairs", json=body), 409, "pair_exists")
    assert client.http.get("/pairs", params={"limit": 1}).json()["data"][0]["id"] == answer.json()["id"]
    assert [pair["name"] for pair in client.http.get("/pairs", params={"search": "A/C"}).json()["data"]] == ["ours"]


def test_pairs_are_paged_through_to_the_end(client):
    every = client.http.get("/pairs").json()
    page = client.http.get("/pairs", params={"limit": 7}).json()
    found = page["data"]
    while page["has_more"]:
        page = client.http.get("/pairs", params={"limit": 7, "after": page["last_id"]}).json()
        found += page["data"]
    assert found == every["data"]


# --- every error has the one shape ------------------------------------------------------------------------------------


def test_an_unknown_route_has_the_shape(client):
    told(client.http.get("/nothing/here"), 404, "unknown_url")


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_a_wrong_method_has_the_shape_and_names_the_right_ones(client, method):
    answer = client.http.request(method, "/fine_tuning/jobs")
    told(answer, 405, "method_not_allowed")
    assert set(answer.headers["allow"].split(", ")) <= {"GET", "POST", "HEAD"}


def test_a_request_id_is_kept_where_it_is_harmless_and_made_where_not(client):
    for given, kept in [("abc-1", True), ("x" * 65, False), ("a b", False), ("<script>", False)]:
        answer = client.http.get("/files/none", headers={"x-request-id": given})
        assert (answer.headers["x-request-id"] == given) is kept


@pytest.fixture
def broken(fresh_settings, backend, tmp_path):
    """An API that has lost a table."""
    with fresh_settings(backend, tmp_path / "data") as settings, run_api(settings) as ran:
        with ran.database.engine.execution_options(shadowft_writing=True).begin() as connection:
            connection.execute(text("ALTER TABLE file RENAME TO lost"))
        yield ran


def test_a_crash_has_the_shape_and_tells_nothing(broken):
    answer = broken.http.get("/v1/files")
    error = told(answer, answer.status_code)
    assert answer.status_code in {500, 503}
    assert "lost" not in error["message"]
    assert "file" not in error["message"].lower()
    assert broken.http.get("/healthz").status_code == 200


def test_an_upload_whose_row_cannot_be_written_leaves_no_file(broken):
    answer = broken.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("r", b"{}")})
    assert answer.status_code in {500, 503}
    assert [path for path in broken.settings.storage_dir.rglob("*") if path.is_file()] == []


def test_a_database_that_is_away_is_said_so_and_comes_back(fresh_settings, postgres, tmp_path):
    with fresh_settings("postgresql", tmp_path / "data") as settings, run_api(settings) as ran:
        assert ran.http.get("/v1/files").status_code == 200
        postgres.take_away(settings.database)
        answer = ran.http.get("/v1/files")
        told(answer, 503, "unavailable")
        assert int(answer.headers["retry-after"]) > 0
        assert looked(ran)[0] == 503
        assert ran.http.get("/healthz").status_code == 200
        postgres.bring_back(settings.database)
        assert ran.http.get("/v1/files").status_code == 200


# --- the page of the routes -------------------------------------------------------------------------------------------


def test_the_page_loads(nobody, openapi):
    page = nobody.get("/docs")
    assert page.status_code == 200
    assert "swagger-ui" in page.text
    assert openapi["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert nobody.get("/", follow_redirects=False).headers["location"] == "/docs"


def test_every_documented_error_is_the_one_shape(openapi):
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            for status, answer in operation["responses"].items():
                if not status.startswith(("2", "3")):
                    schema = answer["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorBody"}, f"{method} {path} {status}"
            assert operation["summary"]
            assert operation.get("description") or path in OPEN_PATHS, f"{method} {path} says nothing about itself"


def test_every_documented_v1_route_asks_for_a_key(openapi):
    for path, methods in openapi["paths"].items():
        for operation in methods.values():
            assert bool(operation.get("security")) == path.startswith("/v1")


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_a_job_without_a_worker_says_what_it_waits_for(client):
    job_id = client.submit()
    assert "shadowft worker --queue light" in client.http.get(f"/fine_tuning/jobs/{job_id}").json()["waiting_for"]
    client.admit(job_id)
    assert "shadowft worker --queue jobs" in client.http.get(f"/fine_tuning/jobs/{job_id}").json()["waiting_for"]
    client.http.post(f"/fine_tuning/jobs/{job_id}/cancel")
    assert client.http.get(f"/fine_tuning/jobs/{job_id}").json()["waiting_for"] is None


def looked(ran):
    """What /readyz says once it has looked again."""
    time.sleep(FRESH_SECONDS)
    answer = ran.http.get("/readyz")
    return answer.status_code, answer.json()


def test_readiness_tells_which_workers_are_missing(fresh_settings, backend, tmp_path):
    with fresh_settings(backend, tmp_path / "data") as settings, run_api(settings) as ran:
        fine = {"database": "ok", "schema": "ok", "disk": "ok", "broker": "ok"}
        assert looked(ran) == (200, {"status": "degraded", **fine, "workers": {"jobs": 0, "light": 0}})
        with ran.database.writing() as session:
            shared = {"host": "h", "pid": 1, "device": "cpu", "lane_memory_bytes": 1, "version": "1"}
            session.add_all(Worker(id=f"worker-{queue}", queue=queue, **shared) for queue in ("jobs", "light"))
            session.add(Worker(id="worker-leaving", queue="jobs", draining=True, **shared))
            session.commit()
        assert looked(ran) == (200, {"status": "ok", **fine, "workers": {"jobs": 1, "light": 1}})


def test_readiness_tells_of_a_broker_that_is_away_and_goes_on_serving(fresh_settings, tmp_path):
    url = SecretStr(f"redis://127.0.0.1:{free_port()}/0")
    with fresh_settings("sqlite", tmp_path / "data", broker_url=url) as settings, run_api(settings) as ran:
        status, answer = looked(ran)
        assert (status, answer["status"]) == (200, "degraded")
        assert "next sweep" in answer["broker"]


def test_a_broker_that_hangs_holds_up_nobody_who_asks(fresh_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(readiness, "PATIENCE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = SecretStr(f"redis://127.0.0.1:{mute.getsockname()[1]}/0")
        with fresh_settings("sqlite", tmp_path / "data", broker_url=url) as settings, run_api(settings) as ran:
            for _ in range(2):
                status, answer = looked(ran)
                assert (status, answer["status"], answer["database"]) == (200, "degraded", "ok")
                assert "next sweep" in answer["broker"]
            began = time.monotonic()
            for _ in range(20):
                ran.http.get("/readyz")
            assert time.monotonic() - began < 20 * 0.3  # the one look that hangs is waited for once


def test_readiness_tells_of_a_database_that_takes_no_writes(fresh_settings, postgres, tmp_path):
    with fresh_settings("postgresql", tmp_path / "data") as settings, run_api(settings) as ran:
        name = make_url(settings.database).database
        postgres.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        postgres.take_away(settings.database)
        postgres.bring_back(settings.database)
        status, answer = looked(ran)
        assert (status, answer["status"], answer["database"]) == (503, "unavailable", "takes no writes")


def test_a_database_whose_writer_is_frozen_holds_up_nobody_who_asks(fresh_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(readiness, "PATIENCE_SECONDS", 0.3)
    with fresh_settings("sqlite", tmp_path / "data") as settings, run_api(settings) as ran:
        with closing(sqlite3.connect(settings.data_dir / "shadowft.db", isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            status, answer = looked(ran)
            assert (status, answer["database"]) == (503, "does not answer")
        assert wait_until(lambda: looked(ran)[0] == 200)


def test_readiness_tells_of_a_schema_that_is_not_this_versions(fresh_settings, backend, tmp_path):
    with fresh_settings(backend, tmp_path / "data") as settings, run_api(settings) as ran:
        with ran.database.writing() as session:
            session.execute(text("UPDATE alembic_version SET version_num = 'older'"))
            session.commit()
        status, answer = looked(ran)
        assert (status, answer["status"]) == (503, "unavailable")
        assert answer["schema"].startswith("is older; this version needs ")


@pytest.mark.parametrize(("limit", "said"), [("MIN_FREE_BYTES", "MiB left"), ("MIN_FREE_FILES", "room for")])
def test_readiness_tells_of_a_full_disk(fresh_settings, tmp_path, monkeypatch, limit, said):
    monkeypatch.setattr(readiness, limit, 2**62)
    with fresh_settings("sqlite", tmp_path / "data") as settings, run_api(settings) as ran:
        status, answer = looked(ran)
        assert (status, answer["status"]) == (503, "unavailable")
        assert said in answer["disk"]
