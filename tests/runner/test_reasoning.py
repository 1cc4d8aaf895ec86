"""Thoughts in a column of their own: what of an answer is where, and what is said of cut ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batchinfer.config import SamplingSettings
from batchinfer.tasks.generate import Generate
from tests.support.jobs import Place, job, results, rows, run, write_job

SPLIT = {"reasoning_parser": "deepseek_r1"}
SCHEMA = {"structured": {"json_schema": {"type": "object"}}}
THINKING = {"thought": "let me see", "text": '{"a": 1}'}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    found = Place(str(tmp_path))
    found.write_parquet("in/a.parquet", rows(6))
    return found


def start(place: Place, *arguments: str, **sampling: Any) -> Any:
    settings = job(place, sampling=SPLIT | SCHEMA | sampling)
    return run(write_job(Path(place.root), settings), *arguments, fake=THINKING)


def test_a_thought_has_a_column_and_what_is_parsed_is_the_answer(place: Place) -> None:
    ended = start(place, max_tokens=1900, logprobs=None)
    assert (ended.code, ended.result["warnings"]) == (0, []), ended.stderr
    assert (ended.result["rows_reasoning_cut"], ended.result["rows_unparsed"]) == (0, 0)
    found = results(place)
    assert found["reasoning"].to_list() == ["let me see"] * 6
    assert found["completion"].to_list() == found["parsed"].to_list() == ['{"a": 1}'] * 6
    assert not found["is_reasoning_cut"].any()


def test_a_completion_that_ends_within_its_thought_is_null_with_a_remark(place: Place) -> None:
    ended = start(place, max_tokens=1)
    assert ended.code == 0, ended.stderr
    found = results(place)
    assert found["completion"].null_count() == found["parsed"].null_count() == 6
    assert found["is_reasoning_cut"].all() and found["error_type"].null_count() == 6
    assert found["reasoning"].to_list() == ["let me see"] * 6
    (told,) = ended.result["warnings"]
    assert told.startswith("6 of 6 completions ended within their thought (is_reasoning_cut)")
    assert "where finish_reason is length" in told
    assert ended.result["rows_reasoning_cut"] == 6
    success = json.loads(Path(place.url("out", "_SUCCESS")).read_text())
    assert success["rows_reasoning_cut"] == 6
    shown = run(place.url("out"), "-n", "1", command=("show",))
    assert "ended within its thought" in shown.stdout


def test_answers_that_do_not_fit_are_not_counted_among_cut_thoughts() -> None:
    task = Generate(SamplingSettings.model_validate(SPLIT | SCHEMA))
    counts = {"rows_reasoning_cut": 2, "rows_cut": 4, "rows_unparsed": 3}
    thoughts, answers = task.remarks(10, counts)
    assert thoughts.startswith("2 of 10 completions ended within their thought")
    assert answers.startswith("1 of 10 answers are no JSON documents that fit")
    assert len(list(task.remarks(10, counts | {"rows_unparsed": 2}))) == 1


def test_cut_thoughts_of_several_runs_are_counted_together(place: Place) -> None:
    start(place, "--limit", "2", max_tokens=1)
    rest = start(place, max_tokens=1)
    assert (rest.result["rows_computed"], rest.result["rows_reasoning_cut"]) == (4, 6)


def test_rows_with_errors_have_no_thought(place: Place) -> None:
    settings = job(place, sampling=SPLIT, limits={"max_failed_fraction": 1.0})
    run(write_job(Path(place.root), settings), fake=THINKING | {"reject_every": 2})
    failed = results(place).filter(results(place)["error_type"].is_not_null())
    assert len(failed) == 3
    assert failed["is_reasoning_cut"].null_count() == failed["reasoning"].null_count() == 3


def test_a_job_without_a_parser_has_neither_columns_nor_counts(place: Place) -> None:
    ended = run(write_job(Path(place.root), job(place)), fake=THINKING)
    assert "rows_reasoning_cut" not in ended.result
    assert "rows_reasoning_cut" not in Path(place.url("out", "_SUCCESS")).read_text()
    assert not {"reasoning", "is_reasoning_cut"} & set(results(place).columns)
    assert results(place)["completion"].to_list() == [THINKING["text"]] * 6


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"thinking_budget_tokens": 4}, "needs sampling.reasoning_parser"),
        (SPLIT | {"thinking_budget_tokens": 16}, "16 leaves no room for an answer"),
    ],
)
def test_a_budget_that_bounds_nothing_is_refused(
    place: Place, sampling: dict[str, Any], words: str
) -> None:
    refused = run(write_job(Path(place.root), job(place, sampling=sampling)), command=("validate",))
    assert refused.code == 2
    assert "sampling.thinking_budget_tokens" in refused.stderr and words in refused.stderr
