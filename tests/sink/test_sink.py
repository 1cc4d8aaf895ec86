"""Completions become Arrow and Parquet: every value in its place, readable by others."""

from __future__ import annotations

import io
import random
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.config import SamplingSettings
from batchinfer.engine.base import Timing
from batchinfer.engine.demands.completion import Completion
from batchinfer.plan import Chunk
from batchinfer.sink import build_table, file_facts, output_schema, write_table
from batchinfer.tasks import Generate, Result

TASK = Generate(SamplingSettings(logprobs=1, prompt_logprobs=True))
SCHEMA = output_schema([pa.field("id", pa.string())], TASK.columns)
SAMPLES = 2


def chunk_of(first_row: int, num_rows: int) -> Chunk:
    rows = np.arange(first_row, first_row + num_rows, dtype=np.int64)
    lengths = rows % 3  # a prompt without tokens is one that could not be made
    return Chunk(
        shard="a.parquet",
        window=0,
        rows=rows,
        token_ids=np.zeros(lengths.sum(), np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        carried=pa.table({"id": [f"id-{row}" for row in rows]}),
        errors={},
        is_todo=np.ones((num_rows, SAMPLES), dtype=np.bool_),
    )


def completion_of(number: int, **fields: Any) -> Completion:
    """`number` tokens; at token i the i + 1 likeliest, which differ from one to the next."""
    widths = np.arange(1, number + 1)
    tops = np.arange(widths.sum())
    return Completion(
        key=number,
        token_ids=np.arange(number, dtype=np.int32) + 1000,
        num_text_tokens=number,
        finish_reason="length",
        num_cached_tokens=number,
        token_logprobs=-np.arange(number, dtype=np.float32) / 8,
        top_offsets=np.concatenate([[0], np.cumsum(widths)]).astype(np.int32),
        top_token_ids=tops.astype(np.int32),
        top_logprobs=-tops.astype(np.float32),
        prompt_token_logprobs=np.full(2, -1.5, np.float32),
        timing=Timing(1.0, None, 3.0, 4.0),
        **fields,
    )


def failed() -> Completion:
    return Completion(key=0, error_type="engine_error", error_message="broken")


def table_of(results: list[Result], schema: pa.Schema = SCHEMA) -> pa.Table:
    return build_table(
        results,
        schema,
        run=7,
        detokenize=lambda flat, offsets: [
            f"{flat[start:end].tolist()}" for start, end in pairwise(offsets)
        ],
        task=TASK,
    )


@pytest.fixture
def results() -> list[Result]:
    """Of two chunks, both samples of each row, in any order; every fifth has failed."""
    chunks = [chunk_of(0, 5), chunk_of(5, 4)]
    made = [
        Result(
            chunk,
            index,
            sample,
            failed() if (row := int(chunk.rows[index])) % 5 == 3 else completion_of(row % 4),
            finished_at_us=1_000_000 * row,
            duplicate_of=0 if row == 4 else None,
        )
        for chunk in chunks
        for index in range(len(chunk.rows))
        for sample in range(SAMPLES)
    ]
    random.Random(0).shuffle(made)
    return made


def test_every_value_is_in_the_row_of_its_result(results: list[Result]) -> None:
    rows = table_of(results).to_pylist()
    assert [(r["row"], r["sample"]) for r in rows] == [(n // 2, n % 2) for n in range(18)]
    for found in rows:
        row = found["row"]
        assert found["id"] == f"id-{row}"
        assert found["shard"] == "a.parquet"
        assert found["attempt"] == 7
        assert found["num_prompt_tokens"] == (row % 3 or None)
        assert found["finished_at"].timestamp() == row
        assert found["duplicate_of"] == (0 if row == 4 else None)
        if row % 5 == 3:
            assert found["error_type"] == "engine_error"
            empty = ("completion", "token_ids", "token_logprobs", "cumulative_logprob", "total_s")
            empty += ("top_token_ids", "top_logprobs", "num_completion_tokens")
            assert [found[name] for name in empty] == [None] * len(empty)
            continue
        number = row % 4
        tops = [list(range(i * (i + 1) // 2, (i + 1) * (i + 2) // 2)) for i in range(number)]
        assert found["token_ids"] == [1000 + i for i in range(number)]
        assert found["completion"] == str(found["token_ids"])
        assert found["num_completion_tokens"] == found["num_cached_tokens"] == number
        assert found["token_logprobs"] == [-i / 8 for i in range(number)]
        assert found["cumulative_logprob"] == sum(found["token_logprobs"])
        assert found["top_token_ids"] == tops
        assert found["top_logprobs"] == [[-float(t) for t in at_token] for at_token in tops]
        assert found["prompt_token_logprobs"] == [-1.5, -1.5]
        times = ("queued_s", "prefill_s", "decode_s", "total_s")
        assert [found[name] for name in times] == [1.0, None, 3.0, 4.0]


def test_results_without_logprobs_or_without_any_token_make_a_table_too() -> None:
    chunk = chunk_of(0, 3)
    bare = Completion(key=0, token_ids=np.array([5], np.int32), num_text_tokens=1)
    for done in ([failed()] * 3, [bare] * 3, [bare, completion_of(0), failed()]):
        found = table_of([Result(chunk, i, 0, c, 0) for i, c in enumerate(done)])
        assert found.column("cumulative_logprob").to_pylist() == [
            None if c.token_logprobs is None else 0.0 for c in done
        ]
        assert found.column("top_logprobs").to_pylist() == [
            None if c.top_logprobs is None else [] for c in done
        ]


def test_a_sum_of_logprobs_does_not_depend_on_the_rows_beside_it() -> None:
    random_logprobs = -np.random.default_rng(0).exponential(size=(40, 700)).astype(np.float32)
    chunk = chunk_of(0, 40)
    results = []
    for index, logprobs in enumerate(random_logprobs):
        completion = Completion(key=index, token_logprobs=logprobs[: 700 - 13 * index])
        results.append(Result(chunk, index, 0, completion, 0))
    together = table_of(results).column("cumulative_logprob").to_pylist()
    alone = [table_of([r]).column("cumulative_logprob")[0].as_py() for r in results]
    assert together == alone
    assert together[0] == pytest.approx(random_logprobs[0].sum(dtype=np.float64), rel=1e-12)


def test_polars_and_pyarrow_read_what_is_written(results: list[Result]) -> None:
    table = table_of(results * 50)
    sink = io.BytesIO()
    write_table(sink, table, {"digest": "ours"})
    file = pq.ParquetFile(io.BytesIO(sink.getvalue()))
    assert file_facts(file.metadata) == {"digest": "ours"}
    assert file.read().cast(SCHEMA).equals(table)
    assert pl.read_parquet(io.BytesIO(sink.getvalue())).equals(pl.DataFrame(table))


def test_a_result_says_how_much_memory_it_holds() -> None:
    chunk = chunk_of(0, 1)
    small, large = (Result(chunk, 0, 0, completion_of(n), 0).size_bytes for n in (0, 100))
    num_bytes = 100 * (4 + 4 + 4) + 5050 * (4 + 4)  # token, logprob, offset; then each top entry
    assert large - small == num_bytes
    assert small > chunk.carried_row_bytes
