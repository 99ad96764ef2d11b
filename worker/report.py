"""What the evaluation found: its numbers, an honest verdict, and the same as a table to read.

Every claim is a difference between two models on the same rows, with a bootstrap interval over the rows. A claim needs
the whole interval on one side of zero; otherwise the report says that nothing can be told.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Outcome = Literal["better", "worse", "kept", "too_few_rows"]
Measure = Literal["exact_match", "loss"]

#: The held-out rows' set; every other set is a probe.
VALIDATION = "validation"
INSTRUCT, BASE_TUNED, DIRECT = "instruct", "base_tuned", "direct"
RESAMPLES = 1000
#: On fewer rows an interval says more about the rows than about the models.
ROWS_FOR_A_CLAIM = 10
#: In place of infinity and NaN, which no mean survives. Far above the loss of blind guessing.
LOSS_OF_A_BROKEN_MODEL = 1e4


@dataclass(frozen=True)
class RowResult:
    """One model on one row. What was not measured is None."""

    #: Mean over the row's labelled tokens, natural logarithm.
    mean_loss: float
    exact: bool | None = None
    #: As `exact`, but by letters and digits alone: right in content though not in form.
    content: bool | None = None


@dataclass(frozen=True)
class VariantResult:
    """One model on one set."""

    #: Over all labelled tokens, natural logarithm.
    loss: float
    rows: list[RowResult]

    def as_dict(self) -> dict[str, Any]:
        return {
            "loss": _finite(self.loss),
            "perplexity": _finite(_perplexity(self.loss)),
            "exact_match": _share([row.exact for row in self.rows]),
            "content_match": _share([row.content for row in self.rows]),
        }


@dataclass(frozen=True)
class SetResult:
    exact_match_measured: bool
    #: Rows of the file beyond the limit, which were not measured.
    rows_left_out: int
    results: dict[str, VariantResult]

    @property
    def rows(self) -> int:
        return len(next(iter(self.results.values())).rows)

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "rows_left_out": self.rows_left_out,
            "exact_match_measured": self.exact_match_measured,
            "results": {variant: result.as_dict() for variant, result in self.results.items()},
        }


@dataclass(frozen=True)
class Sample:
    set: str
    row: int
    prompt: str
    reference: str
    #: One for each variant.
    answers: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """The published model against untouched instruct on one set."""

    set: str
    variant: str
    against: str
    measure: Measure
    #: Positive is better for exact match, negative is better for loss.
    difference: float
    low: float
    high: float
    outcome: Outcome


@dataclass(frozen=True)
class Report:
    strategy: str
    pair: str
    scale: float
    seed: int
    #: The variant that the job publishes.
    published: str
    variants: list[str]
    sets: dict[str, SetResult]
    samples: list[Sample] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "version": 1,
            "strategy": self.strategy,
            "pair": self.pair,
            "scale": self.scale,
            "published": self.published,
            "variants": self.variants,
            "sets": {name: result.as_dict() for name, result in self.sets.items()},
            "samples": [asdict(sample) for sample in self.samples],
            "verdict": self.verdict(),
        }

    def verdict(self) -> dict[str, Any]:
        comparisons = [compare(name, result, self.published, self.seed) for name, result in self.sets.items()]
        told = [self._tell(comparison) for comparison in comparisons]
        return {
            "summary": " ".join(told) or "No rows were held out and no probe was given, so nothing was measured.",
            "helped": any(one.set == VALIDATION and one.outcome == "better" for one in comparisons),
            "harmed": [one.set for one in comparisons if one.outcome == "worse"],
            "comparisons": [asdict(one) for one in comparisons],
        }

    def _tell(self, one: Comparison) -> str:
        name = "grafted model" if self.strategy == "shadow" else "directly tuned model"
        where = "the held-out rows" if one.set == VALIDATION else f"probe {one.set}"
        sentence = _SENTENCES[one.set == VALIDATION, one.outcome].format(name=name, where=where)
        return f"{sentence} ({self._numbers(one)}).{self._lost_on_the_way(one)}"

    def _numbers(self, one: Comparison) -> str:
        results = self.sets[one.set].results
        after, before = results[one.variant].as_dict()[one.measure], results[one.against].as_dict()[one.measure]
        rows = f"{self.sets[one.set].rows} rows"
        # The interval is of a mean over rows; the losses before it weigh long rows more.
        if one.measure == "loss":
            interval = f"{one.difference:+.3f} a row, 95% interval {one.low:+.3f} to {one.high:+.3f}"
            return f"loss {_plain(after)} against {_plain(before)} untouched; {interval}; {rows}"
        interval = f"{100 * one.difference:+.1f} points, 95% interval {100 * one.low:+.1f} to {100 * one.high:+.1f}"
        return f"exact answers {_percent(after)} against {_percent(before)} untouched; {interval}; {rows}"

    def _lost_on_the_way(self, one: Comparison) -> str:
        """Where the graft did not help although base had learned it, the user should know which of the two failed."""
        if one.set != VALIDATION or one.outcome == "better" or BASE_TUNED not in self.variants:
            return ""
        base = compare(one.set, self.sets[one.set], BASE_TUNED, self.seed)
        if base.outcome != "better":
            return ""
        return " The tuned base model itself did learn them, so the change did not carry over to instruct."

    def as_markdown(self) -> str:
        parts = [f"# Evaluation: {self.pair}", self.verdict()["summary"]]
        parts += [self._table(name, result) for name, result in self.sets.items()]
        if self.samples:
            parts.append("## Sampled answers")
            parts += [_sample_markdown(sample) for sample in self.samples]
        return "\n\n".join(parts) + "\n"

    def _table(self, name: str, result: SetResult) -> str:
        left_out = f"; {result.rows_left_out} more were not measured" if result.rows_left_out else ""
        lines = [
            f"## {_cell(name)} ({result.rows} rows{left_out})",
            "",
            "| model | loss | perplexity | exact match | content match |",
            "|---|---|---|---|---|",
        ]
        for variant, measured in result.results.items():
            cells = measured.as_dict()
            numbers = [_plain(cells["loss"]), _plain(cells["perplexity"])]
            shares = [_percent(cells["exact_match"]), _percent(cells["content_match"])]
            mark = f"**{variant}**" if variant == self.published else variant
            lines.append("| " + " | ".join([mark, *numbers, *shares]) + " |")
        return "\n".join(lines)


#: By whether it is the held-out set, and by outcome.
_SENTENCES: dict[tuple[bool, Outcome], str] = {
    (True, "better"): "The {name} does better on {where} than untouched instruct",
    (True, "worse"): "The tuning did not help: the {name} does worse on {where} than untouched instruct",
    (True, "kept"): "The tuning did not measurably help: on {where} the {name} cannot be told from untouched instruct",
    (True, "too_few_rows"): "Whether the {name} learned the task cannot be told from so few held-out rows",
    (False, "better"): "On {where} it got better",
    (False, "worse"): "On {where} it got worse",
    (False, "kept"): "On {where} it kept its level",
    (False, "too_few_rows"): "On {where} there are too few rows to tell",
}


def compare(name: str, result: SetResult, variant: str, seed: int) -> Comparison:
    """`variant` against untouched instruct: by exact match, or by loss where neither gives a single right answer."""
    pairs = list(zip(result.results[variant].rows, result.results[INSTRUCT].rows, strict=True))
    measure: Measure = "exact_match" if any(after.exact or before.exact for after, before in pairs) else "loss"
    differences = [_value(after, measure) - _value(before, measure) for after, before in pairs]
    low, high = bootstrap_interval(differences, seed)
    return Comparison(
        set=name,
        variant=variant,
        against=INSTRUCT,
        measure=measure,
        difference=sum(differences) / len(differences),
        low=low,
        high=high,
        outcome=_outcome(low, high, measure, len(differences)),
    )


def bootstrap_interval(differences: Sequence[float], seed: int) -> tuple[float, float]:
    """The middle 95% of the mean over resampled rows. Rows are drawn as pairs, so what makes a row hard cancels."""
    rng, rows = random.Random(f"bootstrap {seed}"), len(differences)  # noqa: S311 - statistics, no secret
    means = sorted(math.fsum(rng.choices(differences, k=rows)) / rows for _ in range(RESAMPLES))
    return means[round(0.025 * (RESAMPLES - 1))], means[round(0.975 * (RESAMPLES - 1))]


def _value(row: RowResult, measure: Measure) -> float:
    if measure == "exact_match":
        return float(bool(row.exact))
    return row.mean_loss if math.isfinite(row.mean_loss) else LOSS_OF_A_BROKEN_MODEL


def _outcome(low: float, high: float, measure: Measure, rows: int) -> Outcome:
    if rows < ROWS_FOR_A_CLAIM:
        return "too_few_rows"
    if low <= 0 <= high:
        return "kept"
    return "better" if (low > 0) == (measure == "exact_match") else "worse"


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None


def _share(answers: Sequence[bool | None]) -> float | None:
    measured = [answer for answer in answers if answer is not None]
    return sum(measured) / len(measured) if measured else None


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _cell(text: str) -> str:
    """Text from a dataset, which must not draw lines or cells of its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _sample_markdown(sample: Sample) -> str:
    answers = [f"| {variant} | {_cell(answer)} |" for variant, answer in sample.answers.items()]
    head = [f"**{_cell(sample.set)}, row {sample.row}**: {_cell(sample.prompt)}", "", "| | |", "|---|---|"]
    return "\n".join([*head, f"| reference | {_cell(sample.reference)} |", *answers])
