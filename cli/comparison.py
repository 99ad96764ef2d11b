"""A job's evaluation as one small table: untouched, tuned and grafted, on every set of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cli.printing import plain, table

if TYPE_CHECKING:
    from rich.table import Table

GRAFTED = "grafted@"
_TITLES = {"instruct": "untouched instruct", "base_tuned": "tuned base", "direct": "directly tuned instruct"}
_PLACES = {"instruct": 0, "base_tuned": 1, "direct": 3}


def title(variant: str) -> str:
    if variant.startswith(GRAFTED):
        return f"grafted instruct x {variant.removeprefix(GRAFTED)}"
    return _TITLES[variant]


def place(variant: str) -> tuple[int, float]:
    """Untouched, tuned base, the grafts by scale, direct."""
    if variant.startswith(GRAFTED):
        return 2, float(variant.removeprefix(GRAFTED))
    return _PLACES[variant], 0.0


def comparison(evaluation: dict[str, Any]) -> Table:
    sets: dict[str, dict[str, Any]] = evaluation["sets"]
    drawn = table("model")
    for name, measured in sets.items():
        drawn.add_column(f"{plain(name)} loss", justify="right")
        if measured["exact_match_measured"]:
            drawn.add_column("exact", justify="right")
    for variant in sorted(evaluation["variants"], key=place):
        cells = [title(variant) + (" (published)" if variant == evaluation["published"] else "")]
        for measured in sets.values():
            cells += _cells(measured, variant)
        drawn.add_row(*map(plain, cells))
    return drawn


def _cells(measured: dict[str, Any], variant: str) -> list[str]:
    result = measured["results"][variant]
    shares = [f"{result['exact_match']:.2f}"] if measured["exact_match_measured"] else []
    return [f"{result['loss']:.3f}", *shares]
