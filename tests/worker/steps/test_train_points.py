"""Trainings that are interrupted, by real signals to real children, and go on from their resume points."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.errors import StepFailed
from core.job_spec import JobSpec
from tests.worker.steps import tiny
from tests.worker.steps.nursery import Nursery
from worker.progress import EXIT_SAVED, Metrics, Note, Saved, Step
from worker.resume_manifest import MANIFEST_FILE, PointRefused, read_manifest, seal, verify
from worker.steps import child, train, train_points
from worker.steps.train_watch import SoFar, Watcher
from worker.workspace import Workspace

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.xdist_group("train_points"),  # its models are made once
]

#: Twelve steps in three epochs, the last one of each smaller than the others; dropout draws from the global generator.
LORA = tiny.make_spec(n_epochs=3, dropout=0.1)
FULL = tiny.make_spec(n_epochs=3, type="full", rank=0, alpha=0, learning_rate=1e-3)
ROWS = tiny.make_rows(37)
STEPS = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    tiny.save_model(folder / "base", tiny.make_model(0), template=None, dtype=torch.bfloat16)
    tiny.save_model(folder / "instruct", tiny.make_model(1), dtype=torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def nursery():
    one = Nursery()
    yield one
    one.close()


@pytest.fixture
def job(tmp_path, models):
    def make(spec: JobSpec = LORA, name: str = "job", **conditions) -> Workspace:
        workspace = tiny.make_workspace(tmp_path / name, models, spec, ROWS)
        set_conditions(workspace, **conditions)
        return workspace

    return make


@pytest.fixture(scope="module")
def uninterrupted(models, nursery, tmp_path_factory):
    """What a training leaves that nothing stopped."""
    made: dict[str, dict[str, bytes]] = {}

    def of(spec: JobSpec) -> dict[str, bytes]:
        if spec.training_sha256 not in made:
            workspace = tiny.make_workspace(tmp_path_factory.mktemp("job"), models, spec, ROWS)
            assert nursery.run(workspace) == 0
            made[spec.training_sha256] = left(workspace)
        return made[spec.training_sha256]

    return of


def set_conditions(workspace: Workspace, **conditions) -> None:
    workspace.conditions_file.write_text(json.dumps({"save_seconds": 600, "oom_level": 0} | conditions))


def left(workspace: Workspace) -> dict[str, bytes]:
    """All that the step made, byte for byte, but for what it took."""
    result = json.loads(workspace.result("train").read_text())
    for name in ("seconds", "tokens_per_second", "peak_memory_bytes"):
        assert result.pop(name) > 0
    folder = workspace.step("train")
    made = [workspace.metrics, *folder.glob("adapter/*"), *folder.glob("model/*"), *folder.glob("checkpoints/*/*")]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in made}
    return files | {"result": json.dumps(result).encode()}


def points(workspace: Workspace) -> list[int]:
    """The steps whose points stand whole."""
    found = [verify(path, spec=workspace.spec().training_sha256) for path in workspace.resume_points.glob("step-*")]
    return sorted(manifest.step for manifest in found)


def go_on_from_newest(workspace: Workspace) -> None:
    """Put the newest point where the next run finds it, as the supervisor does."""
    if steps := points(workspace):
        shutil.rmtree(workspace.resume_from, ignore_errors=True)
        (workspace.resume_points / f"step-{steps[-1]}").rename(workspace.resume_from)


def ask_at(nursery: Nursery, workspace: Workspace, step: int) -> None:
    one = nursery.start(workspace, f"train.step.{step}=asked")
    assert one.wait() == EXIT_SAVED, one.log
    assert one.lines[-1] == Saved(step=step)
    assert points(workspace) == [step]
    assert not workspace.done("train").exists()
    go_on_from_newest(workspace)


@pytest.mark.parametrize(
    ("spec", "stops"),
    [
        pytest.param(LORA, [4, 6], id="lora"),
        pytest.param(LORA, [1, 4, 6, 11], id="lora-often", marks=pytest.mark.slow),
        pytest.param(FULL, [3, 8], id="full"),
        *(pytest.param(FULL, [step], id=f"full-{step}", marks=pytest.mark.slow) for step in range(1, STEPS)),
    ],
)
def test_a_training_that_was_asked_to_leave_ends_as_if_it_never_had(job, nursery, uninterrupted, spec, stops):
    """Asked in the middle of epochs and at their ends, again and again."""
    workspace = job(spec)
    for step in stops:
        ask_at(nursery, workspace, step)
    assert nursery.run(workspace) == 0
    assert left(workspace) == uninterrupted(spec)


def test_a_killed_training_goes_on_from_its_newest_point_and_ends_the_same(job, nursery, uninterrupted):
    workspace = job(save_seconds=0)
    one = nursery.start(workspace)
    one.wait_until(lambda: any(isinstance(line, Saved) for line in one.lines))
    one.kill(signal.SIGKILL)
    assert one.wait() == -signal.SIGKILL
    assert points(workspace)[-1] >= max(line.step for line in one.lines if isinstance(line, Saved))
    go_on_from_newest(workspace)
    assert nursery.run(workspace) == 0
    assert left(workspace) == uninterrupted(LORA)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kills_at_any_moment_lose_only_what_came_after_the_newest_point(job, nursery, uninterrupted, seed):
    spec = LORA if seed % 2 else FULL
    workspace, drawn = job(spec, save_seconds=0), random.Random(seed)
    for _ in range(3):
        one, step = nursery.start(workspace), drawn.randint(0, STEPS)
        one.wait_until_measured(step)
        one.kill(signal.SIGKILL)
        if one.wait() == 0:
            break
        go_on_from_newest(workspace)
    else:
        assert nursery.run(workspace) == 0
    assert left(workspace) == uninterrupted(spec)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_sigusr1_at_any_moment_leaves_a_whole_point_or_nothing(job, nursery, uninterrupted, seed):
    workspace, drawn = job(save_seconds=0), random.Random(seed)
    for _ in range(3):
        one, lines = nursery.start(workspace), drawn.randint(0, 2 * STEPS)
        one.wait_until_said(lines)
        one.kill(signal.SIGUSR1)
        ended = one.wait()
        assert ended in (0, EXIT_SAVED, -signal.SIGUSR1), one.log
        if ended == EXIT_SAVED:
            assert one.lines[-1] == Saved(step=points(workspace)[-1])
        if workspace.done("train").exists():
            break
        go_on_from_newest(workspace)
    else:
        assert nursery.run(workspace) == 0
    assert left(workspace) == uninterrupted(LORA)


def test_a_point_that_a_kill_cut_short_does_not_exist(job, nursery):
    workspace = job(save_seconds=0)
    assert nursery.run(workspace, "train.save.1=killed") == -signal.SIGKILL
    assert [path.name for path in workspace.resume_points.iterdir()] == [".step-1.tmp"]
    assert nursery.run(workspace, "train.step.2=asked") == EXIT_SAVED
    assert points(workspace)[-1] == 2


def test_points_come_by_the_clock_and_the_two_newest_stay(job, nursery, monkeypatch):
    monkeypatch.setattr(train_points, "REST", 0)
    workspace = job(save_seconds=0)
    heard = tiny.Heard()
    train.main(workspace, heard.writer)
    assert [line.step for line in heard if isinstance(line, Saved)] == list(range(1, STEPS))  # the last is the result
    assert points(workspace) == [10, 11]
    assert not list(workspace.resume_points.glob(".*"))


def test_the_first_point_does_not_come_before_its_time_and_a_save_is_followed_by_a_rest(job, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(train_points.time, "monotonic", lambda: now[0])
    workspace, heard = job(), tiny.Heard()
    workspace.metrics.touch()
    saver = train_points.PointSaver(workspace, LORA, heard.writer, SoFar(), 600.0)
    saver.on_train_begin(None, None, None)
    state, control = train.TrainerState(max_steps=12, num_train_epochs=3), train.TrainerControl()

    def due_at(moment: float, step: int) -> bool:
        now[0], state.global_step = moment, step
        saver.on_log(None, state, control)
        return control.should_save

    assert [due_at(699, 1), due_at(701, 2)] == [False, True]

    def write(folder: Path) -> None:
        now[0] += 50

    saver.save(2, write)
    assert [due_at(751 + 999, 3), due_at(751 + 1001, 5)] == [False, True]


def test_smaller_micro_batches_go_on_with_the_same_steps(job, nursery, uninterrupted):
    spec = tiny.make_spec(n_epochs=3)
    workspace = job(spec)
    ask_at(nursery, workspace, 6)
    set_conditions(workspace, oom_level=1)
    assert nursery.run(workspace) == 0
    result = json.loads(workspace.result("train").read_text())
    assert (result["micro_batch_size"], result["steps"]) == (4, STEPS)
    whole, halved = losses(uninterrupted(spec)["metrics.jsonl"]), losses(workspace.metrics.read_bytes())
    assert halved.keys() == whole.keys()
    assert [halved[step] for step in range(1, 7)] == [whole[step] for step in range(1, 7)]
    assert [halved[step] for step in range(7, 13)] == [pytest.approx(whole[step], rel=1e-3) for step in range(7, 13)]


def losses(metrics: bytes) -> dict[int, float]:
    lines = [json.loads(line) for line in metrics.splitlines()]
    return {line["step"]: line["train_loss"] for line in lines if line["step"]}


@pytest.mark.parametrize(("level", "micro_batch"), [(0, 8), (1, 4), (2, 2), (3, 1), (4, 1)])
def test_each_level_halves_the_micro_batch_down_to_one_row(job, level, micro_batch):
    workspace = job()
    chat = train.ChatText.load(workspace.instruct, base=workspace.base)
    plan = train.make_plan(workspace, LORA, chat, level)
    assert (plan.micro_batch, plan.micro_batch * plan.accumulation) == (micro_batch, 8)


@pytest.mark.parametrize(("number", "most", "divisor"), [(28, 7, 7), (28, 3, 2), (9, 4, 3), (7, 3, 1), (8, 0, 1)])
def test_a_micro_batch_divides_the_batch(number, most, divisor):
    assert train.largest_divisor(number, most) == divisor


def test_want_of_memory_says_whether_a_smaller_micro_batch_would_help(job, nursery):
    workspace = job(save_seconds=0)
    assert nursery.run(workspace, "train.micro_batch.8=memory") == child.EXIT_FAILED
    cause = json.loads(workspace.failure("train").read_text())
    assert (cause["code"], cause["fault"], cause["retryable"]) == ("out_of_memory", "memory", True)
    set_conditions(workspace, oom_level=3)
    assert nursery.run(workspace, "train.micro_batch.1=memory") == child.EXIT_FAILED
    assert json.loads(workspace.failure("train").read_text())["retryable"] is False


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_want_of_memory_is_known_by_what_the_libraries_say(error):
    assert child.cause_of(error).code == "out_of_memory"


def test_other_errors_are_not_taken_for_want_of_memory():
    assert child.cause_of(ValueError("out of memory")).code == "step_crashed"


def test_a_full_disk_costs_the_point_and_not_the_training(job, nursery):
    workspace = job(save_seconds=0)
    one = nursery.start(workspace, "train.save.1=disk")
    assert one.wait() == 0
    warnings = [line.message for line in one.lines if isinstance(line, Note) and line.level == "warn"]
    assert len(warnings) == 1
    assert "step 1: the worker's disk is full. The training goes on" in warnings[0]
    assert 1 not in [line.step for line in one.lines if isinstance(line, Saved)]


def test_a_full_disk_is_the_cause_where_the_training_was_to_leave(job, nursery):
    workspace = job()
    assert nursery.run(workspace, "train.step.3=asked,train.save.3=disk") == child.EXIT_FAILED
    assert not list(workspace.resume_points.iterdir())
    cause = json.loads(workspace.failure("train").read_text())
    assert (cause["code"], cause["fault"], cause["retryable"]) == ("disk_full", "infrastructure", True)


def test_the_stacks_of_a_stalled_training_are_in_its_log(job, nursery):
    workspace = job()
    one = nursery.start(workspace, "train.step.2=stalled")
    one.wait_until_measured(1)

    def is_seen() -> bool:
        one.kill(signal.SIGUSR2)
        time.sleep(0.1)
        return " in failpoint" in one.log and " in run_trainer" in one.log

    one.wait_until(is_seen)
    one.kill(signal.SIGKILL)
    assert one.wait() == -signal.SIGKILL
    assert is_seen()


def test_no_point_is_made_of_a_diverged_training(job, nursery, monkeypatch):
    monkeypatch.setattr(train_points, "REST", 0)
    spec = tiny.make_spec(type="full", learning_rate=1e30, warmup_ratio=0)
    workspace, heard = job(spec, save_seconds=0), tiny.Heard()
    with pytest.raises(StepFailed, match=r"diverged at step [23] of"):
        train.main(workspace, heard.writer)
    last = max(line.step for line in heard if isinstance(line, Step))
    assert points(workspace)[-1] == last - 1
    weights = load_file(workspace.resume_points / f"step-{last - 1}" / train_points.WEIGHTS_FILE)
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize(("loss", "grad_norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("inf"))])
def test_the_first_number_that_is_not_finite_stops_the_training(tmp_path, loss, grad_norm):
    heard = tiny.Heard()
    watcher = Watcher(tmp_path / "metrics.jsonl", heard.writer, [], 0, LORA, SoFar())
    state, logs = train.TrainerState(global_step=5, max_steps=9), {"loss": loss, "grad_norm": grad_norm}
    with pytest.raises(StepFailed, match="diverged at step 5 of 9") as caught:
        watcher.on_log(None, state, None, logs=logs)
    assert (caught.value.cause.code, caught.value.cause.fault) == ("non_finite_loss", "user")


# --- what a point holds, and points that do not agree -----------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(models, nursery, tmp_path_factory) -> Path:
    workspace = tiny.make_workspace(tmp_path_factory.mktemp("saved"), models, LORA, ROWS)
    assert nursery.run(workspace, "train.step.5=asked") == EXIT_SAVED
    return workspace.resume_points / "step-5"


@pytest.fixture
def point(saved, job) -> Workspace:
    workspace = job()
    shutil.copytree(saved, workspace.resume_from)
    return workspace


def test_a_point_lists_all_that_it_holds(saved):
    names = {path.name for path in saved.iterdir()}
    assert read_manifest(saved).files.keys() == names - {MANIFEST_FILE}
    assert {name for name in names if name.startswith("epoch-")} == {
        "epoch-4.adapter_config.json",
        "epoch-4.adapter_model.safetensors",
    }
    assert read_manifest(saved).total_bytes == sum((saved / name).stat().st_size for name in names - {MANIFEST_FILE})


def test_a_run_that_goes_on_tells_only_what_is_new(point, nursery):
    one = nursery.start(point)
    assert one.wait() == 0
    note, *others = one.lines
    assert isinstance(note, Note)
    assert (note.message, note.data["step"]) == ("The training goes on after step 5 of 12.", 5)
    assert [line.step for line in others if isinstance(line, Step)] == list(range(6, 13))
    assert [line.step for line in others if isinstance(line, Metrics)] == list(range(6, 13))
    assert not any(isinstance(line, Note) for line in others)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit": lambda folder: flip(folder / "model.safetensors"),
    "a bit of a pickle": lambda folder: flip(folder / "optimizer.pt"),
    "a file": lambda folder: (folder / "scheduler.pt").unlink(),
    "an end": lambda folder: os.truncate(folder / "optimizer.pt", 100),
    "a stranger": lambda folder: (folder / "scaler.pt").write_bytes(b"x"),
    "its manifest": lambda folder: (folder / MANIFEST_FILE).unlink(),
    "its manifest's end": lambda folder: os.truncate(folder / MANIFEST_FILE, 50),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_point_is_refused_before_anything_is_loaded(point, damage, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(train_points, "safe_open", None)
    DAMAGES[damage](point.resume_from)
    with pytest.raises(PointRefused) as caught:
        train.main(point, tiny.Heard().writer)
    cause = child.cause_of(caught.value)
    assert (cause.code, cause.fault, cause.retryable) == ("resume_point_refused", "infrastructure", True)
    assert "goes on from an older state" in cause.hint


def test_the_point_of_another_training_is_refused(point):
    other = tiny.make_spec(n_epochs=3, dropout=0.1, seed=8)
    point.spec_file.write_text(other.model_dump_json())
    with pytest.raises(PointRefused, match="another spec"):
        train.main(point, tiny.Heard().writer)


def test_a_point_of_another_job_with_the_same_training_is_taken(point, nursery, uninterrupted):
    again = LORA.model_copy(update={"job_id": "ftjob-2", "fine_tuned_model": "ft:tiny:team::2"})
    point.spec_file.write_text(again.model_dump_json())
    assert nursery.run(point) == 0
    assert left(point) == uninterrupted(LORA)


def test_a_whole_point_that_other_code_wrote_is_refused(point):
    """And then set aside, where an unexpected error would be met again at each try."""
    (point.resume_from / train_points.SO_FAR_FILE).write_text('{"seconds": "long"}')
    (point.resume_from / MANIFEST_FILE).unlink()
    seal(point.resume_from, step=5, spec=LORA.training_sha256)
    with pytest.raises(PointRefused, match="cannot be loaded by the libraries that are here"):
        train.main(point, tiny.Heard().writer)


def test_weights_that_the_model_does_not_train_are_refused(saved):
    with pytest.raises(PointRefused, match="other weights"):
        train_points.load_weights(tiny.make_model(), saved)
