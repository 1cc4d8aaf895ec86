"""A mistake in job, model, input or output is refused: what failed, where, and what to do.

Refused means exit code 2 before any model loads, with nothing of value written or deleted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import polars as pl
import pytest

from batchinfer.errors import ROW_ERROR_KINDS
from tests.support.endings import changed, must_be_untouched, must_fail, read_bytes, write_bytes
from tests.support.in_process import run_here
from tests.support.jobs import MODEL, ROOT, Place, job, results, rows, run, write_job


@pytest.fixture
def filled(folder: Place) -> Place:
    """A local place with one shard of 20 rows."""
    folder.write_parquet("in/s0.parquet", rows(20))
    return folder


def test_all_mistakes_in_the_job_file_are_named_together_with_their_lines(
    filled: Place, tmp_path: Path
) -> None:
    settings = changed(job(filled), sampling={"max_tokns": 5, "temperature": "warm"})
    ended = run(write_job(tmp_path, settings), "--set", "input.pth=x", "--set", "packing.order=up")
    must_fail(
        ended,
        2,
        "--set input.pth: unknown key; did you mean input.path?",
        "sampling.max_tokns: unknown key; did you mean sampling.max_tokens?",
        "sampling.temperature: must be a number",
        "packing.order: must be one of",
    )
    lines = (tmp_path / "job.yaml").read_text().splitlines()
    number = next(n for n, line in enumerate(lines, start=1) if "max_tokns" in line)
    assert f"job.yaml:{number}: sampling.max_tokns" in ended.stderr
    must_be_untouched(filled)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--slice", "5/4"), ("--slice", "5/4", "1 <= i <= n")),
        (("--limit", "0"), ("--limit", "0")),
        (("--set", "sampling.max_tokens"), ("must look like section.key=value",)),
        (("--restart", "--slice", "1/2"), ("--restart", "without --slice")),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(
    arguments: tuple[str, ...], words: tuple[str, ...], filled: Place, tmp_path: Path
) -> None:
    ended = run(write_job(tmp_path, job(filled)), *arguments)
    assert ended.code == 2
    assert "Traceback" not in ended.stderr
    for word in words:
        assert word in ended.stderr
    must_be_untouched(filled)


def test_a_job_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    must_fail(run(tmp_path / "jbo.yaml"), 2, "jbo.yaml", "no such job file")


def test_all_shards_that_cannot_be_read_are_named_in_one_go(place: Place, tmp_path: Path) -> None:
    place.write_parquet("in/good.parquet", rows(20))
    whole = read_bytes(place, "in/good.parquet")
    write_bytes(place, "in/empty.parquet", b"")
    write_bytes(place, "in/text.parquet", b"id,text\n1,hello\n")
    write_bytes(place, "in/torn.parquet", whole[: len(whole) // 2])
    num_footer_bytes = int.from_bytes(whole[-8:-4], "little")
    damaged = whole[: -8 - num_footer_bytes] + bytes(num_footer_bytes) + whole[-8:]
    write_bytes(place, "in/damaged.parquet", damaged)
    place.write_parquet("in/other.parquet", rows(2).rename({"text": "txt"}))
    path = write_job(tmp_path, job(place, prompt={"column": "text"}))
    ended = run(path, place=place)
    must_fail(
        ended,
        2,
        f"{place.url('in/empty.parquet')} is empty (0 bytes)",
        f"{place.url('in/text.parquet')} is not a Parquet file",
        f"{place.url('in/torn.parquet')} is truncated",
        f"{place.url('in/damaged.parquet')}: the Parquet footer is damaged",
        f"shard {place.url('in/other.parquet')}: prompt.column: there is no column 'text' (did "
        "you mean 'txt'?)",
    )
    must_be_untouched(place)
    validated = run(path, place=place, command=("validate",))
    assert validated.code == 2
    assert "torn.parquet is truncated" in validated.stderr and "did you mean" in validated.stderr


def test_a_missing_column_is_reported_once_with_the_setting_that_names_it(
    folder: Place, tmp_path: Path
) -> None:
    for name in "abc":
        folder.write_parquet(f"in/{name}.parquet", rows(2))
    for changes, words in (
        ({"input": {"id_column": "idx"}}, "input.id_column: there is no column 'idx'"),
        ({"input": {"keep_columns": ["texts"]}}, "input.keep_columns: there is no column 'texts'"),
        ({"input": {"filter": "n > 1"}}, "input.filter: there is no column 'n'"),
        ({"prompt": {"column": "txt"}}, "prompt.column: there is no column 'txt'"),
        ({"prompt": {"messages_column": "m"}}, "prompt.messages_column: there is no column 'm'"),
    ):
        ended = run_here(write_job(tmp_path, job(folder, **changes)))
        assert ended.code == 2
        (line,) = ended.message.splitlines()
        assert f"{folder.url('in/a.parquet')} and 2 more: {words}" in line


def test_an_input_that_matches_nothing_says_where_it_looked(filled: Place, tmp_path: Path) -> None:
    settings = changed(job(filled), input={"path": filled.url("im", "*.parquet")})
    must_fail(run(write_job(tmp_path, settings)), 2, "nothing matches", "exists is", filled.root)


def test_a_prompt_column_that_is_not_text_is_refused_with_its_shard(
    filled: Place, tmp_path: Path
) -> None:
    filled.write_parquet("in/s1.parquet", rows(2).with_columns(text=pl.lit(5)))
    ended = run(write_job(tmp_path, job(filled, prompt={"column": "text"})))
    shard = f"shard {filled.url('in/s1.parquet')}"
    must_fail(ended, 2, shard, "'text' is int32, not text", "use prompt.template")
    must_be_untouched(filled)


def test_shards_without_rows_are_complete_immediately(folder: Place, tmp_path: Path) -> None:
    folder.write_parquet("in/s0.parquet", rows(0))
    ended = run(write_job(tmp_path, job(folder)))
    assert ended.code == 0, ended.stderr
    assert ended.result["status"] == "complete" and ended.result["rows"] == 0
    assert folder.read_parquet("out/s0.parquet").height == 0
    assert "_SUCCESS" in folder.names("out")


def test_null_and_duplicate_ids_are_reported_once_and_lose_no_row(
    place: Place, tmp_path: Path
) -> None:
    ids = ["a", None, "b", "a", None, *(f"row-{n}" for n in range(95))]
    for shard in ("s0", "s1"):
        place.write_parquet(
            f"in/{shard}.parquet", rows(100).with_columns(pl.Series("id", ids, dtype=pl.String))
        )
    path = write_job(tmp_path, job(place))
    ended = run(path, place=place)
    assert ended.code == 0, ended.stderr
    warnings = [line for line in ended.stderr.splitlines() if "input.id_column" in line]
    assert sum("is null in 2 of" in line and ".parquet:1." in line for line in warnings) == 1
    assert sum("the value 'a' in several rows" in line for line in warnings) == 1
    assert len(warnings) == 2, warnings
    assert results(place)["id"].to_list() == ids * 2
    checked = run(path, "--ids", place=place, command=("validate",))
    assert checked.code == 0, checked.stderr
    assert "4 null" in checked.stdout and "97 values that occur more than once" in checked.stdout
    assert "s0.parquet:0 'a'" in checked.stdout and "s0.parquet:3 'a'" in checked.stdout


def test_distinct_ids_are_not_warned_of(filled: Place, tmp_path: Path) -> None:
    ended = run(write_job(tmp_path, job(filled)))
    assert ended.code == 0
    assert "warning" not in ended.stderr


def test_a_bad_row_is_an_error_in_the_output_and_stops_nothing(
    filled: Place, tmp_path: Path
) -> None:
    texts = ["fine", "", None, "word " * 3000, "also fine"]
    filled.write_parquet("in/s0.parquet", pl.DataFrame({"id": range(5), "text": texts}))
    ended = run(write_job(tmp_path, job(filled, prompt={"column": "text"})))
    assert ended.code == 3
    assert "3 of 5 rows failed" in ended.stderr and "--retry-failed" in ended.stderr
    found = results(filled)
    assert found["error_type"].to_list() == [
        None,
        "empty_prompt",
        "missing_value",
        "prompt_too_long",
        None,
    ]
    assert "'text' is null" in found["error_message"][2]
    assert "exceed max_model_len 2048" in found["error_message"][3]
    assert found["completion"].null_count() == 3
    again = run(write_job(tmp_path, job(filled, prompt={"column": "text"})))
    assert again.code == 3 and again.result["rows_computed"] == 0


def test_the_errors_page_lists_every_kind_of_bad_row() -> None:
    """The page on errors lists every kind of bad row in the words of the code."""
    page = (ROOT / "docs" / "errors.md").read_text()
    section = page.split("## Rows")[1].split("## ")[0]
    listed = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE))
    assert listed.keys() - {"error_type"} == ROW_ERROR_KINDS.keys()
    for kind, meaning in ROW_ERROR_KINDS.items():
        assert listed[kind].replace("`", "").startswith(meaning)


def test_a_template_without_a_column_is_refused(filled: Place, tmp_path: Path) -> None:
    """A template that names no column is refused and can be mended."""
    wrong = job(filled, prompt={"template": "Say: {{ txt }}"})
    must_fail(run(write_job(tmp_path, wrong)), 2, "prompt.template uses 'txt'", "mean 'text'?")
    unclosed = job(filled, prompt={"template": "Say: {{ text"})
    must_fail(run(write_job(tmp_path, unclosed)), 2, "prompt.template, line 1")
    must_be_untouched(filled)
    mended = run(write_job(tmp_path, job(filled, prompt={"template": "Say: {{ text }}"})))
    assert mended.code == 0, mended.stderr


def test_a_template_cannot_leave_its_sandbox(filled: Place, tmp_path: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ text }}"
    ended = run(write_job(tmp_path, job(filled, prompt={"template": escape})))
    assert ended.code == 3, ended.stderr
    found = results(filled)
    assert set(found["error_type"]) == {"template_error"}
    assert "unsafe" in found["error_message"][0]
    as_data = pl.DataFrame({"id": [1], "text": ["{{ 7 * 7 }} {% raise %}"]})
    filled.write_parquet("in/s0.parquet", as_data)
    data = run(write_job(tmp_path, job(filled, "data")), fake={})
    assert data.code == 0, "a value is data, whatever it looks like"


def without_tokenizer(folder: Path) -> Path:
    names = ("config.json", "generation_config.json", "model.safetensors")
    folder.mkdir()
    for name in names:
        shutil.copy(MODEL / name, folder)
    return folder


def cut_short(folder: Path) -> Path:
    shutil.copytree(MODEL, folder)
    os.truncate(folder / "model.safetensors", 100_000)
    return folder


def test_a_model_that_cannot_run_is_refused_before_it_loads(filled: Place, tmp_path: Path) -> None:
    must_not_load = {"fail_build": "the model was loaded"}
    for model, words in (
        ({"path": str(tmp_path / "none")}, ("model.path", "no folder", str(tmp_path / "none"))),
        ({"path": str(without_tokenizer(tmp_path / "bare"))}, ("no tokenizer", "model.tokenizer")),
        ({"path": str(cut_short(tmp_path / "torn"))}, ("model.safetensors", "truncated", "again")),
        ({"max_model_len": 4096}, ("model.max_model_len 4096", "2048 tokens", "lower it")),
        ({"quantization": "awq"}, ("model.quantization is awq", "unquantized", "write none")),
        ({"quantization": "agw"}, ("model.quantization", "did you mean awq?")),
    ):
        settings = changed(job(filled), model=model)
        must_fail(run(write_job(tmp_path, settings), fake=must_not_load), 2, *words)
        must_be_untouched(filled)


def test_a_stop_token_beyond_the_vocabulary_is_refused_before_the_model_loads(
    filled: Place, tmp_path: Path
) -> None:
    path = write_job(tmp_path, job(filled, sampling={"stop_token_ids": [2, 99_999]}))
    words = ("sampling.stop_token_ids: 99999 is not a token", "has 4,096")
    must_fail(run(path, fake={"fail_build": "the model was loaded"}), 2, *words)
    validated = run(path, command=("validate",))
    assert validated.code == 2 and words[0] in validated.stderr


def test_a_setting_refused_by_the_engine_can_be_corrected(filled: Place, tmp_path: Path) -> None:
    """A setting that only the engine can refuse may be mended in place."""
    path = write_job(tmp_path, job(filled))
    must_fail(run(path, fake={"fail_build": "sampling.top_k is too much"}), 2, "sampling.top_k")
    mended = run(path, "--set", "sampling.top_k=5")
    assert mended.code == 0, mended.stderr
    assert results(filled).height == 20


def test_an_output_that_cannot_be_written_is_refused(filled: Place, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path, *words in (
        (str(file / "out"), f"{file} is a file where a folder is needed"),
        ("/proc/out", "cannot write /proc/out", "another path"),
    ):
        settings = changed(job(filled), output={"path": path})
        must_fail(run(write_job(tmp_path, settings)), 2, *words)


def test_outputs_that_would_mix_with_something_else_are_refused(
    filled: Place, tmp_path: Path
) -> None:
    filled.write_parquet("foreign/theirs.parquet", rows(2))
    settings = job(filled)
    recursive = {"path": filled.url("in")}
    for sections, words in (
        ({"output": {"path": filled.url("foreign")}}, ("theirs.parquet", "not a result", "empty")),
        ({"output": {"path": filled.url("in")}}, ("inside output.path", "another output.path")),
        (
            {"input": recursive, "output": {"path": filled.url("in", "out")}},
            ("would match input.path", "outside the input"),
        ),
        (
            {"input": {"keep_columns": ["text", "completion", "row"]}},
            ("input.keep_columns: completion, row", "collide", "rename"),
        ),
    ):
        must_fail(run(write_job(tmp_path, changed(settings, **sections))), 2, *words)
        must_be_untouched(filled)
    assert filled.read_parquet("foreign/theirs.parquet").equals(rows(2))
    assert filled.names("in") == ["s0.parquet"]


def test_input_files_that_would_share_an_output_file_are_refused(
    folder: Place, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        folder.write_parquet(f"{name}/s0.parquet", rows(1))
    paths = [folder.url("a", "*.parquet"), folder.url("b", "*.parquet")]
    settings = changed(job(folder), input={"path": paths})
    ended = run(write_job(tmp_path, settings))
    must_fail(ended, 2, "a/s0.parquet and", "b/s0.parquet would both", folder.url("**/*.parquet"))
    must_be_untouched(folder)


def test_settings_that_change_between_runs_are_named_with_both_values(
    folder: Place, tmp_path: Path
) -> None:
    folder.write_parquet("in/s0.parquet", rows(100))
    path = write_job(tmp_path, job(folder))
    assert run(path, "--limit", "30").result["status"] == "partial"
    before = folder.names("out")
    hotter = ("--set", "sampling.temperature=0.5")
    ended = run(path, *hotter)
    must_fail(
        ended,
        2,
        folder.url("out"),
        "sampling.temperature: was 0.0, is 0.5",
        "another output.path",
        "--restart",
    )
    assert folder.names("out") == before, "a refusal writes nothing"
    validated = run(path, *hotter, command=("validate",))
    assert validated.code == 2 and "was 0.0, is 0.5" in validated.stderr
    wider = run(path, "--set", "packing.window_rows=1000")
    assert wider.code == 0, wider.stderr
    assert "packing.window_rows stays 64" in wider.stderr
    assert wider.result["rows_computed"] == 70 and results(folder).height == 100
    facts = json.loads(read_bytes(folder, "out/_batchinfer/job.json"))
    assert facts["window_rows"] == 64


def test_a_restart_with_a_mistake_in_it_deletes_nothing(filled: Place, tmp_path: Path) -> None:
    path = write_job(tmp_path, job(filled))
    assert run(path).code == 0
    before = results(filled)
    ended = run(path, "--restart", "--set", 'prompt={"template": "{{ txt }}"}')
    must_fail(ended, 2, "prompt.template uses 'txt'")
    assert results(filled).equals(before)
    assert run(path).result["rows_computed"] == 0


def test_a_shard_that_changed_since_its_rows_were_computed_is_refused(
    place: Place, tmp_path: Path
) -> None:
    for index in range(2):
        place.write_parquet(f"in/s{index}.parquet", rows(20, start=20 * index))
    path = write_job(tmp_path, job(place))
    assert run(path, place=place).code == 0
    before = results(place)
    old = read_bytes(place, "in/s1.parquet")
    place.write_parquet("in/s1.parquet", rows(25, start=7))
    ended = run(path, place=place)
    must_fail(
        ended, 2, "changed since", place.url("in/s1.parquet"), "bytes then", "and start again"
    )
    assert "s0.parquet" not in ended.stderr
    assert results(place).equals(before)
    write_bytes(place, "in/s1.parquet", old)
    assert run(path, place=place).result["rows_computed"] == 0, "the old file came back"
