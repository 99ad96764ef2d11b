"""Nudges are sent by a thread of their own, and those that wait for it are one."""

from __future__ import annotations

import threading

from core.broker import Nudger
from tests.servers import wait_until


def test_whoever_nudges_waits_for_no_broker_and_what_waits_is_sent_once():
    goes_on, sent = threading.Event(), []

    def send(task):
        sent.append(task)
        goes_on.wait(20)

    nudger = Nudger(send)
    nudger.nudge("work")
    wait_until(lambda: sent == ["work"])  # and there it hangs
    for _ in range(100):
        nudger.nudge("admit")
        nudger.nudge("work")
    goes_on.set()
    wait_until(lambda: len(sent) == 3)
    assert sent == ["work", "admit", "work"]


def test_a_nudge_that_cannot_be_sent_is_not_the_last_one():
    """Whatever its sending meets: the first one imports Celery, for which there may be no file descriptor left."""
    sent = []

    def send(task):
        sent.append(task)
        raise ImportError(task)

    nudger = Nudger(send)
    nudger.nudge("work")
    wait_until(lambda: sent == ["work"])
    nudger.nudge("admit")
    wait_until(lambda: sent == ["work", "admit"])
