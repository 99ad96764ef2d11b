"""GET /metrics: what it tells, in Prometheus' format, and whom."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from sqlalchemy import delete

from core.db import db_now
from core.models import PhaseTime, Worker
from core.version import VERSION
from tests.api.talk import told
from tests.servers import PLAIN, run_api

TOKEN = "prometheus-token"
#: A proxy on this machine says so; this is how a request from elsewhere looks behind it.
FROM_ELSEWHERE = {"x-forwarded-for": "203.0.113.9"}


def scrape(api, **headers):
    answer = httpx.get(f"{api.url}/metrics", headers=headers, verify=PLAIN, timeout=30)
    assert answer.status_code == 200, answer.text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(samples, name, **labels):
    return samples[name, tuple(sorted(labels.items()))]


def test_requests_are_counted_by_the_template_of_their_route(api, client):
    before = scrape(api)
    job_id = client.submit()
    for model in ("a/b", "c"):
        client.http.get(f"/models/{model}")
    client.http.get(f"/fine_tuning/jobs/{job_id}")
    httpx.get(f"{api.url}/v1/files", verify=PLAIN, timeout=30)
    client.http.get("/no/such/route")
    client.http.request("PROPFIND", "/files")
    after, name = scrape(api), "shadowft_http_request_duration_seconds_count"

    def grew(**labels):
        key = name, tuple(sorted(labels.items()))
        return after[key] - before.get(key, 0)

    assert grew(method="POST", route="/v1/fine_tuning/jobs", status="200") == 1
    assert grew(method="GET", route="/v1/fine_tuning/jobs/{job_id}", status="200") == 1
    assert grew(method="GET", route="/v1/models/{model:path}", status="404") == 2
    assert grew(method="GET", route="none", status="401") == 1
    assert any(sample == name and ("method", "other") in labels for sample, labels in after)


def test_no_label_holds_what_a_client_chose(api, client):
    client.http.get("/files/file-secret", headers={"x-request-id": "secret"})
    client.http.get("/secret", params={"q": "secret"})
    client.http.request("SECRET", "/files")
    job_id = client.submit(suffix="secret", metadata={"secret": "secret"})
    client.finish(job_id)
    text = httpx.get(f"{api.url}/metrics", verify=PLAIN, timeout=30).text
    assert "secret" not in text.lower()
    assert client.member.team_id not in text


def test_jobs_are_counted_by_kind_and_state(api, client):
    before = scrape(api)
    client.submit()
    client.finish(client.submit())
    after = scrape(api)
    for state, more in (("validating_files", 1), ("succeeded", 1), ("queued", 0), ("paused", 0)):
        labels = {"kind": "fine_tune", "state": state}
        assert value(after, "shadowft_jobs", **labels) - value(before, "shadowft_jobs", **labels) == more


def test_the_age_of_what_waits_is_told(api, client):
    client.submit()
    samples = scrape(api)
    assert value(samples, "shadowft_oldest_waiting_seconds", waiting_for="admission") > 0
    assert value(samples, "shadowft_oldest_waiting_seconds", waiting_for="file_check") > 0
    assert value(samples, "shadowft_oldest_waiting_seconds", waiting_for="worker") >= 0


def test_workers_are_counted_while_they_beat(api):
    def worker(number, queue, device, **values):
        return Worker(
            id=f"worker-{number}",
            host="h",
            pid=1,
            queue=queue,
            device=device,
            lane_memory_bytes=1,
            version="1",
            **values,
        )

    with api.database.writing() as session:
        stale = {"beat_at": db_now(-10 * api.settings.lease_seconds)}
        session.add_all([worker(1, "jobs", "cuda:1"), worker(2, "jobs", "cpu", **stale)])
        session.add_all([worker(3, "jobs", "cuda:0", draining=True), worker(4, "light", "cpu", **stale)])
        session.commit()
    samples = scrape(api)
    with api.database.writing() as session:
        session.execute(delete(Worker))
        session.commit()
    for queue, device, alive in (("jobs", "cuda", 1), ("jobs", "cpu", 0), ("light", "cpu", 0)):
        assert value(samples, "shadowft_workers", queue=queue, device=device) == alive
    assert value(samples, "shadowft_worker_last_beat_age_seconds", queue="jobs") < api.settings.lease_seconds
    assert value(samples, "shadowft_worker_last_beat_age_seconds", queue="light") > api.settings.lease_seconds


def test_finished_phases_are_a_histogram(api, client):
    job_id = client.submit()
    rows = [
        PhaseTime(
            job_id=job_id, pair="p", tuning="lora", phase="training", device="cuda", seconds=seconds, busy_seconds=0,
            parameters=1, work=1,
        )
        for seconds in (0.5, 20.0, 100_000.0)
    ]  # fmt: skip
    with api.database.writing() as session:
        session.add_all(rows)
        session.commit()
    samples, labels = scrape(api), {"phase": "training", "device": "cuda"}
    name = "shadowft_job_phase_duration_seconds"
    assert value(samples, f"{name}_count", **labels) == 3
    assert value(samples, f"{name}_sum", **labels) == pytest.approx(100_020.5)
    for bound, count in (("1.0", 1), ("15.0", 1), ("60.0", 2), ("259200.0", 3), ("+Inf", 3)):
        assert value(samples, f"{name}_bucket", le=bound, **labels) == count


def test_names_and_units_follow_the_conventions(api):
    text = httpx.get(f"{api.url}/metrics", verify=PLAIN, timeout=30).text
    families = list(text_string_to_metric_families(text))
    ours = [family for family in families if family.name.startswith("shadowft_")]
    assert len({family.name for family in families}) == len(families)
    for family in ours:
        assert family.documentation.endswith(".")
        assert family.type in {"gauge", "histogram"}
        assert not family.name.endswith(("_count", "_sum", "_bucket", "_total", "_ms"))
    assert {family.name for family in families if family.type == "counter"} == {"process_cpu_seconds"}
    assert value(scrape(api), "shadowft_build_info", version=VERSION) == 1
    assert value(scrape(api), "shadowft_database_up") == 1
    assert value(scrape(api), "process_resident_memory_bytes") > 0


# --- whom it tells ----------------------------------------------------------------------------------------------------


def test_this_machine_may_look_and_others_may_not(api):
    told(
        httpx.get(f"{api.url}/metrics", headers=FROM_ELSEWHERE, verify=PLAIN, timeout=30), 401, "invalid_metrics_token"
    )
    key = {"authorization": f"Bearer {api.admin_key}"}
    told(
        httpx.get(f"{api.url}/metrics", headers=FROM_ELSEWHERE | key, verify=PLAIN, timeout=30),
        401,
        "invalid_metrics_token",
    )
    told(
        httpx.get(f"{api.url}/metrics", headers=FROM_ELSEWHERE | {"authorization": "Bearer"}, verify=PLAIN, timeout=30),
        401,
    )


def test_the_metrics_token_opens_the_metrics_to_others_and_nothing_else(fresh_settings, tmp_path):
    with fresh_settings("sqlite", tmp_path, metrics_token=SecretStr(TOKEN)) as settings, run_api(settings) as api:
        token = {"authorization": f"Bearer {TOKEN}"}
        assert scrape(api, **FROM_ELSEWHERE, **token)
        told(httpx.get(f"{api.url}/v1/files", headers=token, verify=PLAIN, timeout=30), 401, "invalid_api_key")
        for wrong in ("Bearer x", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x"):
            answer = httpx.get(
                f"{api.url}/metrics", headers=FROM_ELSEWHERE | {"authorization": wrong}, verify=PLAIN, timeout=30
            )
            told(answer, 401, "invalid_metrics_token")


def test_requests_are_told_while_the_database_is_away(fresh_settings, postgres, tmp_path):
    with fresh_settings("postgresql", tmp_path) as settings, run_api(settings) as api:
        postgres.take_away(settings.database)
        samples = scrape(api)
        postgres.bring_back(settings.database)
        assert value(samples, "shadowft_database_up") == 0
        assert value(samples, "shadowft_build_info", version=VERSION) == 1
        assert not [name for name, _ in samples if name == "shadowft_jobs"]
