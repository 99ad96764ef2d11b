"""The train step, real trainers on tiny real models: what it writes, what it refuses, that it repeats itself."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FalconH1Config, FalconH1ForCausalLM

from core.errors import InvalidDataset, InvalidInput, PairRefused, StepFailed
from core.job_spec import ModelSource
from tests.worker.steps import tiny
from worker.chat_text import split_rows
from worker.progress import Metrics, Note, Step
from worker.steps import graft, train, train_output, train_watch
from worker.workspace import Workspace

# PEFT 0.21 asks transformers 5.23 by a name that is going away.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.xdist_group("train"),  # its models are made once
]

ROWS = tiny.make_rows(40)


@dataclass
class Run:
    workspace: Workspace
    result: dict[str, Any]
    heard: tiny.Heard


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Base without a chat template, and an instruct model that is another one."""
    folder = tmp_path_factory.mktemp("pair")
    tiny.save_model(folder / "base", tiny.make_model(0), template=None, dtype=torch.bfloat16)
    tiny.save_model(folder / "instruct", tiny.make_model(1), dtype=torch.bfloat16)
    return folder


def run(root: Path, models: Path, rows: Any = ROWS, **changes: Any) -> Run:
    workspace = tiny.make_workspace(root, models, tiny.make_spec(**changes), rows)
    heard = tiny.Heard()
    return Run(workspace, train.main(workspace, heard.writer), heard)


@pytest.fixture(scope="session")
def lora(models, tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("lora"), models)


@pytest.fixture(scope="session")
def full(models, tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("full"), models, type="full", rank=0, alpha=0)


@pytest.fixture(scope="session")
def as_program(models, tmp_path_factory) -> tuple[Workspace, list[dict[str, Any]]]:
    """The step as its supervisor starts it, and the lines it spoke."""
    workspace = tiny.make_workspace(tmp_path_factory.mktemp("program"), models, tiny.make_spec(), ROWS)
    command = [sys.executable, "-m", "worker.steps.train", str(workspace.root)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return workspace, [json.loads(line) for line in ended.stdout.splitlines()]


def metrics(one: Run) -> list[Metrics]:
    return [line for line in one.heard if isinstance(line, Metrics)]


def test_the_loss_falls_on_trained_and_on_held_out_rows(lora, full):
    for one in (lora, full):
        told = metrics(one)
        assert told[-1].train_loss < told[1].train_loss - 0.2
        assert told[-1].full_valid_loss < told[0].full_valid_loss - 0.2


def test_the_result_counts_what_was_done(lora):
    labelled = sum(
        len(row.conversation.messages[1].content) + 1
        for row in split_rows(lora.workspace, lora.workspace.spec()).training
    )
    assert lora.result | {"seconds": 0, "tokens_per_second": 0, "peak_memory_bytes": 0} == {
        "steps": 8,
        "trained_tokens": 2 * labelled,
        "input_tokens": 2 * input_tokens(lora),
        "checkpoints": lora.result["checkpoints"],
        "rows": 32,
        "rows_held_out": 8,
        "final_train_loss": metrics(lora)[-1].train_loss,
        "final_valid_loss": metrics(lora)[-1].valid_loss,
        "seconds": 0,
        "tokens_per_second": 0,
        "device": "cpu",
        "micro_batch_size": 8,
        "peak_memory_bytes": 0,
    }


def input_tokens(one):
    (said,) = [line.data["tokens"] for line in one.heard if isinstance(line, Note) and "labelled_tokens" in line.data]
    return said


def test_the_ends_of_epochs_are_checkpoints_with_what_was_told_of_them(lora, full):
    assert [one["step"] for one in lora.result["checkpoints"]] == [4, 8]
    assert [one["step"] for one in full.result["checkpoints"]] == [8]  # the others would be whole models
    for run_ in (lora, full):
        told = {line.step: line for line in metrics(run_)}
        for checkpoint in run_.result["checkpoints"]:
            line, kept = told[checkpoint["step"]], checkpoint["metrics"]
            assert kept == {name: getattr(line, name) for name in train_watch.CHECKPOINT_METRICS}


def test_the_adapter_of_an_earlier_epoch_is_kept_whole_and_the_last_one_is_the_adapter(lora, full):
    kept = lora.workspace.checkpoint(4)
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert {path.name for path in kept.iterdir()} == {path.name for path in lora.workspace.adapter.iterdir()}
    early, last = (load_file(folder / "adapter_model.safetensors") for folder in (kept, lora.workspace.adapter))
    assert early.keys() == last.keys()
    assert any(not torch.equal(early[name], last[name]) for name in early)
    assert not full.workspace.checkpoint(4).parent.exists()


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([3, 2, 1], [0, 1, 2]),
        ([4, 3, 2, 1], [1, 2, 3]),
        ([1, 2, 3, 4], [0, 1, 2, 3]),
        ([4, 1, 2, 3, 4, 5], [1, 3, 4, 5]),
        ([None, None, None, None, None], [2, 3, 4]),
        ([2, None, 3, None, None, None], [0, 3, 4, 5]),
        ([1, 1, 2, 2, 2], [0, 2, 3, 4]),
    ],
)
def test_the_last_epochs_are_kept_and_the_best_one(losses, kept):
    checkpoints, gone = [], set()
    for step, loss in enumerate(losses):
        checkpoints.append({"step": step, "metrics": {} if loss is None else {"valid_loss": loss}})
        gone |= set(train_watch.drop_old(checkpoints))
    assert [one["step"] for one in checkpoints] == kept
    assert gone == set(range(len(losses))) - set(kept)


