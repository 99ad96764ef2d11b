"""A pair as Llama 3 is one: base has never trained the rows of the chat marks. From the training to the verified graft
and to the measurement of what was tuned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.worker.steps import tiny
from tests.worker.weights.made_checkpoints import load_model, same_bits
from worker.progress import Metrics, Note
from worker.steps import evaluate, graft, train
from worker.weights import verify
from worker.weights.special_rows import START_ROWS_FILE
from worker.workspace import Workspace

# PEFT 0.21 asks transformers 5.23 by a name that is going away.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.xdist_group("start-rows"),  # its models are made once
]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: Ids of `<|im_start|>` and `<|im_end|>`; that of the padding stands in no row.
USED = [257, 258]
FULL = {"type": "full", "rank": 0, "alpha": 0}


class Run(NamedTuple):
    workspace: Workspace
    heard: tiny.Heard

    @property
    def notes(self) -> list[Note]:
        return [line for line in self.heard if isinstance(line, Note) and "start_rows" in line.data]


def make_pair(folder: Path, *, tied: bool) -> Path:
    """The embedding's rows are zeros, the head's are equal to one another."""
    base = tiny.make_model(0, tied=tied)
    with torch.no_grad():
        base.get_input_embeddings().weight[256:] = 0.0
        if not tied:
            base.get_output_embeddings().weight[256:] = 0.01
    tiny.save_model(folder / "base", base, template=None, dtype=torch.bfloat16)
    tiny.save_model(folder / "instruct", tiny.make_model(1, tied=tied), dtype=torch.bfloat16)
    return folder


@pytest.fixture(scope="session")
def untied(tmp_path_factory) -> Path:
    return make_pair(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="session")
def tied(tmp_path_factory) -> Path:
    return make_pair(tmp_path_factory.mktemp("tied"), tied=True)


def run(root: Path, models: Path, **changes: Any) -> Run:
    rows = tiny.make_rows(12)
    workspace = tiny.make_workspace(root, models, tiny.make_spec(n_epochs=1, **changes), rows)
    heard = tiny.Heard()
    train.main(workspace, heard.writer)
    return Run(workspace, heard)


@pytest.fixture(scope="session")
def lora(untied, tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("lora"), untied, batch_size=64, holdout_ratio=0)


@pytest.fixture(scope="session")
def full(untied, tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("full"), untied, scope="all", **FULL)


def start_of(models: Path) -> PreTrainedModel:
    """Base with Instruct's rows for the marks in use, by hand."""
    model, instruct = (
        AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32) for name in ("base", "instruct")
    )
    with torch.no_grad():
        model.get_input_embeddings().weight[USED] = instruct.get_input_embeddings().weight[USED]
        model.get_output_embeddings().weight[USED] = instruct.get_output_embeddings().weight[USED]
    return model


def sources(workspace: Workspace) -> dict[str, Path]:
    lora = workspace.adapter.exists()
    roles = {"instruct": workspace.instruct, "base": workspace.base}
    return roles | ({"adapter": workspace.adapter} if lora else {"tuned": workspace.tuned})


@pytest.mark.parametrize("which", ["lora", "full"])
def test_the_owner_is_told_which_tokens_began_with_instructs_rows(which, request):
    (note,) = request.getfixturevalue(which).notes
    assert note.level == "info"
    assert note.data == {"tokens": ["<|im_start|>", "<|im_end|>"], "start_rows": {EMBEDDING: USED, HEAD: USED}}
    assert "<|im_start|>, <|im_end|>" in note.message


def test_the_training_begins_with_those_rows(lora, untied):
    """Warm-up starts at a rate of zero, so step 1 of a batch that holds every row shows the start's own loss."""
    first = next(line for line in lora.heard if isinstance(line, Metrics))
    losses = [tiny.answer_losses(start_of(untied), row).detach() for row in tiny.make_rows(12)]
    assert first.train_loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


@pytest.mark.parametrize("which", ["lora", "full"])
def test_the_graft_names_the_rows_and_is_verified(which, request):
    workspace = request.getfixturevalue(which).workspace
    graft.main(workspace, tiny.Heard().writer)
    out = workspace.grafted(1.0)
    assert json.loads((out / "shadow.json").read_text())["start_rows"] == {EMBEDDING: USED, HEAD: USED}
    assert not (out / START_ROWS_FILE).exists()  # a loader may take every safetensors file for weights
    found = verify(out, sources=sources(workspace), everything=True)
    assert (found.problems, found.tensors) == ((), found.tensors_in_all)


def test_full_tuning_is_subtracted_from_the_start_that_it_had(full, untied):
    workspace = full.workspace
    if not workspace.grafted(1.0).exists():
        graft.main(workspace, tiny.Heard().writer)
    start, tuned = start_of(untied).state_dict(), load_file(workspace.tuned / "model.safetensors")
    instruct, out = load_model(untied / "instruct"), load_model(workspace.grafted(1.0))
    for name, values in instruct.items():
        exact = values.float() + (tuned[name] - start[name])
        assert same_bits(out[name], exact.to(torch.bfloat16)), name
    moved = (tuned[EMBEDDING][USED] - start[EMBEDDING][USED]).abs()
    assert 0 < moved.max() < 0.1


def test_a_tied_table_is_patched_once_for_both(tied, tmp_path):
    done = run(tmp_path, tied, scope="all", **FULL)
    assert done.notes[0].data["start_rows"] == {EMBEDDING: USED}
    graft.main(done.workspace, tiny.Heard().writer)
    start, tuned = start_of(tied).state_dict(), load_file(done.workspace.tuned / "model.safetensors")
    exact = load_model(tied / "instruct")[EMBEDDING].float() + (tuned[EMBEDDING] - start[EMBEDDING])
    assert same_bits(load_model(done.workspace.grafted(1.0))[EMBEDDING], exact.to(torch.bfloat16))
    assert verify(done.workspace.grafted(1.0), sources=sources(done.workspace), everything=True).problems == ()


def test_the_tuned_base_is_measured_with_the_rows_it_was_tuned_on(lora, untied):
    variant = evaluate.list_variants(lora.workspace, lora.workspace.spec())["base_tuned"]
    model = evaluate.load(variant)
    start = start_of(untied)
    for part in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(model, part)().weight, getattr(start, part)().weight)


def test_direct_tuning_begins_with_instruct_as_it_is(tied, tmp_path):
    done = run(tmp_path, tied, strategy="direct")
    assert done.notes == []
    assert not (done.workspace.adapter / START_ROWS_FILE).exists()


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_base_that_knows_its_marks_is_tuned_as_it_is(tmp_path, tuning):
    tiny.save_model(tmp_path / "base", tiny.make_model(0), template=None, dtype=torch.bfloat16)
    tiny.save_model(tmp_path / "instruct", tiny.make_model(1), dtype=torch.bfloat16)
    done = run(tmp_path / "job", tmp_path, **(FULL if tuning == "full" else {}))
    assert done.notes == []
    assert list(done.workspace.step("train").rglob(START_ROWS_FILE)) == []
    graft.main(done.workspace, tiny.Heard().writer)
    assert "start_rows" not in json.loads((done.workspace.grafted(1.0) / "shadow.json").read_text())
