"""Finished outputs side by side, and against a reference column."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchinfer.cli.app import cli
from batchinfer.errors import ConfigError, InputError
from batchinfer.evaluation.grade import Grade, ScoreGrade, grade, rouge_l
from batchinfer.evaluation.outputs import Output
from batchinfer.evaluation.pair import pair
from batchinfer.testing.demands import completion as engine
from tests.support.in_process import run_here
from tests.support.jobs import Place, job, results, rows, run, write_job
from tests.support.scoring import score_job


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(str(tmp_path))
    place.write_parquet("in/a.parquet", rows(30).with_columns(wanted=pl.col("id")))
    place.write_parquet("in/b.parquet", rows(20, start=30).with_columns(wanted=pl.col("id")))
    return place


def make(settings: dict[str, Any], place: Place, **fake: Any) -> str:
    settings.setdefault("limits", {})["max_failed_fraction"] = 1.0
    ended = run_here(write_job(Path(place.root), settings), fake=fake)
    assert ended.code == 0, ended.message
    return str(settings["output"]["path"])


def scores(place: Place, output: str, **fake: Any) -> str:
    settings = score_job(place, output, score={"context": 8, "stride": 3, "top_logprobs": 3})
    return make(settings, place, **fake)


def test_an_output_is_at_no_distance_from_itself(place: Place) -> None:
    one, other = scores(place, "one"), scores(place, "other")
    found = pair(one, other, price_per_hour=3.6)
    assert (found.rows, found.rows_left_out, found.generated) == (50, 0, None)
    assert found.scored is not None
    assert (found.scored.nll_difference, found.scored.perplexity_ratio) == (0, 1)
    assert (found.scored.nll_difference_low, found.scored.nll_difference_high) == (0, 0)
    assert (found.scored.kl, found.scored.kl_top_k, found.scored.top1_agreement) == (0, 3, 1)
    assert found.scored.tokens == results(place, "one")["num_scored_tokens"].sum()
    side = found.one
    if side.tokens_per_s is not None:
        assert side.price_per_million_tokens == pytest.approx(1e-3 / side.tokens_per_s * 1e6)


def test_the_difference_is_the_second_less_the_first_over_rows_of_both(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = scores(place, "one", reject_every=9)
    made = engine.prompt_logprobs
    monkeypatch.setattr(engine, "prompt_logprobs", lambda ids: made(ids) - np.float32(0.25))
    found = pair(one, scores(place, "other")).scored
    assert found is not None
    assert found.nll_difference == pytest.approx(0.25)
    assert found.nll_difference_low == pytest.approx(0.25)
    assert found.perplexity_ratio == pytest.approx(math.exp(0.25))
    have = results(place, "one").filter(pl.col("error_type").is_null())
    assert pair(one, place.url("other")).rows == have.height < 50
    assert found.nll_one == pytest.approx(
        -have["cumulative_logprob"].sum() / have["num_scored_tokens"].sum()
    )


def test_generated_rows_agree_as_far_as_their_tokens(place: Place) -> None:
    one = make(job(place, "one"), place)
    same = pair(one, make(job(place, "same"), place)).generated
    assert same is not None
    assert (same.text_agreement, same.token_agreement) == (1, 1)
    shorter = job(place, "shorter", sampling={"max_tokens": 8, "logprobs": 1})
    found = pair(one, make(shorter, place)).generated
    assert found is not None
    assert 0 <= found.text_agreement < 1
    wanted = results(place, "one")["token_ids"].list.len().sum()
    assert (found.tokens_one, found.tokens_other) == (
        wanted,
        results(place, "shorter")["token_ids"].list.len().sum(),
    )
    common = longer = 0
    both = (results(place, name)["token_ids"] for name in ("one", "shorter"))
    for left, right in zip(*both, strict=True):
        common += common_of(left, right)
        longer += max(len(left), len(right))
    assert found.token_agreement == pytest.approx(common / longer)


def common_of(left: Any, right: Any) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def test_an_output_of_a_task_that_nothing_evaluates_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each evaluation names the tasks it knows, so a new one is never taken for completions."""
    one = scores(place, "one")
    monkeypatch.setattr(Output, "task", "embed")
    for evaluate in (lambda: pair(one, one), lambda: grade(one, "wanted")):
        with pytest.raises(
            ConfigError, match="is an output of task embed, and only outputs of generate or"
        ):
            evaluate()