def test_every_step_is_told_once_with_its_measurements(lora):
    steps = [(line.step, line.total_steps) for line in lora.heard if isinstance(line, Step)]
    assert steps == [(step, 8) for step in range(1, 9)]
    told = metrics(lora)
    assert [line.step for line in told] == list(range(9))
    assert [line.step for line in told if line.full_valid_loss is not None] == [0, 4, 8]
    assert all(0 <= line.train_mean_token_accuracy <= 1 and line.grad_norm > 0 for line in told[1:])


def test_the_rate_warms_up_and_decays_to_nothing(lora):
    rates = [line.learning_rate for line in metrics(lora)[1:]]
    assert rates[0] == 0
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] < 1e-3


def test_metrics_are_kept_in_a_file(lora):
    kept = [json.loads(line) for line in lora.workspace.metrics.read_text().splitlines()]
    told = [
        {key: value for key, value in msgspec.structs.asdict(line).items() if value is not None}
        for line in metrics(lora)
    ]
    assert kept == told


def test_the_owner_is_told_what_is_trained_on_what(lora, full):
    for one, trainable in ((lora, 4 * _lora_width()), (full, tiny.make_model().num_parameters())):
        note = next(line for line in one.heard if isinstance(line, Note))
        assert "32 rows" in note.message
        assert (note.data["steps"], note.data["device"], note.data["trainable_parameters"]) == (8, "cpu", trainable)


