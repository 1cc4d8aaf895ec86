"""A measurement beside the finished output of a reference model on the same tokens.

Must not know: how either was computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyarrow as pa

from batchinfer.errors import ConfigError
from batchinfer.evaluation.divergence import kl_divergence, top1_agrees
from batchinfer.evaluation.outputs import Output, read_output, refuse_failed
from batchinfer.evaluation.pairs import (
    TOPS,
    check_same_tokens,
    joined,
    require_tops,
    same_lists,
    scored_token_ids,
    tops_of,
)
from batchinfer.evaluation.tokenizers import check_same_tokenizer, of_model, of_output
from batchinfer.evaluation.windows import SCORED, TextWindows
from batchinfer.model import ModelFacts

COLUMNS = ("token_ids", "token_logprobs", *TOPS)


@dataclass(frozen=True, slots=True)
class Closeness:
    """Means over all scored tokens."""

    kl: float  # nats
    top_k: int  # likeliest tokens that it was computed from
    top1_agreement: float  # share, 0 to 1
    num_tokens: int


def open_reference(location: str) -> Output:
    """`location`: as of `read_output`. Raises ConfigError, InputError."""
    output = read_output(location)
    require_tops(output)
    refuse_failed(output)
    return output


def check_reference(reference: Output, windows: TextWindows, model: ModelFacts) -> None:
    """Raise ConfigError unless the reference scored these windows, with the model's vocabulary.

    Before anything is computed.
    """
    ours = windows.table[SCORED]
    theirs = pa.concat_tables(reference.tables(["token_ids", "top_token_ids"]))
    check_same_tokenizer(of_output(reference), of_model(model))
    if not same_lists(theirs["token_ids"], ours):
        raise ConfigError(
            f"the reference {reference.url} has other tokens: it is of another text, context, "
            "stride or number of windows"
        )
    top_token_ids = theirs["top_token_ids"].combine_chunks().flatten().flatten()
    largest = int(top_token_ids.to_numpy().max(initial=0))
    if largest >= model.vocab_size:
        raise ConfigError(
            f"the reference {reference.url} gives token {largest}, and {model.path} has a "
            f"vocabulary of {model.vocab_size}: distributions over different vocabularies "
            "cannot be compared"
        )


def closeness(reference: Output, output: Output) -> Closeness:
    """How near `output` is to the reference, over all tokens. Raises ConfigError, InputError."""
    kl: list[float] = []
    agreeing = num_tokens = 0
    top_k = 0
    for left, right in joined(reference, output, COLUMNS):
        check_same_tokens(reference, output, left["token_ids"], right["token_ids"])
        one, other = tops_of(reference, left), tops_of(output, right)
        kl.append(math.fsum(kl_divergence(scored_token_ids(left), one, other)))
        agreeing += int(top1_agrees(one, other).sum())
        num_tokens += len(one.token_logprobs)
        top_k = min(one.k, other.k)
    return Closeness(math.fsum(kl) / num_tokens, top_k, agreeing / num_tokens, num_tokens)
