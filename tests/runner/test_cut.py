"""Completions and prompts that were cut: counted, and said once where they can hardly be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import Ended, Place, job, results, rows, run, write_job

SCHEMA = {"json_schema": {"type": "object"}}
NOT_WHOLE = (
    "{0} of {0} completions are not complete JSON documents (finish_reason length): raise "
    "sampling.max_tokens"
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    found = Place(str(tmp_path))
    found.write_parquet("in/a.parquet", rows(5))
    return found


def start(
    place: Place, *arguments: str, fake: dict[str, Any] | None = None, **sections: Any
) -> Ended:
    return run(write_job(Path(place.root), job(place, **sections)), *arguments, fake=fake)


def with_form(max_tokens: int = 1, **form: Any) -> dict[str, Any]:
    """Of one token, every completion of the fake engine is cut."""
    return {"sampling": {"max_tokens": max_tokens, "structured": form}}


def test_json_that_is_cut_is_counted_and_reported_once(place: Place) -> None:
    ended = start(place, **with_form(**SCHEMA))
    assert ended.code == 0, ended.stderr
    assert ended.result["warnings"] == [NOT_WHOLE.format(5)]
    assert NOT_WHOLE.format(5) in ended.stderr
    assert (ended.result["rows_cut"], ended.result["rows_unparsed"]) == (5, 5)
    success = json.loads(Path(place.url("out", "_SUCCESS")).read_text())
    assert (success["rows_cut"], success["rows_unparsed"], success["rows_failed"]) == (5, 5, 0)


def test_whole_documents_cause_no_warning(place: Place) -> None:
    ended = start(place, fake={"text": '{"a": 1}'}, **with_form(**SCHEMA))
    assert (ended.code, ended.result["warnings"]) == (0, [])
    assert (ended.result["rows_cut"], ended.result["rows_unparsed"]) == (5, 0)


def test_documents_that_do_not_fit_the_schema_are_not_parsed_and_said(place: Place) -> None:
    """An engine's grammar leaves out what it cannot express, and says nothing."""
    schema = {"type": "object", "required": ["b"], "not": {"required": ["c"]}}
    ended = start(place, fake={"text": '{"a": 1}'}, **with_form(8, json_schema=schema))
    assert ended.code == 0 and ended.result["rows_unparsed"] == 5
    (said,) = ended.result["warnings"]
    assert said.startswith("5 of 5 completions") and "leaves a keyword of the schema out" in said
    found = results(place)
    assert found["parsed"].null_count() == 5 and found["completion"].null_count() == 0


def test_a_part_counts_itself_and_a_complete_output_counts_all_of_it(place: Place) -> None:
    first = start(place, "--limit", "2", **with_form(**SCHEMA))
    assert first.result["warnings"] == [NOT_WHOLE.format(2)]
    rest = start(place, **with_form(**SCHEMA))
    assert rest.result["rows_computed"] == 3
    assert (rest.result["rows_cut"], rest.result["rows_unparsed"]) == (5, 5)
    assert rest.result["warnings"] == [NOT_WHOLE.format(5)]
    again = start(place, **with_form(**SCHEMA))
    assert again.result["rows_computed"] == 0
    assert again.result["warnings"] == [NOT_WHOLE.format(5)]


def test_documents_that_ended_early_are_counted_apart(place: Place) -> None:
    ended = start(place, **with_form(max_tokens=16, **SCHEMA))
    num_cut = ended.result["rows_cut"]
    assert num_cut < 5
    told = ended.result["warnings"][-1]
    assert told.startswith(f"{5 - num_cut} of 5 completions ended by themselves")
    assert "sampling.stop" in told


def test_rows_with_errors_are_not_completions(place: Place) -> None:
    ended = start(
        place,
        fake={"reject_every": 5},
        limits={"max_failed_fraction": 1.0},
        **with_form(**SCHEMA),
    )
    assert ended.result["rows_failed"] == 1
    assert ended.result["warnings"] == [NOT_WHOLE.format(4)]


@pytest.mark.parametrize("form", [{"regex": "a+"}, {"choice": ["a", "b"]}])
def test_other_forms_that_are_cut_are_reported_too(place: Place, form: dict[str, Any]) -> None:
    ended = start(place, **with_form(**form))
    (told,) = ended.result["warnings"]
    assert told.startswith("5 of 5 completions ended at sampling.max_tokens")
    assert f"sampling.structured.{next(iter(form))}" in told
    assert ended.result["rows_unparsed"] == 0


def test_free_text_that_is_cut_is_counted_without_a_warning(place: Place) -> None:
    ended = start(place, sampling={"max_tokens": 1})
    assert (ended.result["rows_cut"], ended.result["warnings"]) == (5, [])


def test_completions_that_are_mostly_empty_are_said(place: Place) -> None:
    ended = start(place, fake={"text": ""})
    (told,) = ended.result["warnings"]
    assert told.startswith("5 of 5 completions of this run are empty")


def test_prompts_that_were_cut_to_fit_are_counted_once(place: Place) -> None:
    model = {"path": job(place)["model"]["path"], "max_model_len": 24}
    ended = start(
        place, model=model, prompt={"template": "{{ text }}", "on_too_long": "truncate_left"}
    )
    assert ended.code == 0, ended.stderr
    (told,) = ended.result["warnings"]
    assert "prompts of this run were cut to fit" in told
    num_cut = int(told.split()[0])
    assert 0 < num_cut <= 5
    refused = start(place, output="errors", model=model, limits={"max_failed_fraction": 1.0})
    assert refused.result["rows_failed"] == num_cut
