"""The step as the supervisor meets it: a child process, its lines, its files."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from core.job_spec import DeltaSource
from tests.worker.steps import tiny
from tests.worker.weights.made_checkpoints import SHAPES, cast, draw, load_model, same_bits, save_model
from worker.progress import Line, Note, Step, read_lines
from worker.steps import graft as step
from worker.workspace import Workspace

REPOSITORY = Path(__file__).parents[3]
Q = "model.layers.0.self_attn.q_proj"


def make_workspace(folder: Path, *, std: float = 0.05, strategy: str = "shadow", **changes: Any) -> Workspace:
    """A workspace as the step `train` leaves it; base and instruct are links. `std` is the size of the change."""
    workspace = Workspace(folder / "job")
    workspace.inputs.mkdir(parents=True)
    spec = tiny.make_spec(strategy=strategy, **({"type": "full"} | changes))
    workspace.spec_file.write_text(spec.model_dump_json())
    base, instruct = cast(draw(0)), cast(draw(1))
    save_model(folder / "store" / "base", base)
    save_model(folder / "store" / "instruct", instruct, shards=2)
    workspace.base.symlink_to(folder / "store" / "base")
    workspace.instruct.symlink_to(folder / "store" / "instruct")
    start = base if strategy == "shadow" else instruct
    moved = draw(2, std=std)
    save_model(workspace.tuned, {name: start[name].float() + moved[name] for name in SHAPES})
    save_adapter(workspace.adapter)
    return workspace


def save_adapter(folder: Path) -> None:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors = {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(4, 1)}
    names = {f"base_model.model.{Q}.{side}.weight": factor for side, factor in factors.items()}
    save_file(names, folder / "adapter_model.safetensors")


def run(workspace: Workspace) -> tuple[int, list[Line]]:
    command = [sys.executable, "-m", "worker.steps.graft", str(workspace.root)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False)
    return done.returncode, list(read_lines(io.BytesIO(done.stdout)))


def notes_of(workspace: Workspace) -> list[Note]:
    """The notes of a run in this process, which saves the child's imports."""
    heard = tiny.Heard()
    step.main(workspace, heard.writer)
    return [line for line in heard if isinstance(line, Note)]


def test_a_child_grafts_every_scale_and_tells_its_progress(tmp_path):
    workspace = make_workspace(tmp_path, scales=(0.5, 1.0))
    code, lines = run(workspace)
    assert code == 0
    assert workspace.done("graft").exists()
    told = [line for line in lines if isinstance(line, Step)]
    assert len({line.total_steps for line in told}) == 1  # bytes of both scales
    assert [line.step for line in told] == sorted(line.step for line in told)
    assert told[-1].step == told[-1].total_steps
    result = json.loads(workspace.result("graft").read_bytes())
    assert result["published"] == "1"
    assert result["scales"].keys() == {"1", "0.5"}
    assert (result["scales"]["0.5"]["grafted"], result["scales"]["0.5"]["copied"]) == (3, 2)
    base, tuned, instruct = (load_model(each) for each in (workspace.base, workspace.tuned, workspace.instruct))
    for scale in (1.0, 0.5):
        exact = instruct[f"{Q}.weight"].float() + scale * (tuned[f"{Q}.weight"] - base[f"{Q}.weight"].float())
        assert same_bits(load_model(workspace.grafted(scale))[f"{Q}.weight"], exact.to(torch.bfloat16))


