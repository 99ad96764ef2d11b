"""A pair is checked by the whole service: the first stage is answered at once, the light worker adds the second."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.conftest import Ready
from tests.servers import wait_until

pytestmark = pytest.mark.xdist_group("e2e-main")


def ended(ready: Ready, **body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The check as it was answered, and once it has ended."""
    asked: dict[str, Any] = ready.client.post("/pairs/check", body=body, cast_to=dict[str, Any])

    def done() -> dict[str, Any] | None:
        found: dict[str, Any] = ready.client.get(f"/pairs/check/{asked['id']}", cast_to=dict[str, Any])
        return found if found["status"] in {"completed", "failed"} else None

    return asked, wait_until(done, seconds=90)


def test_a_check_is_queued_and_then_completed(ready: Ready):
    asked, found = ended(ready, pair="tiny")
    assert (asked["status"], asked["verdict"], asked["similarity"]) == ("queued", "ok", None)
    assert (found["status"], found["verdict"], found["error"]) == ("completed", "ok", None)
    assert {finding["stage"] for finding in found["findings"]} == {"files"}
    assert found["similarity"]["layers"].keys() == {"0", "1"}
    assert 0 < found["similarity"]["sigma_mean"] < 0.1


def test_a_job_shows_what_its_admission_found(shadow_job: tuple[Ready, Any]):
    _, job = shadow_job
    assert job.status == "succeeded"
    assert job.pair_check["verdict"] == "ok"
    assert job.pair_check["similarity"]["sigma_mean"] > 0
