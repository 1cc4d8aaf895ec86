"""Results of one window -> one Arrow table, sorted by (row, sample).

Must not know: files. Token data goes from the engine's flat numpy arrays to Arrow by concatenation:
no Python object for a token. Text is detokenized here, in bulk, unless the engine had to do it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

    @property
    def size_bytes(self) -> int:
        """About what the result holds in memory until it is durable, its row's columns included."""
        completion = self.completion
        arrays = (
            completion.token_ids,
            completion.token_logprobs,
            completion.top_token_ids,
            completion.top_logprobs,
            completion.prompt_token_logprobs,
        )
        return (
            600
            + self.chunk.carried_row_bytes
            + sum(array.nbytes for array in arrays if array is not None)
        )


def build_table(
    results: Sequence[Result],
    schema: pa.Schema,
    *,
    run: int,
    detokenize: Detokenize,
    parse_json: bool,
) -> pa.Table:
    """All columns of `schema` for results of one shard, sorted by (row, sample)."""
    results = sorted(results, key=lambda r: (int(r.chunk.rows[r.index]), r.sample))
    done = [r.completion for r in results]
    is_error = np.array([c.error_type is not None for c in done], dtype=np.bool_)
    texts = _texts(done, is_error, detokenize)
    num_prompt_tokens = [r.chunk.num_prompt_tokens(r.index) for r in results]
    columns: dict[str, Any] = {
        "shard": pa.repeat(pa.scalar(results[0].chunk.shard, pa.string()), len(results)),
        "row": pa.array([int(r.chunk.rows[r.index]) for r in results], pa.int64()),
        "sample": pa.array([r.sample for r in results], pa.int32()),
        "completion": pa.array(texts, pa.string()),
        "parsed": pa.array([_valid_json(t) if parse_json else None for t in texts], pa.string()),
        "finish_reason": pa.array([c.finish_reason for c in done], pa.string()),
        "stop_reason": pa.array([c.stop_reason for c in done], pa.string()),
        "num_prompt_tokens": pa.array([n or None for n in num_prompt_tokens], pa.int32()),
        "num_cached_tokens": _ints([c.num_cached_tokens for c in done], is_error),
        "num_completion_tokens": _ints([len(c.token_ids) for c in done], is_error),
        "token_ids": _lists([None if c.error_type else c.token_ids for c in done], np.int32),
        "token_logprobs": _lists([c.token_logprobs for c in done], np.float32),
        "cumulative_logprob": pa.array([_sum(c.token_logprobs) for c in done], pa.float64()),
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
        columns["top_token_ids"] = _nested(done, [c.top_token_ids for c in done], np.int32)
        columns["top_logprobs"] = _nested(done, [c.top_logprobs for c in done], np.float32)
    if "prompt_token_logprobs" in schema.names:
        columns["prompt_token_logprobs"] = _lists(
            [c.prompt_token_logprobs for c in done], np.float32
        )
    carried = _carried(results)
    arrays = [carried[f.name] if f.name in carried else columns[f.name] for f in schema]
    return pa.table(arrays, schema=schema)


def _carried(results: Sequence[Result]) -> dict[str, pa.ChunkedArray]:
    """The id and kept columns of the results' rows; they may come from several chunks of the
    window.

    One take for each chunk: a take from several at once copies them whole first.
    """
    taken = []
    for _, group in groupby(results, key=lambda r: id(r.chunk)):
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


def _sum(logprobs: npt.NDArray[np.float32] | None) -> float | None:
    return None if logprobs is None else float(logprobs.sum(dtype=np.float64))


def _ints(values: list[int], is_null: npt.NDArray[np.bool_]) -> pa.Array:
    return pa.array(np.array(values, dtype=np.int32), mask=is_null)


def _offsets(lengths: list[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _lists(values: Sequence[npt.NDArray[Any] | None], dtype: type[np.generic]) -> pa.ListArray:
    """One list a row by concatenation; None is a null list."""
    present = [v for v in values if v is not None]
    flat = np.concatenate(present).astype(dtype, copy=False) if present else np.empty(0, dtype)
    is_null = pa.array([v is None for v in values], pa.bool_())
    offsets = _offsets([0 if v is None else len(v) for v in values])
    return pa.ListArray.from_arrays(offsets, pa.array(flat), mask=is_null)


def _nested(
    done: list[Completion], values: Sequence[npt.NDArray[Any] | None], dtype: type[np.generic]
) -> pa.ListArray:
    """list<list>: for each row, for each token, the k entries that `top_offsets` delimits."""
    present = [v for v in values if v is not None]
    flat = np.concatenate(present).astype(dtype, copy=False) if present else np.empty(0, dtype)
    widths = [np.diff(c.top_offsets) for c in done if c.top_offsets is not None]
    inner_lengths = np.concatenate(widths) if widths else np.empty(0, np.int32)
    inner_offsets = np.concatenate([[0], np.cumsum(inner_lengths)]).astype(np.int32)
    inner = pa.ListArray.from_arrays(pa.array(inner_offsets), pa.array(flat))
    outer_lengths = [0 if c.top_offsets is None else len(c.top_offsets) - 1 for c in done]
    is_null = pa.array([c.top_offsets is None for c in done], pa.bool_())
    return pa.ListArray.from_arrays(_offsets(outer_lengths), inner, mask=is_null)