def test_a_child_that_refuses_says_why_and_leaves_no_model(tmp_path):
    workspace = make_workspace(tmp_path)
    config = json.loads((workspace.base / "config.json").read_text())
    (workspace.base / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    code, _ = run(workspace)
    assert code == 1
    failure = json.loads(workspace.failure("graft").read_bytes())
    assert (failure["code"], failure["fault"]) == ("pair_refused", "user")
    assert "model_type" in failure["message"]
    assert {path.name for path in workspace.step("graft").iterdir()} == {"failure.json"}


def test_an_adapter_is_measured_against_its_base(tmp_path):
    workspace = make_workspace(tmp_path, type="lora")
    *_, note = notes_of(workspace)
    assert -1 <= note.data["cosine"] <= 1
    before, after = load_model(workspace.instruct), load_model(workspace.grafted(1.0))
    assert same_bits(after[f"{Q}.weight"], (before[f"{Q}.weight"].float() + 2.0).to(torch.bfloat16))
    assert all(same_bits(after[name], before[name]) for name in SHAPES if name != f"{Q}.weight")


def test_direct_tuning_gives_the_tuned_model_in_instructs_dtype(tmp_path):
    workspace = make_workspace(tmp_path, strategy="direct")
    workspace.base.unlink()
    notes_of(workspace)
    tuned, out = load_model(workspace.tuned), load_model(workspace.grafted(1.0))
    for name in SHAPES:
        torch.testing.assert_close(out[name], tuned[name].to(torch.bfloat16), rtol=2**-7, atol=0)


def test_shadow_json_names_folders_and_no_paths(tmp_path):
    workspace = make_workspace(tmp_path)
    notes_of(workspace)
    text = (workspace.grafted(1.0) / "shadow.json").read_text()
    shadow = json.loads(text)
    names = {role: source["name"] for role, source in shadow["sources"].items()}
    assert (shadow["pair"], names["base"], names["instruct"]) == ("tiny", "tiny-base", "tiny-instruct")
    assert names["tuned"] == "ftjob-1 (full tuning of tiny-base)"
    assert all(file["sha256"] for source in shadow["sources"].values() for file in source["files"].values())
    assert str(tmp_path) not in text
    assert "/models" not in text


@pytest.mark.parametrize(("std", "level"), [(0.05, "info"), (1e-4, "warn")])
def test_the_owner_reads_how_much_of_the_change_is_kept(tmp_path, std, level):
    *_, note = notes_of(make_workspace(tmp_path, std=std))
    assert note.level == level
    assert "of the learned change" in note.message
    assert "Scope and patterns had left out" in note.message  # the embedding and the norm were tuned as well
    assert (note.data["fidelity"] < 0.9) == (level == "warn")
    assert ("an output in float32" in note.message) == (level == "warn")


def test_a_training_that_left_no_change_is_told(tmp_path):
    *_, note = notes_of(make_workspace(tmp_path, std=0.0))
    assert (note.level, note.message) == ("warn", "The graft changes nothing: there is no change to add.")


def test_patterns_and_dtype_are_obeyed_and_kept(tmp_path):
    workspace = make_workspace(
        tmp_path, scope="all", include=("*_proj.*",), exclude=("*.bias",), output_dtype="float32"
    )
    notes_of(workspace)
    before, after = load_model(workspace.instruct), load_model(workspace.grafted(1.0))
    changed = {name for name in SHAPES if not same_bits(after[name], before[name].float())}
    assert changed == {f"{Q}.weight", "model.layers.0.mlp.down_proj.weight"}
    options = json.loads((workspace.grafted(1.0) / "shadow.json").read_text())["options"]
    assert options["exclude"] == ["*.bias"]
    assert (options["scope"], options["output_dtype"]) == ("all", "float32")


def test_what_the_models_differ_in_is_told(tmp_path):
    workspace = make_workspace(tmp_path)
    float32 = {name: tensor.float() for name, tensor in load_model(workspace.base).items()}
    shutil.rmtree(workspace.base.resolve())
    save_model(workspace.base.resolve(), float32)
    first, *_ = notes_of(workspace)
    assert first.message == "About the graft: stored mostly in BF16 in instruct and F32 in base."


# --- the change as an artifact, and a job of the kind graft -----------------------------------------------------------


def graft_workspace(folder: Path, learned: Workspace, kind: str, **changes: Any) -> Workspace:
    """A job that grafts what another one learned, with its own instruct model: there is no base."""
    workspace = Workspace(folder / "graft-job")
    workspace.inputs.mkdir(parents=True)
    shutil.copytree(learned.adapter if kind == "adapter" else learned.saved_delta, workspace.delta)
    workspace.instruct.symlink_to(learned.instruct.resolve())
    delta = DeltaSource(kind=kind, job_id="ftjob-0", files=())
    spec = tiny.make_spec(kind="graft", delta=delta, **changes)
    workspace.spec_file.write_text(spec.model_dump_json())
    return workspace


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_what_is_grafted_later_from_what_was_published_is_the_same_to_the_byte(tmp_path, tuning):
    learned = make_workspace(tmp_path, type=tuning, scale=0.7, publish=True)
    notes_of(learned)
    later = graft_workspace(tmp_path, learned, "delta" if tuning == "full" else "adapter", scale=0.7, type=tuning)
    notes_of(later)
    assert weights(later.grafted(0.7)) == weights(learned.grafted(0.7))
    shadow = json.loads((later.grafted(0.7) / "shadow.json").read_text())
    source = shadow["sources"]["delta" if tuning == "full" else "adapter"]
    assert source["name"] == f"ftjob-0 ({tuning} tuning of tiny-base)"


def test_the_change_is_saved_only_where_it_is_to_be_published_and_has_no_adapter(tmp_path):
    for folder, changes in (("a", {}), ("b", {"type": "lora", "publish": True})):
        workspace = make_workspace(tmp_path / folder, **changes)
        notes_of(workspace)
        assert not workspace.saved_delta.exists()


# --- killed and begun again -------------------------------------------------------------------------------------------


def test_a_scale_that_stands_is_not_made_again(tmp_path):
    workspace = make_workspace(tmp_path, scales=(0.5,), publish=True)
    notes_of(workspace)
    kept = {path: path.stat().st_ino for path in workspace.step("graft").rglob("*") if path.is_file()}
    workspace.failure("graft").write_text("{}")

    workspace.begin("graft")  # as the runner does, for want of the completion mark
    notes_of(workspace)

    assert {path: path.stat().st_ino for path in workspace.step("graft").rglob("*") if path.is_file()} == kept
    assert not workspace.failure("graft").exists()


def test_a_graft_whose_figures_a_kill_took_is_made_again(tmp_path):
    workspace = make_workspace(tmp_path)
    notes_of(workspace)
    before = weights(workspace.grafted(1.0))
    workspace.figures(1.0).unlink()

    workspace.begin("graft")
    *_, note = notes_of(workspace)

    assert "of the learned change" in note.message
    assert weights(workspace.grafted(1.0)) == before


def test_a_graft_that_was_killed_goes_on_and_ends_in_the_same_bytes(tmp_path):
    whole = make_workspace(tmp_path / "whole")
    notes_of(whole)
    killed = make_workspace(tmp_path / "killed")
    killed.begin("graft")
    code = subprocess.run([sys.executable, "-c", DYING, str(killed.root)], cwd=REPOSITORY, check=False).returncode
    assert code == 9
    assert not killed.grafted(1.0).exists()

    killed.begin("graft")
    first, *_ = notes_of(killed)

    assert first.message.startswith("Went on behind ")
    assert weights(killed.grafted(1.0)) == weights(whole.grafted(1.0))


#: Dies as by SIGKILL once every byte of the first scale is written and before the folder stands.
DYING = """
import os, sys
from pathlib import Path
from worker.steps import graft
from worker.workspace import Workspace

class Dying:
    def step(self, done, total):
        if done == total:
            os._exit(9)

graft.main(Workspace(Path(sys.argv[1])), Dying())
"""


def test_every_other_step_begins_with_an_empty_folder(tmp_path):
    workspace = make_workspace(tmp_path)
    workspace.begin("train")
    assert list(workspace.step("train").iterdir()) == []
