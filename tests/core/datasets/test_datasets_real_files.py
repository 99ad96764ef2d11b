"""Public data sets as they are found, kept beside the repository where there is room for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.datasets import check_file, read_rows

DATA = Path(__file__).parents[4] / "shared" / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the data sets in ../shared/data")


def test_alpaca():
    report = check_file(DATA / "alpaca_en_demo.json")
    assert (report.ok, report.rows, report.format) == (True, 1000, "alpaca")
    assert sum(row.characters for row in read_rows(DATA / "alpaca_en_demo.json")) == report.characters


def test_identity_has_placeholders():
    report = check_file(DATA / "identity.json")
    assert (report.ok, report.rows) == (True, 91)
    assert report.warnings == {"placeholder": 85}
    assert "placeholder (85)" in report.summary


def test_preferences_are_refused():
    report = check_file(DATA / "dpo_en_demo.json")
    assert (report.ok, report.rows, report.bad_rows) == (False, 300, 300)
    assert report.errors == {"preference_row": 300}
    assert "this server trains supervised rows" in report.summary
