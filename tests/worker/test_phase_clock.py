"""What a job's first attempt leaves behind about its time."""

from __future__ import annotations

import json

import pytest

from core.job_spec import ModelSource
from core.jobs import Claim
from tests.core.test_jobs import make_spec
from tests.worker.weights.made_checkpoints import draw, save_model
from worker.phase_clock import PhaseClock
from worker.workspace import Workspace

TRAINED = {"seconds": 2.0, "input_tokens": 200}


@pytest.fixture
def workspace(tmp_path):
    made = Workspace(tmp_path / "job")
    save_model(made.instruct, draw(0))
    save_model(made.base, draw(1))
    return made


def clock(workspace, *, attempt=1, **changes):
    spec = make_spec("ftjob-1").model_copy(update=changes)
    return PhaseClock(spec, workspace, Claim("ftjob-1", attempt), "cuda:1")


def test_a_phase_is_kept_with_what_later_jobs_are_compared_by(workspace):
    ticking = clock(workspace)
    preparing = ticking.turn_to("training")
    assert (preparing.phase, preparing.work, preparing.busy_seconds) == ("preparing", 0, 0)  # local folders
    ticking.did_step("train", TRAINED)
    training = ticking.turn_to("grafting")
    assert (training.job_id, training.pair, training.tuning, training.device) == ("ftjob-1", "tiny", "lora", "cuda")
    assert (training.work, training.busy_seconds) == (200, 2.0)
    assert training.parameters == sum(tensor.numel() for tensor in draw(0).values())


def test_models_of_the_hub_are_counted_in_bytes(workspace):
    pair = make_spec("ftjob-1").pair
    hub = ModelSource(kind="hub", location="a/b", revision="c")
    ticking = clock(workspace, pair=pair.model_copy(update={"base": hub, "instruct": hub}))
    preparing = ticking.turn_to("training")
    assert preparing.work == 2 * 4 * sum(tensor.numel() for tensor in draw(0).values())
    assert preparing.busy_seconds == preparing.seconds


def test_grafts_count_bytes_and_comparisons_count_rows(workspace):
    ticking = clock(workspace)
    ticking.turn_to("grafting")
    ticking.did_step("graft", {"seconds": 1.0, "scales": {"1": {"bytes": 10}, "0.5": {"bytes": 20}}})
    assert ticking.turn_to("evaluating").work == 30
    workspace.report.parent.mkdir()
    workspace.report.write_text(json.dumps({"variants": ["a", "b"], "sets": {"x": {"rows": 3}, "y": {"rows": 4}}}))
    ticking.did_step("evaluate", {"seconds": 1.0})
    assert ticking.turn_to("publishing").work == 14


def test_a_later_attempt_is_not_timed(workspace):
    ticking = clock(workspace, attempt=2)
    assert ticking.turn_to("training") is None
    assert ticking.end() is None
