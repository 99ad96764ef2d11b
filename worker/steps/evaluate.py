"""Measure untouched instruct, the tuned model and every graft side by side, on rows that none was trained on.

The gain of Shadow-FT is mostly avoided damage and not every pair gains, so each job measures both what was learned
(the held-out rows) and what had to survive (the probes). Models are loaded one after the other; all get the same text
in instruct's format.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from core.datasets import Message
from core.estimate import ANSWERED_TOKENS
from core.job_spec import Evaluation, JobSpec
from worker.chat_text import ChatText, EncodedRow, encode_rows, read_set, split_rows
from worker.progress import ProgressWriter
from worker.report import BASE_TUNED, DIRECT, INSTRUCT, VALIDATION, Report, RowResult, Sample, SetResult, VariantResult
from worker.scoring import Score, score_rows, total
from worker.start_rows_in_model import put_rows
from worker.steps import child
from worker.weights.special_rows import read_start_rows
from worker.workspace import Workspace, write_durably

#: `auto` generates answers where no reference is longer than this many tokens: beyond it, few free answers are equal
#: to their reference letter by letter, and each costs a forward pass a token.
SHORT_ANSWER_TOKENS = 32
#: Rows of each set whose answers are shown in the report.
SAMPLES = 3
#: Rows of one generation batch: a batch waits for its longest answer.
GENERATION_ROWS = 32


@dataclass(frozen=True)
class Question:
    """A row's last answer, as something to be asked."""

    index: int
    messages: tuple[Message, ...]
    prompt_ids: list[int]
    reference: str


@dataclass(frozen=True)
class EvaluationSet:
    rows: list[EncodedRow]
    rows_left_out: int
    exact_match_measured: bool
    #: The rows to generate answers for: all, or the samples alone.
    questions: list[Question]


