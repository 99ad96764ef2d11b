"""The evaluation's numbers against plain loops, and its verdicts against results made up to deserve them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from core.datasets import Conversation, Message
from tests.worker.steps import tiny
from worker.chat_text import ChatText, Row, encode_rows
from worker.progress import Step
from worker.report import Report, RowResult, SetResult, VariantResult, bootstrap_interval
from worker.steps import evaluate
from worker.workspace import Workspace

# PEFT 0.21 asks transformers 5.23 by a name that is going away.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.xdist_group("evaluate"),  # its models are made once
]

HELD_OUT, PROBE = (
    tiny.make_rows(12),
    [tiny.conversation(f"say {n}", "A much longer reply than that " * 2) for n in range(4)],
)


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Path:
    """Base and instruct know nothing; `taught` knows the held-out rows, as a perfect graft would."""
    folder = tmp_path_factory.mktemp("evaluated")
    tiny.save_model(folder / "base", tiny.make_model(0), template=None, dtype=torch.float32)
    tiny.save_model(folder / "instruct", tiny.make_model(1), dtype=torch.bfloat16)
    tiny.save_model(folder / "taught", tiny.teach(tiny.make_model(1), HELD_OUT, steps=80), dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    adapter = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    )
    adapter.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder


def make_workspace(root: Path, pair: Path, **changes: Any) -> Workspace:
    spec = tiny.make_spec(max_new_tokens=6, **changes)
    workspace = tiny.make_workspace(root, pair, spec, tiny.make_rows(4))
    tiny.write_rows(workspace.validation, HELD_OUT)
    for name in spec.evaluation.probes:
        tiny.write_rows(workspace.probe(name), PROBE)
    workspace.begin("graft")
    for scale in spec.scales:
        workspace.grafted(scale).symlink_to(pair / ("taught" if scale == 1 else "instruct"))
    workspace.adapter.symlink_to(pair / "adapter")
    return workspace


@pytest.fixture(scope="session")
def evaluated(pair, tmp_path_factory) -> tuple[Workspace, tiny.Heard, dict[str, Any]]:
    workspace = make_workspace(tmp_path_factory.mktemp("job"), pair, scales=(0.5,), probes=["small talk"])
    heard = tiny.Heard()
    return workspace, heard, evaluate.main(workspace, heard.writer)


def read(workspace: Workspace) -> dict[str, Any]:
    return json.loads(workspace.report.read_text())


def reference_model(pair: Path, variant: str) -> Any:
    folders = {"instruct": "instruct", "grafted@1": "taught", "grafted@0.5": "instruct", "base_tuned": "base"}
    model = AutoModelForCausalLM.from_pretrained(pair / folders[variant], dtype=torch.float32)
    return PeftModel.from_pretrained(model, pair / "adapter") if variant == "base_tuned" else model


VARIANTS = ["instruct", "base_tuned", "grafted@1", "grafted@0.5"]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_losses_equal_a_plain_loop(evaluated, pair, variant):
    model = reference_model(pair, variant)
    for name, rows in (("validation", HELD_OUT), ("small talk", PROBE)):
        mean = torch.cat([tiny.answer_losses(model, row) for row in rows]).mean().item()
        measured = read(evaluated[0])["sets"][name]["results"][variant]
        assert measured["loss"] == pytest.approx(mean, rel=1e-4)
        assert measured["perplexity"] == pytest.approx(math.exp(mean), rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_answers_equal_a_plain_greedy_loop(evaluated, pair, variant):
    model, report = reference_model(pair, variant), read(evaluated[0])
    answers = [tiny.greedy_answer(model, row, 6) for row in HELD_OUT]
    right = [answer.strip() == row.messages[1].content for answer, row in zip(answers, HELD_OUT, strict=True)]
    assert report["sets"]["validation"]["results"][variant]["exact_match"] == pytest.approx(sum(right) / len(right))
    shown = [sample["answers"][variant] for sample in report["samples"] if sample["set"] == "validation"]
    assert shown == answers[:3]


def test_the_report_says_what_was_measured_on_what(evaluated):
    report = read(evaluated[0])
    assert (report["version"], report["strategy"], report["pair"], report["scale"]) == (1, "shadow", "tiny", 1.0)
    assert report["variants"] == VARIANTS
    assert report["sets"]["validation"]["exact_match_measured"]
    assert not report["sets"]["small talk"]["exact_match_measured"]
    assert report["sets"]["small talk"]["results"]["instruct"]["exact_match"] is None
    assert [sample["row"] for sample in report["samples"]] == [1, 2, 3, 1, 2, 3]


def test_the_verdict_praises_a_graft_that_learned(evaluated):
    workspace, _, result = evaluated
    assert result["verdict"] == read(workspace)["verdict"]
    assert result["verdict"]["helped"]
    assert read(workspace)["sets"]["validation"]["results"]["grafted@1"]["exact_match"] == 1
    assert result["verdict"]["summary"].startswith("The grafted model does better on the held-out rows than untouched")
    assert "too few rows" in result["verdict"]["summary"]


def test_the_markdown_report_holds_the_same_numbers(evaluated):
    text = evaluated[0].report.with_suffix(".md").read_text()
    measured = read(evaluated[0])["sets"]["validation"]["results"]["grafted@1"]
    assert f"| **grafted@1** | {measured['loss']:.4g} |" in text
    assert read(evaluated[0])["verdict"]["summary"] in text


def test_progress_counts_every_row_to_the_end(evaluated):
    told = [line for line in evaluated[1] if isinstance(line, Step)]
    in_all = len(VARIANTS) * (12 + 12 + 4 + 3)
    assert {line.total_steps for line in told} == {in_all}
    assert told[-1].step == in_all


def test_a_direct_job_compares_two_models_on_the_first_rows(pair, tmp_path):
    workspace = make_workspace(tmp_path, pair, strategy="direct", max_rows=5, exact_match="off")
    evaluate.main(workspace, tiny.Heard().writer)
    report = read(workspace)
    assert report["variants"] == ["instruct", "direct"]
    assert (report["sets"]["validation"]["rows"], report["sets"]["validation"]["rows_left_out"]) == (5, 7)
    assert report["sets"]["validation"]["results"]["direct"]["exact_match"] is None
    assert "7 more were not measured" in workspace.report.with_suffix(".md").read_text()


def test_full_tuning_compares_the_tuned_base(tmp_path):
    variants = evaluate.list_variants(Workspace(tmp_path), tiny.make_spec(type="full", scales=(0.5,)))
    assert list(variants) == ["instruct", "base_tuned", "grafted@1", "grafted@0.5"]
    assert variants["base_tuned"] == evaluate.Variant(tmp_path / "train" / "model")


def test_a_graft_compares_no_tuned_base_and_measures_the_same_rows(pair, tmp_path):
    workspace = make_workspace(tmp_path, pair, scales=(0.5,), kind="graft")
    (workspace.inputs / "base").unlink()
    evaluate.main(workspace, tiny.Heard().writer)
    report = read(workspace)
    assert report["variants"] == ["instruct", "grafted@1", "grafted@0.5"]
    assert (report["published"], report["sets"]["validation"]["rows"]) == ("grafted@1", len(HELD_OUT))


def test_nothing_held_out_is_said_plainly(pair, tmp_path):
    workspace = make_workspace(tmp_path, pair, strategy="direct", holdout_ratio=0)
    workspace.validation.unlink()
    result = evaluate.main(workspace, tiny.Heard().writer)
    assert "nothing was measured" in result["verdict"]["summary"]


def test_a_greeting_that_nobody_asked_for_is_scored_but_not_generated():
    rows = [Row(1, Conversation((Message("assistant", "Hello", True),)))]
    chat = ChatText(tiny.make_tokenizer(tiny.CHATML))
    made = evaluate.make_set(encode_rows(chat, rows, 99).rows, 0, tiny.make_spec().evaluation, chat)
    assert (len(made.rows), made.questions) == (1, [])


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "content"),
    [
        (" <abc>!\n", "<abc>!", True, True),
        ("abc", "<abc>!", False, True),
        ("A b-C", "abc", False, True),
        ("abd", "abc", False, False),
        ("é", "É", False, True),
        ("?", "!", False, False),
        ("!", "!", True, True),
        ("yes", "!", False, False),
    ],
)
def test_content_is_told_from_form(answer, reference, exact, content):
    assert (evaluate.exact_match(answer, reference), evaluate.content_match(answer, reference)) == (exact, content)


def made_up(after: list[float], before: list[float], *, exact: bool = False, name: str = "validation") -> Report:
    """A report whose rows have these losses, or are right where 1 and wrong where 0."""

    def variant(values: list[float]) -> VariantResult:
        rows = [RowResult(0.5, bool(value), bool(value)) if exact else RowResult(value) for value in values]
        return VariantResult(sum(values) / len(values), rows)

    results = {"instruct": variant(before), "base_tuned": variant([0.0] * len(after)), "grafted@1": variant(after)}
    return Report("shadow", "tiny", 1.0, 0, "grafted@1", list(results), {name: SetResult(exact, 0, results)})


WAVE = [math.sin(n) for n in range(40)]


@pytest.mark.parametrize(
    ("after", "before", "outcome"),
    [
        ([1.0] * 20, [2.0] * 20, "better"),
        ([2.0] * 20, [1.0] * 20, "worse"),
        ([2 + value for value in WAVE], [2.0] * 40, "kept"),
        ([1.0] * 9, [2.0] * 9, "too_few_rows"),
        ([math.nan] * 20, [1.0] * 20, "worse"),
    ],
)
def test_the_outcome_needs_the_whole_interval_on_one_side(after, before, outcome):
    report = made_up(after, before)
    assert report.verdict()["comparisons"][0]["outcome"] == outcome
    json.dumps(report.as_dict(), allow_nan=False)


def test_exact_answers_outrank_the_loss():
    assert made_up([1.0] * 20, [0.0] * 20, exact=True).verdict()["helped"]
    lost = made_up([0.0] * 20, [1.0] * 20, exact=True, name="manners").verdict()
    assert (lost["helped"], lost["harmed"]) == (False, ["manners"])
    assert "On probe manners it got worse (exact answers 0.0% against 100.0% untouched" in lost["summary"]


def test_where_nobody_answers_right_the_loss_decides():
    results = {
        name: VariantResult(loss, [RowResult(loss, exact=False, content=False)] * 20)
        for name, loss in (("instruct", 2.0), ("base_tuned", 1.0), ("grafted@1", 1.5))
    }
    report = Report("shadow", "tiny", 1.0, 0, "grafted@1", list(results), {"validation": SetResult(True, 0, results)})
    comparison = report.verdict()["comparisons"][0]
    assert (comparison["measure"], comparison["outcome"]) == ("loss", "better")


def test_a_graft_that_did_not_help_is_called_so_and_the_tuned_base_is_named():
    summary = made_up([2.0] * 20, [2.0] * 20).verdict()["summary"]
    assert summary.startswith("The tuning did not measurably help")
    assert "did not carry over" in summary


def test_the_interval_is_seeded_and_holds_the_mean():
    low, high = bootstrap_interval(WAVE, seed=3)
    assert low < sum(WAVE) / len(WAVE) < high
    assert (low, high) == bootstrap_interval(WAVE, seed=3)


def test_answers_draw_no_cells_of_their_own(evaluated):
    sample = evaluate.Sample("set", 1, "a|b\nc", "<img>", {"instruct": "x | y"})
    text = Report("shadow", "p", 1.0, 0, "g", [], {}, [sample]).as_markdown()
    assert "a\\|b c" in text
    assert "&lt;img>" in text
    assert "| instruct | x \\| y |" in text
