"""task: score: every token's logprob once, with enough text before it, in rows of any length."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.config import Job, ScoreSettings
from batchinfer.engine.demands.completion import Completion
from batchinfer.errors import RowError
from batchinfer.evaluation.outputs import read_output
from batchinfer.plan import Chunk, WorkItem
from batchinfer.prompt import GIVEN
from batchinfer.runner import RunOptions
from batchinfer.tasks import Score
from batchinfer.tasks.scoring_windows import ScoringWindows, WindowAsk
from batchinfer.testing.demands.completion import prompt_logprobs, prompt_tops
from tests.support.in_process import EndedHere, run_here
from tests.support.jobs import Place, results, rows, run, write_job
from tests.support.scoring import score_job


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(str(tmp_path))


def score(place: Place, frame: pl.DataFrame, output: str = "out", **sections: Any) -> pl.DataFrame:
    """Results of a run over a file of these rows."""
    place.write_parquet("in/a.parquet", frame)
    ended = run_in(place, output=output, **sections)
    assert ended.code in (0, 3), ended.message
    return results(place, output)


def run_in(
    place: Place,
    options: RunOptions | None = None,
    fake: dict[str, Any] | None = None,
    **sections: Any,
) -> EndedHere:
    return run_here(write_job(Path(place.root), score_job(place, **sections)), options, fake)


def begin(
    num_tokens: int, num_given: int, context: int, stride: int, max_model_len: int | None = None
) -> ScoringWindows:
    chunk = Chunk.of_prompts([np.arange(num_tokens, dtype=np.int32)])
    chunk.counts = {GIVEN: np.array([num_given])}
    task = Score(ScoreSettings(context=context, stride=stride))
    return task.work(WorkItem(chunk, 0, 0), max_model_len or context + 1)


def answer(ask: WindowAsk, logprobs: npt.NDArray[np.float32] | None = None) -> Completion:
    """Each token's "logprob" is less the position in the row where its window starts."""
    if logprobs is None:
        logprobs = np.full(len(ask.token_ids), -ask.start, np.float32)
        logprobs[0] = np.nan
    last = np.full(1, -ask.start, np.float32)
    ids = np.array([-1 if ask.next_token is None else ask.next_token], np.int32)
    return Completion(key=0, token_ids=ids, token_logprobs=last, prompt_token_logprobs=logprobs)


@given(data=st.data(), num_tokens=st.integers(1, 60), context=st.integers(2, 20))
def test_each_token_is_scored_once_after_at_least_context_less_stride_others(
    data: st.DataObject, num_tokens: int, context: int
) -> None:
    stride = data.draw(st.integers(1, context - 1))
    num_given = data.draw(st.integers(0, num_tokens - 1))
    max_model_len = context + data.draw(st.integers(0, 1))
    work = begin(num_tokens, num_given, context, stride, max_model_len)
    asks = list(work.asks())
    for ask in data.draw(st.permutations(asks)):
        assert len(ask.token_ids) + (ask.next_token is not None) <= context
        assert len(ask.token_ids) < max_model_len  # room for the token that is generated
        assert ask.token_ids[0] == ask.start  # ids are positions
        work.add(ask, answer(ask))
    done = work.answer()
    assert done.token_ids.tolist() == list(range(num_given, num_tokens))
    assert done.token_logprobs is not None
    for position, start in zip(done.token_ids.tolist(), -done.token_logprobs, strict=True):
        if position == 0:
            assert np.isnan(start)
        else:
            assert position - start >= min(position, context - stride)
    assert len(asks) == len({float(start) for start in done.token_logprobs if start == start})


def test_a_result_holds_the_bytes_it_counts_not_the_row_it_was_cut_from() -> None:
    """The writer's memory is bounded by `num_bytes`: a view would hold the given tokens too."""
    num_given, k = 1000, 2
    chunk = Chunk.of_prompts([np.arange(num_given + 4, dtype=np.int32)])
    chunk.counts = {GIVEN: np.array([num_given])}
    task = Score(ScoreSettings(context=2048, stride=1024, top_logprobs=k))
    work = task.work(WorkItem(chunk, 0, 0), 2048)
    (ask,) = work.asks()
    completion = answer(ask)
    tops = prompt_tops(ask.token_ids, k)
    completion.prompt_top_token_ids, completion.prompt_top_logprobs = tops
    work.add(ask, completion)
    done = work.answer()
    values = [getattr(done, field.name) for field in dataclasses.fields(done)]
    arrays = [value for value in values if isinstance(value, np.ndarray)]
    assert [array.base for array in arrays] == [None] * 5
    assert done.num_bytes == 4 * (4 + 4 + 5 + 4 * k + 4 * k)  # ids, logprobs, offsets, tops


