"""Rows with settings of their own: each is computed as a job with those settings computes it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from batchinfer.config import OwnSampling, SamplingSettings
from batchinfer.plan import Chunk, plan_buffer
from tests.support.adapters import write_adapter
from tests.support.endings import must_be_untouched, must_fail
from tests.support.in_process import run_here
from tests.support.jobs import Place, job, results, rows, run, stable, write_job

SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'


def with_columns(place: Place, frame: pl.DataFrame, **columns: pl.Series | list[Any]) -> None:
    added = {name: pl.Series(values) for name, values in columns.items()}
    place.write_parquet("in/s0.parquet", frame.with_columns(**added))


def errors(frame: pl.DataFrame) -> dict[int, str]:
    failed = frame.filter(pl.col("error_type").is_not_null())
    assert set(failed["error_type"]) <= {"invalid_setting"}
    return dict(zip(failed["row"], failed["error_message"], strict=True))


def test_a_row_is_computed_as_by_a_job_with_its_values_and_null_is_the_jobs(
    folder: Place, tmp_path: Path
) -> None:
    """In floats too, as integers with nulls often are."""
    kinds: list[dict[str, Any]] = [
        {"max_tokens": 3, "logprobs": 2},
        {"max_tokens": 11, "temperature": 0.0},
        {},
    ]
    own = {
        name: [kind.get(name) for kind in kinds] * 6
        for name in ("max_tokens", "temperature", "logprobs")
    }
    own["max_tokens"] = pl.Series(own["max_tokens"], dtype=pl.Float64)  # type: ignore[assignment]
    with_columns(folder, rows(18), **own)
    sampling = {"max_tokens": 5, "temperature": 1.0, "seed": 3}
    per_row = {name: name for name in own}
    settings = job(folder, sampling={**sampling, "per_row": per_row})
    assert run_here(write_job(tmp_path, settings)).code == 0
    found = stable(results(folder))
    for number, kind in enumerate(kinds):
        plain = job(folder, f"plain-{number}", sampling=sampling | {"logprobs": 1} | kind)
        assert run_here(write_job(tmp_path, plain)).code == 0
        expected = stable(results(folder, f"plain-{number}"))
        is_own = pl.col("row") % 3 == number
        assert found.filter(is_own).equals(expected.filter(is_own))
    assert found["num_completion_tokens"].max() <= 11


def test_decimals_and_lists_of_floats_are_the_numbers_that_they_are(
    folder: Place, tmp_path: Path
) -> None:
    """As databases and nulls leave them."""
    decimal = pl.Decimal(9, 2)
    own = {
        "max_tokens": pl.Series(["3", "4.5", None], dtype=pl.String).cast(decimal),
        "temperature": pl.Series(["0.00", "0.5", "3"]).cast(decimal),
        "stop_token_ids": pl.Series([[7.0], [7.5], None], dtype=pl.List(pl.Float64)),
    }
    with_columns(folder, rows(6), **{name: pl.concat([s, s]) for name, s in own.items()})
    path = write_job(tmp_path, job(folder, sampling={"per_row": {name: name for name in own}}))
    assert run_here(path).code in (0, 3)
    found = results(folder)
    assert found["error_message"][0] is None, found["error_message"][0]
    assert found["num_completion_tokens"][0] <= 3
    assert {row: told.split(": ", 1)[1] for row, told in errors(found).items()} == {
        1: "must be a whole number, got 4.5",
        2: "must be at most 2, got 3.0",
        4: "must be a whole number, got 4.5",
        5: "must be at most 2, got 3.0",
    }


def test_a_seed_of_its_own_gives_a_row_the_same_result_wherever_it_is(
    folder: Place, tmp_path: Path
) -> None:
    frame = rows(4).with_columns(text=pl.lit("the same"), seed=pl.Series([5, 5, 6, None]))
    folder.write_parquet("in/s0.parquet", frame)
    folder.write_parquet("in/s1.parquet", frame.reverse())
    sampling = {"temperature": 1.0, "max_tokens": 40, "n": 2, "per_row": {"seed": "seed"}}
    path = write_job(tmp_path, job(folder, sampling=sampling | {"seed": 1}))
    assert run_here(path).code == 0
    found = results(folder)
    by_seed = found.filter(pl.col("id") != "row-3").group_by(
        pl.col("id").replace({"row-1": "row-0"}), "sample"
    )
    assert by_seed.agg(pl.col("token_ids").n_unique())["token_ids"].to_list() == [1] * 4
    of_five = found.filter(pl.col("id") == "row-0", pl.col("sample") == 1)["token_ids"][0]
    of_six = found.filter(pl.col("id") == "row-2", pl.col("sample") == 0)["token_ids"][0]
    assert of_five.equals(of_six)  # a sample's number is added to the seed
    without = found.filter(pl.col("id") == "row-3")["token_ids"]
    assert without.n_unique() == 4


def test_a_value_that_a_setting_cannot_have_is_an_error_of_its_row(
    folder: Place, tmp_path: Path
) -> None:
    deep = '{"not": ' * 400 + "{}" + "}" * 400
    own = {
        "limit": [0, 5000, 4, None, 4, 4, 4, 4],
        "heat": [None, None, float("nan"), 0.001, None, 0.7, None, None],
        "form": [None, None, None, None, '{"type": "strng"}', "{", SCHEMA, deep],
        "words": [None, None, None, None, None, None, ["a", "b"], None],
        "ends": [*[None] * 8, [5, 999_999]],
    }
    columns = {name: values + [None] * (10 - len(values)) for name, values in own.items()}
    with_columns(folder, rows(10), **columns)
    columns = {"max_tokens": "limit", "temperature": "heat", "json_schema": "form"}
    settings = job(
        folder,
        sampling={"per_row": columns | {"choice": "words", "stop_token_ids": "ends"}},
        model={"max_model_len": 512},
        limits={"max_failed_fraction": 1.0},
    )
    assert run_here(write_job(tmp_path, settings)).code == 0
    assert errors(results(folder)) == {
        0: "column 'limit' (sampling.per_row.max_tokens): must be at least 1, got 0",
        1: "column 'limit' (sampling.per_row.max_tokens): 5000 leaves no room for a prompt in "
        "max_model_len 512",
        2: "column 'heat' (sampling.per_row.temperature): must be a finite number, got NaN",
        3: "column 'heat' (sampling.per_row.temperature): must be 0 or at least 0.01, got 0.001: "
        "engines raise it to that",
        4: "column 'form' (sampling.per_row.json_schema): is not a valid JSON Schema: /type: "
        "\"strng\" is not valid under any of the schemas listed in the 'anyOf' keyword",
        5: "column 'form' (sampling.per_row.json_schema): is not JSON: Expecting property name "
        "enclosed in double quotes: line 1 column 2 (char 1)",
        6: "column 'form' (sampling.per_row.json_schema): the row also has a choice",
        7: "column 'form' (sampling.per_row.json_schema): has values in values more than 100 deep",
        8: "column 'ends' (sampling.per_row.stop_token_ids): 999999 is not a token of the model, "
        "whose vocabulary has 4,096",
    }


def test_a_rows_own_length_bounds_its_prompt(folder: Place, tmp_path: Path) -> None:
    """The same text is too long beside a long completion, and is cut to what that leaves."""
    frame = rows(3).with_columns(text=pl.lit("word " * 100), limit=pl.Series([10, 200, None]))
    folder.write_parquet("in/s0.parquet", frame)
    settings = job(
        folder,
        prompt={"column": "text"},
        sampling={"max_tokens": 180, "per_row": {"max_tokens": "limit"}},
        model={"max_model_len": 256},
        limits={"max_failed_fraction": 1.0},
        packing={"deduplicate": True},
    )
    assert run_here(write_job(tmp_path, settings)).code == 0
    found = results(folder)
    assert found["error_type"].to_list() == [None, "prompt_too_long", "prompt_too_long"]
    assert "and max_tokens 200 exceed max_model_len 256" in found["error_message"][1]
    settings["prompt"]["on_too_long"] = "truncate_right"
    settings["output"]["path"] = folder.url("cut")
    assert run_here(write_job(tmp_path, settings)).code == 0
    cut = results(folder, "cut")["num_prompt_tokens"].to_list()
    assert cut[0] > 76 >= cut[2] > 56 >= cut[1] > 40


def test_only_rows_that_are_sampled_alike_share_a_result(folder: Place, tmp_path: Path) -> None:
    frame = rows(6).with_columns(
        text=pl.Series(["the same"] * 4 + ["warm"] * 2),
        limit=pl.Series([4, 9, 4, 9, 4, 4]),
        heat=pl.Series([0.0, 0.0, 0.0, 0.0, 0.9, 0.9]),
    )
    folder.write_parquet("in/s0.parquet", frame)
    per_row = {"max_tokens": "limit", "temperature": "heat"}
    assert run_here(write_job(tmp_path, job(folder, sampling={"per_row": per_row}))).code == 0
    assert results(folder)["duplicate_of"].to_list() == [None, None, 0, 1, None, None]


def test_parsed_is_what_fits_the_schema_of_its_row(folder: Place, tmp_path: Path) -> None:
    other = SCHEMA.replace("integer", "string")
    with_columns(folder, rows(3), form=[SCHEMA, other, None])
    settings = job(folder, sampling={"per_row": {"json_schema": "form"}})
    ended = run(write_job(tmp_path, settings), fake={"text": '{"a": 1}'})
    assert ended.code == 0, ended.stderr
    assert results(folder)["parsed"].to_list() == ['{"a": 1}', None, None]
    assert "rows_unparsed" not in ended.result  # an output does not say which rows had a schema


@pytest.mark.parametrize(
    ("per_row", "told"),
    [
        ({"max_tokens": "limt"}, "sampling.per_row.max_tokens: there is no column 'limt'"),
        ({"max_tokens": "text"}, "max_tokens: column 'text' is string, not numbers"),
        ({"stop": "limit"}, "stop: column 'limit' is int64, not text or lists of texts"),
        ({"choice": "text"}, "choice: column 'text' is string, not lists of texts"),
        ({"ignore_eos": "limit"}, "ignore_eos: column 'limit' is int64, not true or false"),
        ({"n": "limit"}, "sampling.per_row.n: unknown key; did you mean sampling.n?"),
    ],
)
def test_a_column_that_is_missing_or_no_such_setting_is_refused(
    per_row: dict[str, str], told: str, folder: Place, tmp_path: Path
) -> None:
    with_columns(folder, rows(3), limit=[1, 2, 3])
    path = write_job(tmp_path, job(folder, sampling={"per_row": per_row}))
    ended = run(path, command=("validate",))
    assert (ended.code, told in ended.stderr) == (2, True), ended.stderr
    must_fail(run(path), 2, told)
    must_be_untouched(folder)


def test_an_output_keeps_the_columns_that_it_was_begun_with(folder: Place, tmp_path: Path) -> None:
    with_columns(folder, rows(3), limit=[1, 2, 3])
    settings = job(folder, sampling={"per_row": {"max_tokens": "limit"}})
    assert run_here(write_job(tmp_path, settings)).code == 0
    ended = run_here(write_job(tmp_path, job(folder)))
    assert ended.code == 2
    assert 'sampling.per_row.max_tokens: was "limit", is null' in ended.message


def test_explain_says_which_settings_rows_have_of_their_own(folder: Place, tmp_path: Path) -> None:
    path = write_job(tmp_path, job(folder, sampling={"per_row": {"max_tokens": "limit"}}))
    shown = run(path, command=("explain",)).stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("sampling.max_tokens ")]
    assert line.endswith("job.yaml:18; a row's own from column limit"), line


def adapters(folder: Path) -> dict[str, str]:
    """One that changes nothing, and one that changes a lot. vLLM has them in the order of names."""
    scales = {"blank": 0.0, "much": 0.3}
    return {n: str(write_adapter(folder / n, scale=scale)) for n, scale in scales.items()}


def test_adapters_of_rows_stand_together_and_count_in_what_an_output_is(
    folder: Place, tmp_path: Path
) -> None:
    """The fake computes the same with any: only rows of one adapter share a result."""
    frame = rows(6).with_columns(text=pl.lit("the same"))
    with_columns(folder, frame, lora=["much", None, "nope", "blank", "much", None])
    model = {"adapters": adapters(tmp_path)}
    settings = job(
        folder,
        model=model,
        sampling={"per_row": {"lora": "lora"}},
        limits={"max_failed_fraction": 1.0},
    )
    path = write_job(tmp_path, settings)
    ended = run_here(path)
    assert ended.code == 0, ended.message
    found = results(folder)
    assert found["duplicate_of"].to_list() == [None, None, None, None, 0, 1]
    assert errors(found) == {
        2: "column 'lora' (sampling.per_row.lora): there is no adapter 'nope'; model.adapters has "
        "blank, much"
    }
    shutil.rmtree(tmp_path / "much")
    write_adapter(tmp_path / "much", scale=0.1)
    refused = run_here(path)
    changed = "model.adapters.much: adapter_model.safetensors is another than the output was begun"
    assert refused.code == 2 and changed in refused.message
    assert "model.content" not in refused.message
    del settings["model"]["adapters"]
    refused = run_here(write_job(tmp_path, settings))
    assert refused.code == 2 and "rows name adapters of model.adapters" in refused.message


def test_rows_of_one_adapter_are_admitted_together() -> None:
    names = ["b", None, "a", "b", None, "a"]
    prompts = [np.arange(5 + number, dtype=np.int32) for number in range(6)]
    sampling = SamplingSettings()
    chunk = Chunk.of_prompts(prompts, own=[OwnSampling(sampling, lora=name) for name in names])
    for order in ("input", "length", "prefix", "auto"):
        indices = plan_buffer([chunk], order).index_of.tolist()
        assert [names[index] for index in indices] == [None, None, "a", "a", "b", "b"]
    assert plan_buffer([chunk], "input").index_of.tolist() == [1, 4, 2, 5, 0, 3]


@pytest.mark.real_engine
@pytest.mark.slow
def test_a_row_is_computed_with_the_adapter_that_it_names(folder: Place, tmp_path: Path) -> None:
    """As by a job with that adapter for all rows; side by side in one engine. A row that names none
    is not computed with the one that happens to be last.
    """
    names = [None, "blank", "much"] * 4
    with_columns(folder, rows(12).with_columns(text=pl.lit("A tool to edit")), lora=names)
    paths = adapters(tmp_path)
    model = {"dtype": "float32", "max_model_len": 256}
    packing = {"deduplicate": False}
    per_row = job(
        folder,
        model=model | {"adapters": paths},
        sampling={"per_row": {"lora": "lora"}},
        packing=packing,
    )
    ended = run(write_job(tmp_path, per_row), engine="real", timeout_s=300)
    assert ended.code == 0, ended.stderr
    plain = job(folder, "much", model=model | {"lora": paths["much"]}, packing=packing)
    ended = run(write_job(tmp_path, plain), engine="real", timeout_s=300)
    assert ended.code == 0, ended.stderr
    told = ["token_ids", "token_logprobs"]
    found, much = results(folder), results(folder, "much")
    by_name = {
        name: found.filter(pl.col("row") % 3 == index) for index, name in enumerate(names[:3])
    }
    assert by_name["much"].select(told).equals(much.filter(pl.col("row") % 3 == 2).select(told))
    assert by_name["blank"]["token_ids"].equals(by_name[None]["token_ids"])
    assert not by_name["much"]["token_ids"].equals(by_name[None]["token_ids"])


def test_the_longest_expected_row_comes_first_with_its_own_completion() -> None:
    prompts = [np.arange(size, dtype=np.int32) for size in (30, 20, 10)]
    ways = [SamplingSettings(max_tokens=most) for most in (5, 40, 45)]
    chunk = Chunk.of_prompts(prompts, own=[OwnSampling(way) for way in ways])
    assert plan_buffer([chunk], "length").index_of.tolist() == [1, 2, 0]  # 60, 55 and 35 tokens


def test_a_forecast_runs_rows_as_they_are_sampled(folder: Place, tmp_path: Path) -> None:
    with_columns(folder, rows(40), limit=[1] * 40)
    settings = job(folder, sampling={"max_tokens": 500, "per_row": {"max_tokens": "limit"}})
    ended = run(write_job(tmp_path, settings), "--measure", "20", command=("plan",))
    assert ended.code == 0, ended.stderr
    assert re.search(r"tokens +about [\d,]+ of prompts, 40 of completions", ended.stdout)