def test_outputs_that_do_not_compare_are_refused(place: Place) -> None:
    one = scores(place, "one")
    texts = make(job(place, "texts"), place)
    with pytest.raises(ConfigError, match=r"is an output of task score, .* of generate"):
        pair(one, texts)
    other = Place(place.url("elsewhere"))
    other.write_parquet("in/a.parquet", rows(30))
    fewer = make(score_job(other), other)
    with pytest.raises(ConfigError, match="are not of the same input"):
        pair(one, fewer)
    third = Place(place.url("third"))
    third.write_parquet("in/a.parquet", rows(30))
    third.write_parquet("in/b.parquet", rows(21, start=30))
    with pytest.raises(ConfigError, match=r"have other rows of b\.parquet: 20 and 21"):
        pair(one, make(score_job(third), third))
    fourth = Place(place.url("fourth"))
    fourth.write_parquet("in/a.parquet", rows(30, start=1))
    fourth.write_parquet("in/b.parquet", rows(20, start=30))
    with pytest.raises(ConfigError, match="has other tokens than"):
        pair(one, make(score_job(fourth), fourth))


def test_a_failed_row_counts_as_wrong_and_one_without_reference_not_at_all(place: Place) -> None:
    wanted = ["yes", " yes", "no", None]
    frame = pl.DataFrame({"id": list("abcd"), "text": list("wxyz"), "wanted": wanted})
    place = Place(place.url("graded"))
    place.write_parquet("in/a.parquet", frame)
    settings = job(place, input={"keep_columns": ["wanted"]}, packing={"deduplicate": False})
    output = make(settings, place, text="yes ", reject_every=4)
    found = grade(output, "wanted", rouge=False)
    assert isinstance(found, Grade)
    assert (found.rows, found.rows_failed, found.rows_without_reference) == (3, 0, 1)
    assert found.exact_match.mean == pytest.approx(2 / 3)
    low, high = found.exact_match.low, found.exact_match.high
    assert low is not None and high is not None and 0 <= low < 2 / 3 < high <= 1
    second = job(place, "second", input={"keep_columns": ["wanted"]})
    second["packing"]["deduplicate"] = False
    failed = grade(make(second, place, text="yes", reject_every=1), "wanted")
    assert isinstance(failed, Grade)
    assert (failed.rows_failed, failed.exact_match.mean) == (3, 0)
    # Wilson's z^2 / (n + z^2): three wrong rows do not make the fourth certainly wrong.
    assert failed.exact_match.low == 0
    assert failed.exact_match.high == pytest.approx(3.8415 / 6.8415, abs=1e-4)


def test_a_score_output_is_graded_by_its_perplexity(place: Place) -> None:
    output = scores(place, "one")
    found = grade(output, None)
    assert isinstance(found, ScoreGrade)
    have = results(place, "one")
    nats = -have["cumulative_logprob"].sum()
    assert found.nll == pytest.approx(nats / have["num_scored_tokens"].sum())
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / have["num_text_bytes"].sum())
    assert (found.perplexity_low or 0) < found.perplexity < (found.perplexity_high or 0)
    with pytest.raises(ConfigError, match="no completions: leave --reference out"):
        grade(output, "text")
    with pytest.raises(ConfigError, match="leave --reference and --rouge out"):
        grade(output, "text", rouge=True)


def test_rows_of_one_token_have_no_share_in_the_figures(place: Place) -> None:
    """Their only token has nothing before it, so they have no scored one."""
    place = Place(place.url("short"))
    place.write_parquet("in/a.parquet", pl.DataFrame({"id": list("abcd"), "text": ["a"] * 4}))
    few = pl.DataFrame({"id": list("ef"), "text": ["some words", "and other words"]})
    place.write_parquet("in/b.parquet", few)
    one = scores(place, "one")
    assert (results(place, "one")["num_scored_tokens"] == 0).sum() == 4
    found = grade(one, None)
    assert isinstance(found, ScoreGrade)
    assert (found.perplexity_low or 0) <= found.perplexity <= (found.perplexity_high or 0)
    compared = pair(one, scores(place, "other")).scored
    assert compared is not None
    assert (compared.nll_difference_low, compared.nll_difference_high) == (0, 0)