def test_a_completion_counts_each_array_and_text_that_it_holds() -> None:
    for field in dataclasses.fields(Completion):
        empty = Completion(key=0).num_bytes
        if "Array" in str(field.type):
            assert Completion(key=0, **{field.name: np.zeros(3, np.int32)}).num_bytes == empty + 12
        elif "str" in str(field.type):
            assert Completion(key=0, **{field.name: "text"}).num_bytes == empty + 4


def test_an_engine_that_does_not_end_with_the_given_token_is_an_error() -> None:
    work = begin(5, 0, 5, 2, max_model_len=5)
    (ask,) = work.asks()
    completion = answer(ask)
    completion.token_ids = completion.token_ids + 1
    with pytest.raises(RowError, match="did not end with the token"):
        work.add(ask, completion)


@pytest.mark.parametrize("bad", [np.nan, -np.inf, 0.5])
def test_a_nan_logprob_makes_the_row_an_error(bad: float) -> None:
    work = begin(5, 0, 8, 4)
    (ask,) = work.asks()
    with pytest.raises(RowError, match="logprob of token 3 of the row is"):
        work.add(ask, answer(ask, np.array([np.nan, -1, -1, bad, -1], np.float32)))


def test_rows_hold_the_logprob_of_each_token_and_their_sum(place: Place) -> None:
    have = score(place, rows(20))
    assert have["error_type"].null_count() == 20
    for row in have.iter_rows(named=True):
        ids = np.array(row["token_ids"], np.int32)
        wanted = prompt_logprobs(ids[:8]).tolist()
        for start in range(3, len(ids) - 5 + 3, 3):
            wanted += prompt_logprobs(ids[start : start + 8])[5:].tolist()
        assert row["token_logprobs"][0] is None
        assert row["token_logprobs"][1:] == wanted[1 : len(ids)]
        assert row["cumulative_logprob"] == sum(row["token_logprobs"][1:])
        assert row["num_scored_tokens"] == len(ids) - 1
        assert row["num_prompt_tokens"] == len(ids)
    assert have["num_text_bytes"].to_list() == rows(20)["text"].str.len_bytes().to_list()


def test_a_completion_is_scored_given_its_prompt(place: Place) -> None:
    frame = pl.DataFrame(
        {"id": [0, 1, 2, 3], "text": ["one two", "one two", None, "x"], "more": ["é", "", "a", "b"]}
    )
    have = score(place, frame, score={"completion_column": "more"})
    first = have.row(0, named=True)
    assert (first["num_text_bytes"], first["num_scored_tokens"]) == (2, len(first["token_ids"]))
    assert None not in first["token_logprobs"]
    alone = score(place, frame.select("id", text="more"), "alone", score={})
    assert first["token_ids"] == alone.row(0, named=True)["token_ids"]
    assert have["error_type"].to_list() == [None, "empty_prompt", "missing_value", None]
    assert have["error_message"][1] == "the completion has no tokens"


def test_token_ids_are_scored_as_they_are(place: Place) -> None:
    frame = pl.DataFrame({"id": [0], "ids": [[5, 6]], "more": [[7, 8, 9]]})
    prompt = {"token_ids_column": "ids"}
    have = score(place, frame, prompt=prompt, score={"completion_column": "more"})
    logprobs = prompt_logprobs(np.array([5, 6, 7, 8, 9], np.int32))
    assert have["token_logprobs"].to_list() == [logprobs[2:].tolist()]
    assert have["num_text_bytes"].to_list() == [None]


