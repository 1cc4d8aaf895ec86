"""Two finished outputs over the same rows, side by side.

Must not know: which is better. Invariant: rows are compared only if both outputs have the same
rows of the same shards; scored rows only if they are of the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.errors import ConfigError, InputError
from batchinfer.evaluation.divergence import Tops
from batchinfer.evaluation.outputs import Output
from batchinfer.tasks.scoring_windows import MAX_LOGPROB

KEYS = ("row", "sample")
TOPS = ("top_token_ids", "top_logprobs")


def joined(
    one: Output, other: Output, columns: Sequence[str]
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Tables of the same rows in the same order. Raises ConfigError if the outputs differ in rows.

    Both have `columns` and `error_type`; failed rows are still there.
    """
    if list(one.keys) != list(other.keys):
        raise ConfigError(
            f"{one.url} and {other.url} are not of the same input: the first has {one.keys[0]}, "
            f"the other {other.keys[0]} among {len(one.keys)} and {len(other.keys)} files"
        )
    wanted = [*KEYS, "error_type", *columns]
    tables = zip(one.keys, one.tables(wanted), other.tables(wanted), strict=True)
    for key, left, right in tables:
        if not left.select(KEYS).equals(right.select(KEYS)):
            raise ConfigError(
                f"{one.url} and {other.url} have other rows of {key}: {left.num_rows} and "
                f"{right.num_rows}; compare outputs of jobs with the same input and filter"
            )
        yield left.combine_chunks(), right.combine_chunks()


def both_succeeded(left: pa.Table, right: pa.Table) -> pa.ChunkedArray:
    """Where neither row is an error."""
    return pc.and_(pc.is_null(left["error_type"]), pc.is_null(right["error_type"]))


def check_same_tokens(
    one: Output, other: Output, left: pa.ChunkedArray, right: pa.ChunkedArray
) -> None:
    """Raise ConfigError unless both columns of token ids are equal: else nothing compares."""
    if same_lists(left, right):
        return
    raise ConfigError(
        f"{other.url} has other tokens than {one.url}, of other windows or another text"
    )


def same_lists(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    """Whether two columns have the same lists, whatever their values are called inside."""
    lengths = [pc.list_value_length(column).to_numpy() for column in (one, other)]
    return np.array_equal(*lengths) and np.array_equal(
        *(_flat(column).to_numpy() for column in (one, other))
    )


def tops_of(output: Output, table: pa.Table) -> Tops:
    """Likeliest tokens at all scored tokens, flat. Raises ConfigError if positions do not match."""
    token_logprobs = _flat(table["token_logprobs"])
    is_scored = token_logprobs.is_valid().to_numpy(zero_copy_only=False)
    ids, logprobs = (_flat(table[name]) for name in TOPS)
    lengths = pc.list_value_length(ids).to_numpy(zero_copy_only=False)[is_scored]
    if not len(lengths) or lengths.min() != lengths.max() or not lengths.max():
        raise InputError(
            f"{output.url}: its positions do not all have the same number of top tokens"
        )
    k = int(lengths[0])
    if int(pc.sum(pc.list_value_length(ids)).as_py()) != k * len(lengths):
        raise InputError(f"{output.url}: tokens without a logprob have top tokens")
    tops = Tops(
        ids.flatten().to_numpy().reshape(-1, k),
        logprobs.flatten().to_numpy().reshape(-1, k),
        token_logprobs.drop_null().to_numpy(),
    )
    # Tokens that a model rules out have -inf, and may be among the likeliest; the scored ones not.
    is_sound = (tops.logprobs <= MAX_LOGPROB).all() and np.isfinite(tops.token_logprobs).all()
    if not is_sound or (tops.token_logprobs > MAX_LOGPROB).any():
        raise InputError(
            f"{output.url} has log-probabilities that are not numbers or above 0, which no model "
            "gives: the file is damaged, run its job again with --restart"
        )
    return tops


def scored_token_ids(table: pa.Table) -> npt.NDArray[np.int32]:
    """Flat, of the tokens that have a logprob."""
    ids: npt.NDArray[np.int32] = _flat(table["token_ids"]).to_numpy()
    is_scored = _flat(table["token_logprobs"]).is_valid().to_numpy(zero_copy_only=False)
    scored: npt.NDArray[np.int32] = ids[is_scored]
    return scored


def require_tops(output: Output) -> None:
    """Raise ConfigError unless the output has likeliest tokens."""
    if output.task != "score" or not (output.job.get("score") or {}).get("top_logprobs"):
        raise ConfigError(
            f"{output.url} has no likeliest tokens to compare: compute it with task: score and "
            "score.top_logprobs (`perplexity --top-k`)"
        )


def _flat(column: pa.ChunkedArray) -> Any:
    """The lists' values, of all rows. A column of one chunk or none."""
    flat = column.combine_chunks()
    return flat.flatten()
