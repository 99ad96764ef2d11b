"""What another try is granted for, by cause and budgets; nothing runs here."""

from __future__ import annotations

import pytest

from core.errors import Cause
from core.jobs import MAX_DISK_SECONDS, Budgets
from worker.pipeline import another_try

NONE = {"infra_retries": 0, "stall_count": 0, "disk_waits": 0, "oom_level": 0}


def charged(code, *, fault="infrastructure", retryable=True, limit=3, **spent):
    """What the next try is charged to; None: the job fails."""
    cause = Cause(code=code, message="", fault=fault, retryable=retryable)
    again = another_try(cause, Budgets(**(NONE | spent)), limit)
    return again and again.charge


@pytest.mark.parametrize(
    ("code", "spent", "charge"),
    [
        ("step_crashed", {}, "infra_retries"),
        ("step_crashed", {"infra_retries": 2, "stall_count": 9, "disk_waits": 9}, "infra_retries"),
        ("step_crashed", {"infra_retries": 3}, None),
        ("step_stalled", {"infra_retries": 9}, "stall_count"),
        ("step_stalled", {"stall_count": 1}, None),
        ("disk_full", {"infra_retries": 9, "disk_waits": 5000}, "disk_waits"),
        # No room would help against a disk that is read-only, or away.
        ("storage_unavailable", {"disk_waits": 9}, "infra_retries"),
        ("storage_unavailable", {"infra_retries": 3}, None),
    ],
)
def test_another_try_is_charged_to_what_its_cause_belongs_to_until_that_is_spent(code, spent, charge):
    assert charged(code, **spent) == charge


def test_a_step_that_was_killed_is_tried_again_once_where_retries_are_allowed_at_all():
    killed = {"code": "step_killed", "fault": "memory"}
    assert charged(**killed) == "infra_retries"
    assert charged(**killed, infra_retries=1) is None
    assert charged(**killed, limit=0) is None


@pytest.mark.parametrize(("fault", "retryable"), [("user", True), ("memory", True), ("infrastructure", False)])
def test_what_stays_as_it_is_is_not_tried_again(fault, retryable):
    assert charged("any", fault=fault, retryable=retryable) is None


def test_waits_for_a_disk_grow_to_a_quarter_of_an_hour_and_stay_there():
    full = Cause(code="disk_full", message="", fault="infrastructure", retryable=True)
    waits = [another_try(full, Budgets(**(NONE | {"disk_waits": count})), 3).delay_seconds for count in (0, 1, 9, 5000)]
    assert waits == [60, 120, MAX_DISK_SECONDS, MAX_DISK_SECONDS]