def test_equal_tokens_that_are_divided_differently_are_not_duplicates(place: Place) -> None:
    frame = pl.DataFrame(
        {"id": [0, 1, 2], "ids": [[5, 6], [5], [5, 6]], "more": [[7], [6, 7], [7]]}
    )
    prompt = {"token_ids_column": "ids"}
    have = score(place, frame, prompt=prompt, score={"completion_column": "more"})
    assert have["token_ids"].to_list() == [[7], [6, 7], [7]]
    assert have["duplicate_of"].to_list() == [None, None, 0]


def test_a_text_longer_than_a_buffer_and_the_engine_takes_is_scored(place: Place) -> None:
    frame = pl.DataFrame({"id": [0, 1, 2], "text": ["a b", "word " * 3000, "a"]})
    have = score(place, frame, packing={"buffer_tokens": 100}, score={"context": 64, "stride": 1})
    assert have["error_type"].null_count() == 3
    lengths = have["token_ids"].list.len()
    assert (have["num_scored_tokens"] == lengths - 1).all()
    assert lengths[1] > 2900


def test_a_row_of_which_one_window_is_refused_fails_and_is_retried(place: Place) -> None:
    place.write_parquet("in/a.parquet", rows(30))
    assert run_in(place, fake={"reject_every": 7}).code == 3
    failed = results(place).filter(pl.col("error_type") == "engine_rejected")
    assert 0 < failed.height < 30
    assert failed["token_ids"].null_count() == failed.height
    assert run_in(place, RunOptions(retry_failed=True)).code == 0
    have = results(place)
    again = run_in(place, RunOptions(), output="whole")
    assert again.code == 0
    columns = ["id", "token_ids", "token_logprobs", "cumulative_logprob"]
    assert have.select(columns).equals(results(place, "whole").select(columns))


def test_slices_score_what_a_whole_run_scores(place: Place) -> None:
    for shard in range(3):
        place.write_parquet(f"in/{shard}.parquet", rows(30).slice(10 * shard, 10))
    assert run_in(place, RunOptions(slice=(1, 2))).code == 0
    assert {"0.parquet", "2.parquet"} <= set(place.names("out"))
    assert not {"1.parquet", "_SUCCESS"} & set(place.names("out"))
    assert run_in(place, RunOptions(slice=(2, 2))).code == 0
    success = json.loads(Path(place.url("out/_SUCCESS")).read_text())
    assert (success["rows"], success["rows_failed"]) == (30, 0)
    assert success["scored_tokens"] > 0
    assert run_in(place, output="whole").code == 0
    whole = results(place, "whole")
    columns = ["id", "token_ids", "token_logprobs", "cumulative_logprob", "num_text_bytes"]
    assert results(place).select(columns).equals(whole.select(columns))


def test_a_run_of_scoring_is_not_forecast(place: Place) -> None:
    place.write_parquet("in/a.parquet", rows(3))
    path = write_job(Path(place.root), score_job(place))
    ended = run(path, "--measure", "2", command=("plan",))
    assert ended.code == 2
    assert "read scored_tokens_per_s in the last line" in ended.stderr


