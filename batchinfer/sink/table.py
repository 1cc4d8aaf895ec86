"""Results of one window -> one Arrow table, sorted by (row, sample).

Must not know: files. Token data goes from the engine's flat numpy arrays to Arrow by concatenation:
no Python object for a token. Text is detokenized here, in bulk, unless the engine had to do it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchinfer.engine.base import Completion
from batchinfer.plan import Chunk

#: token ids (flat), offsets [n + 1] -> n texts
Detokenize = Callable[[npt.NDArray[np.int32], npt.NDArray[np.int64]], list[str]]


@dataclass(slots=True, eq=False)
class Result:
    """A completion with its place: row `index` of `chunk`, sample `sample`."""

    chunk: Chunk
    index: int
    sample: int
    completion: Completion
    finished_at_us: int  # microseconds since the epoch
    duplicate_of: int | None = None  # row number
    #: About what it holds in memory until it is durable, its row's columns included.
    size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        completion = self.completion
        self.size_bytes = 600 + self.chunk.carried_row_bytes
        for array in (
            completion.token_ids,
            completion.token_logprobs,
            completion.top_token_ids,
            completion.top_logprobs,
            completion.prompt_token_logprobs,
        ):
            if array is not None:
                self.size_bytes += array.nbytes


def build_table(
    results: Sequence[Result],
    schema: pa.Schema,
    *,
    run: int,
    detokenize: Detokenize,
    parse_json: bool,
) -> pa.Table:
    """All columns of `schema` for results of one shard, sorted by (row, sample)."""
    results = _sorted(results)
    done = [r.completion for r in results]
    is_error = np.array([c.error_type is not None for c in done], dtype=np.bool_)
    texts = _texts(done, is_error, detokenize)
    num_prompt_tokens = _of_rows(results, lambda c: np.diff(c.offsets).astype(np.int32))
    token_logprobs = _lists([c.token_logprobs for c in done], np.float32)
    columns: dict[str, Any] = {
        "shard": pa.repeat(pa.scalar(results[0].chunk.shard, pa.string()), len(results)),
        "row": pa.array(_of_rows(results, lambda c: c.rows), pa.int64()),
        "sample": pa.array([r.sample for r in results], pa.int32()),
        "completion": pa.array(texts, pa.string()),
        "parsed": pa.array([_valid_json(t) if parse_json else None for t in texts], pa.string()),
        "finish_reason": pa.array([c.finish_reason for c in done], pa.string()),
        "stop_reason": pa.array([c.stop_reason for c in done], pa.string()),
        "num_prompt_tokens": pa.array(num_prompt_tokens, mask=num_prompt_tokens == 0),
        "num_cached_tokens": _ints([c.num_cached_tokens for c in done], is_error),
        "num_completion_tokens": _ints([len(c.token_ids) for c in done], is_error),
        "token_ids": _lists([None if c.error_type else c.token_ids for c in done], np.int32),
        "token_logprobs": token_logprobs,
        "cumulative_logprob": _sums(token_logprobs),
        "queued_s": pa.array([c.timing.queued_s for c in done], pa.float32()),
        "prefill_s": pa.array([c.timing.prefill_s for c in done], pa.float32()),
        "decode_s": pa.array([c.timing.decode_s for c in done], pa.float32()),
        "total_s": pa.array([c.timing.total_s for c in done], pa.float32()),
        "finished_at": pa.array([r.finished_at_us for r in results], pa.timestamp("us", tz="UTC")),
        "attempt": pa.repeat(pa.scalar(run, pa.int32()), len(results)),
        "duplicate_of": pa.array([r.duplicate_of for r in results], pa.int64()),
        "error_type": pa.array([c.error_type for c in done], pa.string()),
        "error_message": pa.array([c.error_message for c in done], pa.string()),
    }
    if "top_token_ids" in schema.names:
        columns["top_token_ids"], columns["top_logprobs"] = _top_lists(done)
    if "prompt_token_logprobs" in schema.names:
        columns["prompt_token_logprobs"] = _lists(
            [c.prompt_token_logprobs for c in done], np.float32
        )
    carried = _carried(results)
    arrays = [carried[f.name] if f.name in carried else columns[f.name] for f in schema]
    return pa.table(arrays, schema=schema)


def _sorted(results: Sequence[Result]) -> list[Result]:
    """In the order of (row, sample)."""
    rows = _of_rows(results, lambda c: c.rows)
    samples = np.array([r.sample for r in results], np.int64)
    return [results[i] for i in np.lexsort((samples, rows)).tolist()]


def _of_rows(
    results: Sequence[Result], column_of: Callable[[Chunk], npt.NDArray[Any]]
) -> npt.NDArray[Any]:
    """What `column_of` a chunk has for each result's row; one look-up for results that follow each
    other in a chunk. [n]
    """
    taken = []
    for _, group in groupby(results, key=_chunk_id):
        of_chunk = list(group)
        taken.append(column_of(of_chunk[0].chunk)[[r.index for r in of_chunk]])
    return np.concatenate(taken)


def _chunk_id(result: Result) -> int:
    return id(result.chunk)


def _carried(results: Sequence[Result]) -> dict[str, pa.ChunkedArray]:
    """The id and kept columns of the results' rows; they may come from several chunks of the
    window.

    One take for each chunk: a take from several at once copies them whole first.
    """
    taken = []
    for _, group in groupby(results, key=_chunk_id):
        of_chunk = list(group)
        indices = pa.array([r.index for r in of_chunk], pa.int64())
        taken.append(of_chunk[0].chunk.carried.take(indices))
    table = pa.concat_tables(taken)
    return dict(zip(table.column_names, table.columns, strict=True))


def _texts(
    done: list[Completion], is_error: npt.NDArray[np.bool_], detokenize: Detokenize
) -> list[str | None]:
    to_decode = [i for i, c in enumerate(done) if c.text is None and not is_error[i]]
    lengths = np.array([done[i].num_text_tokens for i in to_decode], dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    texts: list[str | None] = [c.text for c in done]
    if to_decode:
        flat = np.concatenate([done[i].token_ids[: done[i].num_text_tokens] for i in to_decode])
        for i, text in zip(to_decode, detokenize(flat, offsets), strict=True):
            texts[i] = text
    return texts


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")  # Python's reader takes NaN and Infinity


def _valid_json(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        json.loads(text, parse_constant=_no_constant)
    except ValueError:
        return None
    return text


def _sums(lists: pa.ListArray) -> pa.Array:
    """The sum of each list in double precision; null for a null list. [n]"""
    flat = lists.values.to_numpy().astype(np.float64)
    offsets = lists.offsets.to_numpy()
    sums = np.zeros(len(lists), np.float64)
    is_filled = offsets[1:] > offsets[:-1]  # reduceat takes no empty ranges
    if is_filled.any():
        sums[is_filled] = np.add.reduceat(flat, offsets[:-1][is_filled])
    return pa.array(sums, mask=lists.is_null().to_numpy(zero_copy_only=False))


def _ints(values: list[int], is_null: npt.NDArray[np.bool_]) -> pa.Array:
    return pa.array(np.array(values, dtype=np.int32), mask=is_null)


def _offsets(lengths: Sequence[int] | npt.NDArray[np.integer[Any]]) -> pa.Array:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.array(offsets)


def _flat(arrays: Sequence[npt.NDArray[Any] | None], dtype: type[np.generic]) -> pa.Array:
    present = [array for array in arrays if array is not None]
    flat = np.concatenate(present) if present else np.empty(0)
    return pa.array(flat.astype(dtype, copy=False))


def _lists(values: Sequence[npt.NDArray[Any] | None], dtype: type[np.generic]) -> pa.ListArray:
    """One list a row by concatenation; None is a null list."""
    is_null = pa.array([v is None for v in values], pa.bool_())
    offsets = _offsets([0 if v is None else len(v) for v in values])
    return pa.ListArray.from_arrays(offsets, _flat(values, dtype), mask=is_null)


def _top_lists(done: list[Completion]) -> tuple[pa.ListArray, pa.ListArray]:
    """list<list> of token ids and of logprobs: for each row, for each token, the k entries that
    `top_offsets` delimits.
    """
    is_null = pa.array([c.top_offsets is None for c in done], pa.bool_())
    present = [c.top_offsets for c in done if c.top_offsets is not None]
    num_bounds = np.array([len(offsets) for offsets in present], np.int64)
    bounds = np.concatenate([np.empty(0, np.int32), *present])
    is_token = np.ones(len(bounds), np.bool_)
    is_token[np.cumsum(num_bounds) - 1] = False  # the last bound of a row begins no token
    inner_offsets = _offsets(np.diff(bounds, append=0)[is_token])
    outer_offsets = _offsets([0 if c.top_offsets is None else len(c.top_offsets) - 1 for c in done])

    def nested(values: Sequence[npt.NDArray[Any] | None], dtype: type[np.generic]) -> pa.ListArray:
        inner = pa.ListArray.from_arrays(inner_offsets, _flat(values, dtype))
        return pa.ListArray.from_arrays(outer_offsets, inner, mask=is_null)

    return (
        nested([c.top_token_ids for c in done], np.int32),
        nested([c.top_logprobs for c in done], np.float32),
    )
