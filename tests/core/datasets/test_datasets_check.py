"""The report: counts, places, doubts and the one sentence."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from core.datasets import Problem, Report, check, check_file

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def chat(*turns: Any):
    return {"messages": list(turns)}


def test_a_good_file(write_rows, good):
    report = check_file(write_rows(good, chat(USER, ANSWER | {"weight": 0}, USER, ANSWER)))
    assert report.ok
    assert report.summary == "2 rows in chat format, 21 characters."
    assert (report.format, report.formats) == ("chat", {"chat": 2})
    assert (report.rows, report.bad_rows) == (2, 0)
    assert (report.characters, report.trained_characters) == (21, 10)
    assert report.longest_row == check.LongestRow(number=2, characters=14)


def test_its_json_form_reads_back(write_rows, good):
    report = check_file(write_rows(good, good, {}))
    assert msgspec.convert(json.loads(json.dumps(report.as_dict())), Report) == report


def test_b31_one_bad_line_at_the_end_refuses_the_file(write):
    row = b'{"prompt": "Hi", "completion": "Hello"}\n'
    report = check_file(write(row * 50_000 + b"{\n"))
    assert report.summary == (
        "1 of 50,001 rows cannot be trained on; the first is line 50001: not valid JSON, it ends in the middle of a "
        "value. Write one whole JSON object on each line, without commas between lines."
    )


def test_the_first_twenty_errors_are_shown_and_all_are_counted(write):
    report = check_file(write(b"{}\n\n" * 30 + b"[]\n" * 5))
    assert report.errors == {"unknown_format": 30, "not_an_object": 5}
    assert [problem.number for problem in report.first_errors] == list(range(1, 41, 2))


def test_rows_of_an_array_are_numbered_from_one(write):
    problem = check_file(write(b'[{"prompt": "a", "completion": "b"}, 3]')).first_errors[0]
    assert (problem.unit, problem.number) == ("row", 2)


def test_a_problem_of_the_whole_file_has_no_number(write):
    assert check_file(write(b"")).first_errors == [
        Problem(
            code="no_rows",
            message="it has no rows",
            remedy="Write at least one training example",
            path="",
            unit="file",
            number=None,
        )
    ]


DOUBTS = {
    "B39 assistant first": ([chat(ANSWER, USER, ANSWER)], "assistant_first", "line 1: the assistant speaks first"),
    "B39 two users in a row": ([chat(USER, USER, ANSWER)], "same_role_twice", "line 1: two user turns in a row"),
    "two answers in a row": ([chat(USER, ANSWER, ANSWER)], "same_role_twice", "two assistant turns in a row"),
    "no answer at the end": ([chat(USER, ANSWER, USER)], "ends_without_answer", "the last turn is the user's"),
    "an empty question": ([chat(USER | {"content": ""}, ANSWER)], "empty_turn", "line 1: a turn is empty"),
    "a placeholder": ([chat(USER, ANSWER | {"content": "I am {{ name }}"})], "placeholder", "{{ name }} looks like a"),
    "a field that is not used": ([chat(USER | {"name": "Ann"}, ANSWER)], "ignored_field", "not trained on: 'name'"),
    "B43 doubles": ([chat(USER, ANSWER), {"prompt": "Hi", "completion": "Hello"}], "duplicate", "the same as line 1"),
    "two formats": ([chat(USER, ANSWER), {"prompt": "a", "completion": "b"}], "mixed_formats", "rows of several"),
}


@pytest.mark.parametrize(("rows", "code", "words"), DOUBTS.values(), ids=DOUBTS.keys())
def test_warns(rows, code, words, write_rows):
    report = check_file(write_rows(*rows))
    assert report.ok
    assert report.warnings[code] == 1
    assert f"{code} (1)" in report.summary
    assert any(words in problem.sentence for problem in report.first_warnings if problem.code == code)


def test_b43_all_rows_equal(write_rows, good):
    report = check_file(write_rows(*[good] * 10))
    assert report.ok
    assert report.warnings == {"duplicate": 9}
    assert len(report.first_warnings) == check.MAX_WARNINGS_SHOWN


def test_doubles_are_remembered_up_to_a_limit(write_rows, monkeypatch):
    monkeypatch.setattr(check, "MAX_ROWS_REMEMBERED", 1)
    first, second = chat(USER, ANSWER), chat(USER, ANSWER | {"content": "Hey"})
    assert check_file(write_rows(first, second, second, first)).warnings == {"duplicate": 1}


@pytest.mark.parametrize("form", ["jsonl", "array"])
def test_progress_rises_to_the_end(form, write):
    row = b'{"prompt": "%s", "completion": "Hello"}' % (b"x" * 2**20)
    path = write(b"\n".join([row] * 10) if form == "jsonl" else b"[" + b",".join([row] * 10) + b"]")
    told: list[tuple[int, int]] = []
    check_file(path, on_progress=lambda read, total: told.append((read, total)))
    size = path.stat().st_size
    assert told == sorted(told)
    assert told[-1] == (size, size)
    assert len(told) == 3


def test_a_nul_character_is_refused_where_it_stands(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a\\u0000b"}, {"role": "assistant", "content": "c"}]}\n')

    report = check_file(path)

    assert not report.ok
    assert "U+0000" in report.summary