@dataclass(frozen=True)
class Variant:
    folder: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class Answers:
    """How every variant's text is made: greedily, ended by instruct's own end marks."""

    chat: ChatText
    end_ids: list[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Measured:
    result: VariantResult
    #: By the row's index in its set.
    answers: dict[int, str]


def main(workspace: Workspace, progress: ProgressWriter) -> dict[str, Any]:
    started = time.monotonic()
    spec = workspace.spec()
    chat = ChatText.load(workspace.instruct, base=workspace.base if spec.tunes_base else None)
    sets = load_sets(workspace, spec, chat)
    answers = Answers(chat, end_ids(workspace.instruct, chat), spec.evaluation.max_new_tokens)
    variants = list_variants(workspace, spec)
    measured = measure_variants(variants, sets, answers, progress)
    report = make_report(spec, sets, measured)
    write_durably(workspace.report, json.dumps(report.as_dict(), indent=2, ensure_ascii=False).encode())
    write_durably(workspace.report.with_suffix(".md"), report.as_markdown().encode())
    return {"verdict": report.verdict(), "seconds": round(time.monotonic() - started, 3)}


def list_variants(workspace: Workspace, spec: JobSpec) -> dict[str, Variant]:
    instruct = {INSTRUCT: Variant(workspace.instruct)}
    if spec.strategy == "direct":
        return instruct | {DIRECT: Variant(workspace.grafted(1.0))}
    grafts = {graft_name(scale): Variant(workspace.grafted(scale)) for scale in spec.scales}
    if spec.kind == "graft":  # the base was tuned elsewhere
        return instruct | grafts
    lora = spec.tuning.type == "lora"
    tuned = Variant(workspace.base, workspace.adapter) if lora else Variant(workspace.tuned)
    return instruct | {BASE_TUNED: tuned} | grafts


def graft_name(scale: float) -> str:
    return f"grafted@{scale:g}"


def load_sets(workspace: Workspace, spec: JobSpec, chat: ChatText) -> dict[str, EvaluationSet]:
    """The held-out rows and every probe. A set without an answer to measure is left away."""
    rows = {VALIDATION: split_rows(workspace, spec).held_out}
    rows |= {name: read_set(workspace.probe(name)) for name in spec.evaluation.probes}
    limit, max_length = spec.evaluation.max_rows, spec.tuning.max_length
    encoded = {name: encode_rows(chat, listed[:limit], max_length).rows for name, listed in rows.items()}
    return {
        name: make_set(chosen, len(rows[name]) - len(chosen), spec.evaluation, chat)
        for name, chosen in encoded.items()
        if chosen
    }


def make_set(rows: list[EncodedRow], left_out: int, evaluation: Evaluation, chat: ChatText) -> EvaluationSet:
    made = [make_question(index, row, chat) for index, row in enumerate(rows)]
    questions = [question for question in made if question]
    measured = evaluation.exact_match == "on" or (
        evaluation.exact_match == "auto"
        and all(len(chat.ids(question.reference)) <= SHORT_ANSWER_TOKENS for question in questions)
    )
    return EvaluationSet(rows, left_out, measured, questions if measured else questions[:SAMPLES])


def make_question(index: int, row: EncodedRow, chat: ChatText) -> Question | None:
    """None where the only answer is the conversation's first turn, so that nothing was asked."""
    messages = row.row.conversation.messages
    last = max(turn for turn, message in enumerate(messages) if message.role == "assistant")
    before = messages[:last]
    return Question(index, before, chat.prompt_ids(before), messages[last].content) if before else None


def end_ids(instruct: Path, chat: ChatText) -> list[int]:
    """Every id that ends an answer of instruct's; base, which often has another end mark, is held to them too."""
    if (instruct / "generation_config.json").exists():
        ends = GenerationConfig.from_pretrained(instruct, local_files_only=True).eos_token_id
    else:
        config = AutoConfig.from_pretrained(instruct, trust_remote_code=False, local_files_only=True)
        ends = config.get_text_config().eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return sorted({end for end in [*listed, chat.tokenizer.eos_token_id] if end is not None})


def measure_variants(
    variants: dict[str, Variant], sets: dict[str, EvaluationSet], answers: Answers, progress: ProgressWriter
) -> dict[str, dict[str, Measured]]:
    """By variant, then by set. Every row counts once for its loss and once for its answer."""
    in_total = len(variants) * sum(len(one.rows) + len(one.questions) for one in sets.values())
    tick = ticker(progress, in_total)
    measured = {}
    for name, variant in variants.items():
        measured[name] = measure_variant(variant, sets, answers, tick)
        gc.collect()  # a model is full of cycles, and the next one needs its memory
        torch.cuda.empty_cache()
    return measured


def measure_variant(
    variant: Variant, sets: dict[str, EvaluationSet], answers: Answers, tick: Callable[[int], None]
) -> dict[str, Measured]:
    model = load(variant)
    return {name: measure(model, one, answers, tick) for name, one in sets.items()}


def ticker(progress: ProgressWriter, in_total: int) -> Callable[[int], None]:
    done = 0

    def tick(rows: int) -> None:
        nonlocal done
        done += rows
        progress.step(done, in_total)

    return tick


def load(variant: Variant) -> Any:
    """The model as it is stored on a GPU, in float32 on a CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        variant.folder,
        dtype="auto" if device == "cuda" else torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    if variant.adapter:
        put_rows(model, read_start_rows(variant.adapter))  # what the adapter was trained on
        model = PeftModel.from_pretrained(model, str(variant.adapter))
    return model.to(device).eval()


def measure(model: Any, one: EvaluationSet, answers: Answers, tick: Callable[[int], None]) -> Measured:
    scores: dict[int, Score] = {}
    for index, score in score_rows(model, one.rows, answers.chat.pad_id):
        scores[index] = score
        tick(1)
    texts: dict[int, str] = {}
    for batch in generation_batches(one.questions):
        texts |= dict(zip([question.index for question in batch], generate(model, batch, answers), strict=True))
        tick(len(batch))
    references = {question.index: question.reference for question in one.questions if one.exact_match_measured}
    rows = [row_result(scores[index], texts.get(index), references.get(index)) for index in range(len(one.rows))]
    return Measured(VariantResult(total(scores.values()).mean_loss, rows), texts)


def row_result(score: Score, answer: str | None, reference: str | None) -> RowResult:
    if answer is None or reference is None:
        return RowResult(score.mean_loss)
    return RowResult(score.mean_loss, exact_match(answer, reference), content_match(answer, reference))


def exact_match(answer: str, reference: str) -> bool:
    return answer.strip() == reference.strip()


def content_match(answer: str, reference: str) -> bool:
    """Equal in letters and digits, whatever the form around them. A reference that is all form must be met exactly."""
    wanted = _letters_and_digits(reference)
    return _letters_and_digits(answer) == wanted if wanted else exact_match(answer, reference)


def _letters_and_digits(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def generation_batches(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """Questions of like length together, the longest first."""
    waiting = sorted(questions, key=lambda question: len(question.prompt_ids), reverse=True)
    while waiting:
        rows = max(1, min(GENERATION_ROWS, ANSWERED_TOKENS // len(waiting[0].prompt_ids)))
        yield waiting[:rows]
        waiting = waiting[rows:]


def generate(model: Any, questions: Sequence[Question], answers: Answers) -> list[str]:
    longest = max(len(question.prompt_ids) for question in questions)
    gaps = [longest - len(question.prompt_ids) for question in questions]
    pad = answers.chat.pad_id
    # (B, L), padded on the left: every row's answer starts in the same column.
    ids = torch.tensor([[*[pad] * gap, *one.prompt_ids] for gap, one in zip(gaps, questions, strict=True)])
    mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
    # In place of the model's own settings, which may ask for sampling, penalties or other end marks.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=answers.max_new_tokens, eos_token_id=answers.end_ids, pad_token_id=pad
    )
    generated = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))  # (B, L + new)
    texts = answers.chat.tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
    # A byte-level model may say U+0000, which no database keeps.
    return [text.replace("\0", "\N{REPLACEMENT CHARACTER}") for text in texts]


def make_report(spec: JobSpec, sets: dict[str, EvaluationSet], measured: dict[str, dict[str, Measured]]) -> Report:
    shadow = spec.strategy == "shadow"
    return Report(
        strategy=spec.strategy,
        pair=spec.pair.name,
        scale=spec.scales[0],
        seed=spec.seed,
        published=graft_name(spec.scales[0]) if shadow else DIRECT,
        variants=list(measured),
        sets={
            name: SetResult(
                exact_match_measured=one.exact_match_measured,
                rows_left_out=one.rows_left_out,
                results={variant: by_set[name].result for variant, by_set in measured.items()},
            )
            for name, one in sets.items()
        },
        samples=[sample for name, one in sets.items() for sample in make_samples(name, one, measured)],
    )


def make_samples(name: str, one: EvaluationSet, measured: dict[str, dict[str, Measured]]) -> list[Sample]:
    return [
        Sample(
            set=name,
            row=one.rows[question.index].row.number,
            prompt=readable(question.messages),
            reference=question.reference,
            answers={variant: by_set[name].answers[question.index] for variant, by_set in measured.items()},
        )
        for question in one.questions[:SAMPLES]
    ]


def readable(messages: Sequence[Message]) -> str:
    """The question alone where it is all, and who said what where there is more."""
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in messages)


if __name__ == "__main__":
    child.run("evaluate", main)