def test_an_output_is_not_continued_with_another_stride(place: Place) -> None:
    place.write_parquet("in/a.parquet", rows(3))
    assert run_in(place).code == 0
    ended = run_in(place, score={"context": 8, "stride": 4})
    assert (ended.code, "score.stride: was 3, is 4" in ended.message) == (2, True)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"sampling": {"max_tokens": 3}}, "sampling.max_tokens: does not apply to task: score"),
        ({"task": "generate"}, "score.context: does not apply to task: generate"),
        ({"score": {"context": 8, "stride": 8}}, "must be less than score.context 8"),
        (
            {"prompt": {"column": "text", "on_too_long": "truncate_left"}},
            "a long text is scored in windows",
        ),
        (
            {"model": {"path": "x", "max_model_len": 7}},
            "8 is more than model.max_model_len 7",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(sections: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Job.model_validate(score_job(Place("x")) | sections)


def test_a_context_that_the_model_does_not_have_is_refused(place: Place) -> None:
    place.write_parquet("in/a.parquet", rows(3))
    ended = run_in(place, score={"context": 2049})
    assert (ended.code, "is more than the 2048 tokens" in ended.message) == (2, True)
    ended = run_in(place, score={"stride": 2048})
    assert (ended.code, "must be less than the context" in ended.message) == (2, True)


@pytest.mark.parametrize(
    ("frame", "problem"),
    [
        (rows(3), "'more'"),
        (rows(3).with_columns(more=pl.lit(1)), "score.completion_column: column 'more' is int"),
    ],
)
def test_a_completion_column_that_cannot_be_used_is_refused(
    frame: pl.DataFrame, problem: str, place: Place
) -> None:
    place.write_parquet("in/a.parquet", frame)
    ended = run_in(place, score={"completion_column": "more"})
    assert (ended.code, problem in ended.message) == (2, True), ended.message


def test_the_record_of_a_run_says_result_tokens_and_still_the_earlier_name(
    place: Place, tmp_path: Path
) -> None:
    """An output that an earlier version measured keeps its speed."""
    place.write_parquet("in/a.parquet", rows(12))
    assert run(write_job(tmp_path, score_job(place))).code == 0
    path = Path(place.url("out", "_batchinfer", "status", "0001.json"))
    record = json.loads(path.read_text())
    scored = results(place)["num_scored_tokens"].sum()
    assert record["result_tokens"] == record["completion_tokens"] == scored
    speed = read_output(place.url("out")).tokens_per_s()
    assert speed is not None and speed > 0
    path.write_text(json.dumps({k: v for k, v in record.items() if k != "result_tokens"}))
    assert read_output(place.url("out")).tokens_per_s() == speed


def test_the_commands_know_outputs_of_scoring(place: Place, tmp_path: Path) -> None:
    place.write_parquet("in/a.parquet", rows(12))
    path = write_job(tmp_path, score_job(place))
    for command in ("validate", "plan"):
        ended = run(path, command=(command,))
        assert ended.code == 0, ended.stderr
    assert "completions" not in ended.stdout
    ended = run(path)
    assert ended.code == 0, ended.stderr
    scored = results(place)["num_scored_tokens"].sum()
    assert ended.result["scored_tokens"] == scored
    assert not {"completion_tokens", "rows_cut", "rows_unparsed"} & ended.result.keys()
    shown = run(place.url("out"), command=("show",))
    assert (shown.code, "tokens scored, logprob -" in shown.stdout) == (0, True)
    assert run(place.url("out"), command=("status",)).code == 0
    measured = run(path, "--measure", "4", command=("plan",))
    assert (measured.code, "task: score" in measured.stderr) == (2, True)


def test_the_likeliest_tokens_are_those_of_each_token_of_its_window(place: Place) -> None:
    """Also of a window's last token where it fills the model; the first has none."""
    have = score(place, rows(20), score={"context": 8, "stride": 3, "top_logprobs": 2})
    for row in have.iter_rows(named=True):
        ids = np.array(row["token_ids"], np.int32)
        wanted_ids, wanted = prompt_tops(ids, 2)
        assert row["top_token_ids"] == [[], *wanted_ids[1:].tolist()]
        assert row["top_logprobs"] == [[], *wanted[1:].tolist()]
    plain = score(place, rows(20), "plain")
    assert "top_logprobs" not in plain.columns
    assert plain["token_logprobs"].equals(have["token_logprobs"])


def test_the_likeliest_tokens_of_a_window_that_fills_the_model_are_all_there(place: Place) -> None:
    model = {"max_model_len": 8}
    tops = {"context": 8, "stride": 3, "top_logprobs": 2}
    have = score(place, rows(20), model=model, score=tops)
    for ids, tops in zip(have["token_ids"], have["top_token_ids"], strict=True):
        assert [len(top) for top in tops] == [0, *[2] * (len(ids) - 1)]
    assert have["error_type"].null_count() == 20


def test_an_engine_without_likeliest_tokens_is_an_error() -> None:
    chunk = Chunk.of_prompts([np.arange(5, dtype=np.int32)])
    task = Score(ScoreSettings(top_logprobs=2))
    work = task.work(WorkItem(chunk, 0, 0), 8)
    (ask,) = work.asks()
    with pytest.raises(RowError, match="did not give the likeliest tokens"):
        work.add(ask, answer(ask))
