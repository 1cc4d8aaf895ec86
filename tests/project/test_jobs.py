"""The jobs that ship with the project: valid for editors and the program, true to the demo data."""

from __future__ import annotations

from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import polars as pl
import pytest

from batchinfer.config import Job, job_schema, load_job
from batchinfer.config.yaml12 import load_yaml

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))

# The demo model was trained on exactly these words.
INSTRUCTIONS = {
    "summarize": "Summarize this software package in one line.\n\n{{ description }}",
    "classify": "Which section of the archive does this software package belong to?\n\n"
    "{{ description }}",
    "extract": 'Describe this software package as JSON with the keys "summary" and "section".\n\n'
    "{{ description }}",
}


def load(path: Path) -> Job:
    return load_job(path, environ={}).job


@pytest.fixture(scope="module")
def prompts() -> pl.DataFrame:
    return pl.read_parquet(ROOT / "jobs/demo/prompts/*.parquet")


def test_the_demo_jobs_are_there() -> None:
    assert {path.stem for path in JOBS} >= INSTRUCTIONS.keys()


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_is_valid_for_the_program_and_for_editors(path: Path) -> None:
    text = path.read_text()
    schema_line, *_ = text.splitlines()
    assert schema_line == "# yaml-language-server: $schema=../schemas/job.schema.json"
    jsonschema.Draft7Validator(job_schema()).validate(load_yaml(text, path.name).data)
    assert load(path).name == path.stem


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_names_a_model_and_columns_that_exist(path: Path, prompts: pl.DataFrame) -> None:
    job = load(path)
    assert (ROOT / job.model.path / "config.json").is_file()
    assert all(list(ROOT.glob(pattern)) for pattern in job.input.path)
    assert {job.input.id_column, *job.input.keep_columns} <= set(prompts.columns)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_a_demo_job_asks_in_the_words_the_model_was_trained_on(name: str) -> None:
    job = load(ROOT / f"jobs/{name}.yaml")
    assert job.prompt.messages is not None
    (message,) = job.prompt.messages
    assert (message.role, message.content) == ("user", INSTRUCTIONS[name])
    assert job.output.path == f"out/{name}"
    assert not Path(job.output.path).is_relative_to("jobs")


def test_classify_chooses_among_the_sections_of_the_demo(prompts: pl.DataFrame) -> None:
    structured = load(ROOT / "jobs/classify.yaml").sampling.structured
    assert structured is not None and structured.choice is not None
    assert set(structured.choice) == set(prompts["reference_section"])


def test_extract_has_room_for_every_reference_answer(prompts: pl.DataFrame) -> None:
    structured = load(ROOT / "jobs/extract.yaml").sampling.structured
    assert structured is not None and structured.json_schema is not None
    properties = structured.json_schema["properties"]
    for key in ("summary", "section"):
        lengths = prompts[f"reference_{key}"].str.len_chars()
        assert (lengths <= properties[key]["maxLength"]).all()
