"""The step as the supervisor meets it: a child process, its lines, its files."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

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
    assert [line.step for line in lines if isinstance(line, Step)] == list(range(1, 11))
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


def test_an_adapter_needs_no_base(tmp_path):
    workspace = make_workspace(tmp_path, type="lora")
    workspace.base.unlink()
    notes_of(workspace)
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
    assert (shadow["pair"], shadow["base"], shadow["instruct"]) == ("tiny", "tiny-base", "tiny-instruct")
    assert str(tmp_path) not in text
    assert "/models" not in text


@pytest.mark.parametrize(("std", "level"), [(0.05, "info"), (1e-4, "warn")])
def test_the_owner_reads_how_much_of_the_change_is_kept(tmp_path, std, level):
    (note,) = notes_of(make_workspace(tmp_path, std=std))
    assert note.level == level
    assert "of the learned change" in note.message
    assert (note.data["fidelity"] < 0.9) == (level == "warn")
    assert ("LoRA" in note.message) == (level == "warn")


def test_a_training_that_left_no_change_is_told(tmp_path):
    (note,) = notes_of(make_workspace(tmp_path, std=0.0))
    assert (note.level, note.message) == ("warn", "The graft changes nothing: the training left no change.")