def test_what_cannot_be_graded_is_said(place: Place) -> None:
    """Not what the job wrote itself, either: a completion is always right about itself."""
    for root in ("in/a.parquet", "in/b.parquet"):
        path = Path(place.root, root)
        pl.read_parquet(path).with_columns(number=pl.lit(1)).write_parquet(path)
    output = make(job(place, "one", input={"keep_columns": ["wanted", "number"]}), place)
    for reference in (None, "right", "completion", "num_prompt_tokens"):
        said = r"give --reference COLUMN.*\(input\.keep_columns\): (id, )?wanted, number$"
        with pytest.raises(ConfigError, match=said):
            grade(output, reference)
    with pytest.raises(ConfigError, match=r"column 'number' .* is int32, not text"):
        grade(output, "number")
    empty = Place(place.url("empty"))
    empty.write_parquet("in/a.parquet", rows(3).with_columns(wanted=pl.lit(None, pl.String)))
    nothing = make(job(empty, input={"keep_columns": ["wanted"]}), empty)
    with pytest.raises(InputError, match="has a value in column 'wanted'"):
        grade(nothing, "wanted")


@pytest.mark.parametrize(
    ("given", "wanted", "score"),
    [
        ("police killed the gunman", "police kill the gunman", 0.75),  # Lin 2004, section 3.1
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("The, CAT!", "the cat", 1.0),
        ("", "the cat", 0.0),
        ("", "...", 1.0),
        ("naïve Übung", "NAÏVE übung", 1.0),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(
    given: str, wanted: str, score: float
) -> None:
    pytest.importorskip("rapidfuzz")
    assert rouge_l(given, wanted) == score


def test_the_commands_print_json(place: Place) -> None:
    one, other = scores(place, "one"), scores(place, "other")
    ended = run(one, other, command=("pair",))
    assert ended.code == 0, ended.stderr
    assert json.loads(ended.stdout)["scored"]["nll_difference"] == 0
    ended = run(one, command=("grade",))
    assert json.loads(ended.stdout)["rows"] == 50
    ended = run(place.url("no"), command=("grade",))
    assert (ended.code, ended.stdout) == (2, "")
    assert "is not an output of batchinfer" in ended.stderr


@pytest.mark.parametrize("price", ["nan", "inf", "-inf", "1e308", "-1", "two"])
def test_what_is_not_a_price_is_refused_before_anything_is_read(price: str) -> None:
    ended = CliRunner().invoke(cli, ["pair", "no", "no", f"--price-per-hour={price}"])
    assert ended.exit_code == 2 and "--price-per-hour" in ended.output, ended.output


def with_first(output: str, column: str, value: Any) -> str:
    """A copy in which the first number of a column is another."""
    copy = f"{output}-damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(output, copy)
    path = sorted(Path(copy).glob("*.parquet"))[0]
    table = pq.read_table(path)
    values = table[column].to_pylist()
    row = next(n for n, number in enumerate(table["num_scored_tokens"].to_pylist()) if number)
    if column == "cumulative_logprob":
        values[row] = value
    else:
        place = next(n for n, found in enumerate(values[row]) if found)
        inner = values[row][place]
        values[row][place] = [value, *inner[1:]] if isinstance(inner, list) else value
    at = table.schema.get_field_index(column)
    field = table.schema.field(at)
    pq.write_table(table.set_column(at, field, pa.array(values, field.type)), path)
    return copy


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("column", ["cumulative_logprob", "token_logprobs", "top_logprobs"])
def test_numbers_that_no_model_gives_are_refused_as_figures(place: Place, column: str) -> None:
    """In a file that was damaged, or that another version wrote. Null was a perplexity of 1."""
    one, other = scores(place, "one"), scores(place, "other")
    values = [math.nan, math.inf, 5.0]
    if column != "top_logprobs":  # where -inf is a token that is ruled out
        values.append(-math.inf)
    values += [None] if column == "cumulative_logprob" else []
    for value in values:
        damaged = with_first(one, column, value)
        for pairs in ((damaged, other), (other, damaged)):
            with pytest.raises(InputError, match="which no model gives: the file is damaged"):
                pair(*pairs)
        if column == "cumulative_logprob":
            with pytest.raises(InputError, match=r"row \d+ of .*-damaged: the log-probability"):
                grade(damaged, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"PAR1 cut off"),
        ("_batchinfer/job.json", b"{}"),
        ("_batchinfer/status/0001.json", b'{"result_tokens": "x"}'),
        ("_SUCCESS", b'{"rows_failed": "x"}'),
    ],
)
def test_what_is_damaged_in_an_output_is_named(place: Place, name: str, content: bytes) -> None:
    output = Path(scores(place, "one"))
    (output / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        pair(str(output), str(output))