def _lora_width() -> int:
    """Inputs and outputs of every linear layer together; each costs `rank` parameters."""
    linears = [
        module
        for name, module in tiny.make_model().named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    return sum(module.in_features + module.out_features for module in linears)


def test_the_adapter_covers_all_linears_in_float32_and_names_no_path(lora):
    folder = lora.workspace.adapter
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2  # two layers of seven linears, A and B each
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    text = (folder / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == "tiny-base"
    assert "/" not in text


def test_the_tuned_model_is_the_start_in_float32_and_changed(full, models):
    tuned, start = (load_file(folder / "model.safetensors") for folder in (full.workspace.tuned, models / "base"))
    assert {name: tensor.shape for name, tensor in tuned.items()} == {
        name: tensor.shape for name, tensor in start.items()
    }
    assert {tensor.dtype for tensor in tuned.values()} == {torch.float32}
    assert all(not torch.equal(tuned[name], start[name].float()) for name in start if "proj" in name)
    assert str(models) not in (full.workspace.tuned / "config.json").read_text()


@pytest.mark.slow
def test_the_program_repeats_the_run_byte_for_byte_and_speaks_only_lines(as_program, lora):
    workspace, lines = as_program
    name = "adapter_model.safetensors"
    assert (workspace.adapter / name).read_bytes() == (lora.workspace.adapter / name).read_bytes()
    assert {line["type"] for line in lines} == {"note", "step", "metrics"}
    assert json.loads(workspace.result("train").read_text())["steps"] == 8
    assert workspace.done("train").exists()


@pytest.mark.slow
def test_another_seed_makes_other_weights(models, lora, tmp_path):
    other = run(tmp_path, models, seed=8, n_epochs=1)
    name = "adapter_model.safetensors"
    assert (other.workspace.adapter / name).read_bytes() != (lora.workspace.adapter / name).read_bytes()


def test_direct_tuning_starts_from_instruct(models, tmp_path):
    one = run(tmp_path, models, strategy="direct", n_epochs=1, type="full", learning_rate=1e-12)
    tuned = load_file(one.workspace.tuned / "model.safetensors")
    instruct = load_file(models / "instruct" / "model.safetensors")
    assert all(torch.allclose(tuned[name], instruct[name].float(), atol=1e-9) for name in instruct)


def test_the_loss_is_that_of_the_answers_alone(models, tmp_path):
    """Warm-up starts at a rate of zero, so step 1 of a batch that holds every row shows the start model's own loss."""
    rows = tiny.make_rows(12)
    one = run(tmp_path, models, rows, batch_size=64, holdout_ratio=0, n_epochs=1)
    model = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32)
    losses = torch.cat([tiny.answer_losses(model, row) for row in rows]).detach()
    assert metrics(one)[0].train_loss == pytest.approx(losses.mean().item(), rel=1e-4)


@pytest.mark.slow
def test_half_sized_micro_batches_take_the_same_steps(models, lora, tmp_path, monkeypatch):
    monkeypatch.setitem(train.MICRO_BATCH_TOKENS, "cpu", 200)
    halved = run(tmp_path, models)
    assert halved.result["micro_batch_size"] < 8
    losses = [(line.train_loss, line.grad_norm) for line in metrics(halved)[1:]]
    assert losses == [pytest.approx((line.train_loss, line.grad_norm), rel=1e-3) for line in metrics(lora)[1:]]


@pytest.mark.slow
def test_fewer_rows_than_a_batch_make_one_step_an_epoch(models, tmp_path):
    assert run(tmp_path, models, tiny.make_rows(3), batch_size=32).result["steps"] == 2


@pytest.mark.slow
def test_bfloat16_autocast_keeps_float32_weights(models, tmp_path):
    one = run(tmp_path, models, precision="bfloat16", n_epochs=1)
    tensors = load_file(one.workspace.adapter / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert math.isfinite(one.result["final_train_loss"])


def test_a_diverging_run_stops_at_once_and_says_why(models, tmp_path):
    workspace = tiny.make_workspace(
        tmp_path, models, tiny.make_spec(type="full", learning_rate=1e30, warmup_ratio=0), ROWS
    )
    heard = tiny.Heard()
    with pytest.raises(StepFailed, match=r"diverged at step [23] of 8") as failure:
        train.main(workspace, heard.writer)
    assert (failure.value.cause.code, failure.value.cause.fault) == ("non_finite_loss", "user")
    assert "lower learning rate" in failure.value.cause.hint
    assert not workspace.tuned.exists()


def test_cut_and_dropped_rows_are_warned_of(models, tmp_path):
    rows = [*tiny.make_rows(8), tiny.conversation("x" * 200, "y")]
    one = run(tmp_path, models, rows, holdout_ratio=0, n_epochs=1)
    warning = next(line for line in one.heard if isinstance(line, Note) and line.level == "warn")
    assert warning.data == {"rows_cut": 1, "rows_dropped": 1}


def test_rows_without_an_answer_in_reach_are_refused(models, tmp_path):
    with pytest.raises(InvalidDataset, match="within 4 tokens"):
        run(tmp_path, models, max_length=4)


def test_a_base_that_is_said_to_be_tied_and_is_not_is_refused_before_a_step(models, tmp_path):
    """Weights that come after a job's admission were judged by their headers."""
    shutil.copytree(models, tmp_path / "pair")
    file = tmp_path / "pair" / "base" / "model.safetensors"
    tensors = load_file(file)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    save_file(tensors | head, file, metadata={"format": "pt"})
    with pytest.raises(PairRefused, match="base ties its head") as refusal:
        run(tmp_path / "job", tmp_path / "pair")
    assert len(refusal.value.reasons) == 1


def test_a_base_that_lacks_the_chat_marks_rows_is_refused(models, tmp_path):
    small = tiny.make_model(0)
    small.config.pad_token_id = small.config.eos_token_id = None
    small.generation_config.pad_token_id = small.generation_config.eos_token_id = None
    small.resize_token_embeddings(200)
    tiny.save_model(tmp_path / "pair" / "base", small, template=None, dtype=torch.float32)
    (tmp_path / "pair" / "instruct").symlink_to(models / "instruct")
    with pytest.raises(InvalidInput, match=r"needs the token 258 \('<\|im_end\|>'\)") as caught:
        run(tmp_path / "job", tmp_path / "pair")
    assert (caught.value.code, "'direct'" in caught.value.hint) == ("token_unknown_to_base", True)


def test_a_base_without_a_row_that_only_pads_is_trained(models, tmp_path):
    """Instruct pads with a token of its own, the last one."""
    marks = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    small = tiny.make_model(0)
    small.config.pad_token_id = small.config.eos_token_id = None
    small.generation_config.pad_token_id = small.generation_config.eos_token_id = None
    small.resize_token_embeddings(258)
    tiny.save_model(tmp_path / "pair" / "base", small, template=None, dtype=torch.float32)
    tiny.save_model(tmp_path / "pair" / "instruct", tiny.make_model(1), dtype=torch.float32)
    for name in ("base", "instruct"):
        tokenizer = tiny.make_tokenizer(tiny.CHATML, marks=marks)
        tokenizer.pad_token, tokenizer.eos_token = "<|pad|>", "<|im_end|>"
        tokenizer.save_pretrained(tmp_path / "pair" / name)
    done = run(tmp_path / "job", tmp_path / "pair")
    assert done.result["final_train_loss"] > 0


@pytest.mark.parametrize("tuning", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_model_with_experts_is_trained_and_grafted(tmp_path, tuning):
    """transformers holds experts as fused parameters and stores them one by one."""
    tiny.save_model(tmp_path / "pair" / "base", tiny.make_expert_model(0), template=None, dtype=torch.bfloat16)
    tiny.save_model(tmp_path / "pair" / "instruct", tiny.make_expert_model(1), dtype=torch.bfloat16)
    options = {} if tuning == "lora" else {"type": "full", "rank": 0, "alpha": 0}
    done = run(tmp_path / "job", tmp_path / "pair", **options)
    result = graft.main(done.workspace, tiny.Heard().writer)
    grafted = result["scales"]["1"]["grafted"]
    attention, experts = 2 * 4, 2 * 4 * 3  # linears of two layers
    assert grafted == (attention if tuning == "lora" else attention + experts)
    warned = [line.message for line in done.heard if isinstance(line, Note) and "expert" in line.message]
    assert bool(warned) == (tuning == "lora")


def test_a_mixer_whose_kernels_go_around_an_adapter_gets_none_there():
    """PEFT refuses these models with out_proj among the targets."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    mixer = {"mamba_d_ssm": 8, "mamba_n_heads": 2, "mamba_d_head": 4, "mamba_d_state": 2}
    config = FalconH1Config(vocab_size=8, num_key_value_heads=2, head_dim=4, **sizes, **mixer)
    with torch.device("meta"):
        model = FalconH1ForCausalLM(config)
    targets = {name.removeprefix("model.layers.0.") for name in train.linear_modules(model)}
    assert {"mamba.in_proj", "self_attn.q_proj", "feed_forward.down_proj"} <= targets
    assert "mamba.out_proj" not in targets
    assert get_peft_model(model, LoraConfig(target_modules=train.linear_modules(model)))


def test_a_tuned_model_with_other_tensors_is_refused(models, tmp_path):
    tiny.save_model(tmp_path / "tuned", tiny.make_model(0, tied=False), dtype=torch.float32)
    train_output.require_same_tensors(tmp_path / "tuned", models / "base")
    other = load_file(models / "base" / "model.safetensors")
    renamed = {name.replace("q_proj", "query"): tensor for name, tensor in other.items()}
    (tmp_path / "renamed").mkdir()
    save_file(renamed, tmp_path / "renamed" / "model.safetensors")
    with pytest.raises(StepFailed, match="does not match its start checkpoint in 4 tensors"):
        train_output.require_same_tensors(tmp_path / "renamed", models / "base")


@pytest.mark.parametrize(
    ("batch", "longest", "budget", "micro"),
    [(32, 100, 8192, 32), (32, 1000, 8192, 8), (7, 1000, 2000, 1), (12, 9000, 8192, 1)],
)
def test_the_micro_batch_divides_the_batch_within_the_budget(batch, longest, budget, micro):
    assert train.largest_micro_batch(batch, longest, budget) == micro


def test_measurements_are_few_and_end_with_the_last_step():
    assert train_watch.measuring_steps(9, 2) == {5, 9}
    assert train_watch.measuring_steps(3, 10) == {1, 2, 3}
    assert max(train_watch.measuring_steps(997, 10)) == 997


def test_a_model_is_named_as_others_know_it():
    assert train_output.public_name(ModelSource(kind="hub", location="owner/model", revision="abc")) == "owner/model"
    assert train_output.public_name(ModelSource(kind="local", location="/srv/models/mine")) == "mine"
