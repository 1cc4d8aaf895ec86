"""Two finished outputs over the same rows: how far they agree, and what each took.

Scored rows are compared by the difference of their negative log-likelihoods on the same tokens,
generated ones by their tokens. Must not know: how either was computed, terminals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from batchinfer.errors import ConfigError, InputError
from batchinfer.evaluation.divergence import kl_divergence, top1_agrees
from batchinfer.evaluation.intervals import ratio_interval
from batchinfer.evaluation.outputs import Output, logprobs_of, of_task, read_output
from batchinfer.evaluation.pairs import (
    TOPS,
    both_succeeded,
    check_same_tokens,
    joined,
    scored_token_ids,
    tops_of,
)
from batchinfer.evaluation.record import Frozen
from batchinfer.evaluation.tokenizers import check_same_tokenizer, of_output

_SCORED = ("token_ids", "token_logprobs", "cumulative_logprob", "num_scored_tokens")
_GENERATED = ("token_ids", "completion")


class Side(Frozen):
    """What one output took."""

    output: str
    model: str
    quantization: str
    tokens_per_s: float | None = None  # result tokens; None: unknown
    price_per_million_tokens: float | None = None  # at the price for an hour that was given


class Scored(Frozen):
    """Differences on the same tokens, in nats a token: the second output less the first."""

    tokens: int
    nll_one: float
    nll_other: float
    nll_difference: float
    nll_difference_low: float | None  # 95 % interval over rows; None: one row
    nll_difference_high: float | None
    perplexity_ratio: float  # exp(nll_difference)
    kl: float | None = None  # from the first; None: one of them has no likeliest tokens
    kl_top_k: int | None = None
    top1_agreement: float | None = None


class Generated(Frozen):
    """`agreement`s are shares, 0 to 1."""

    text_agreement: float  # of rows with the same completion
    token_agreement: float  # of tokens before the first that differs, of the longer completion
    tokens_one: int
    tokens_other: int


class Pair(Frozen):
    """`rows_left_out` failed in one output or both, and are in no figure."""

    task: str
    one: Side
    other: Side
    rows: int
    rows_left_out: int
    scored: Scored | None = None
    generated: Generated | None = None


def pair(one: str, other: str, *, price_per_hour: float | None = None) -> Pair:
    """Compare two outputs. Raises ConfigError for outputs that are not of the same rows or tokens.

    `price_per_hour`: of the machine that computed them.
    """
    first, second = read_output(one), read_output(other)
    if first.task != second.task:
        raise ConfigError(
            f"{first.url} is an output of task {first.task}, {second.url} of {second.task}: "
            "they cannot be compared"
        )
    totals = of_task(_COMPARISONS, first)(first, second)
    if first.task == "score":
        check_same_tokenizer(of_output(first), of_output(second))
    rows = left_out = 0
    for left, right in joined(first, second, totals.columns):
        kept = both_succeeded(left, right)
        left_out += left.num_rows
        left, right = left.filter(kept), right.filter(kept)
        rows, left_out = rows + left.num_rows, left_out - left.num_rows
        if left.num_rows:
            totals.add(left.combine_chunks(), right.combine_chunks())
    if not rows:
        raise InputError(f"no row succeeded both in {first.url} and in {second.url}")
    found = totals.found()
    return Pair(
        task=first.task,
        one=_side(first, price_per_hour),
        other=_side(second, price_per_hour),
        rows=rows,
        rows_left_out=left_out,
        scored=found if isinstance(found, Scored) else None,
        generated=found if isinstance(found, Generated) else None,
    )


def _side(output: Output, price_per_hour: float | None) -> Side:
    speed = output.tokens_per_s()
    price = None
    if speed and price_per_hour is not None:
        price = price_per_hour / 3600 / speed * 1e6
    return Side(
        output=output.url,
        model=str((output.job.get("model") or {}).get("path")),
        quantization=str(output.model.get("quantization")),
        tokens_per_s=speed,
        price_per_million_tokens=price,
    )


@dataclass(slots=True)
class _Scores:
    one: Output
    other: Output
    nll: list[np.ndarray] = field(default_factory=list)  # [rows, (one, other, tokens)]
    kl: list[float] = field(default_factory=list)
    agreeing: int = 0
    top_k: int = 0

    @property
    def has_tops(self) -> bool:
        return all((o.job.get("score") or {}).get("top_logprobs") for o in (self.one, self.other))

    @property
    def columns(self) -> tuple[str, ...]:
        return (*_SCORED, *TOPS) if self.has_tops else _SCORED

    def add(self, left: pa.Table, right: pa.Table) -> None:
        check_same_tokens(self.one, self.other, left["token_ids"], right["token_ids"])
        one, num_tokens = logprobs_of(self.one, left)
        other, _ = logprobs_of(self.other, right)
        self.nll.append(np.stack([one, other, num_tokens], axis=1))
        if self.has_tops and self.nll[-1][:, 2].any():  # else rows of one token: no top tokens
            tops = tops_of(self.one, left), tops_of(self.other, right)
            self.kl.append(math.fsum(kl_divergence(scored_token_ids(left), *tops)))
            self.agreeing += int(top1_agrees(*tops).sum())
            self.top_k = min(top.k for top in tops)

    def found(self) -> Scored:
        one, other, num_tokens = np.concatenate(self.nll).T
        total = num_tokens.sum()
        if not total:
            raise InputError(f"{self.one.url} has no scored token")
        difference = math.fsum(one - other) / total
        low, high = ratio_interval(one - other, num_tokens) or (None, None)
        return Scored(
            tokens=int(total),
            nll_one=-math.fsum(one) / total,
            nll_other=-math.fsum(other) / total,
            nll_difference=difference,
            nll_difference_low=low,
            nll_difference_high=high,
            perplexity_ratio=math.exp(min(difference, 700.0)),
            kl=math.fsum(self.kl) / total if self.has_tops else None,
            kl_top_k=self.top_k or None,
            top1_agreement=self.agreeing / total if self.has_tops else None,
        )


@dataclass(slots=True)
class _Texts:
    one: Output
    other: Output
    rows: int = 0
    equal: int = 0
    common: int = 0
    longer: int = 0
    tokens: tuple[int, int] = (0, 0)
    columns: tuple[str, ...] = _GENERATED

    def add(self, left: pa.Table, right: pa.Table) -> None:
        self.rows += left.num_rows
        texts = zip(left["completion"].to_pylist(), right["completion"].to_pylist(), strict=True)
        self.equal += sum(one == other for one, other in texts)
        ids = zip(left["token_ids"], right["token_ids"], strict=True)
        for one, other in ((a.values.to_numpy(), b.values.to_numpy()) for a, b in ids):
            shorter = min(len(one), len(other))
            differs = np.flatnonzero(one[:shorter] != other[:shorter])
            self.common += int(differs[0]) if len(differs) else shorter
            self.longer += max(len(one), len(other))
            self.tokens = (self.tokens[0] + len(one), self.tokens[1] + len(other))

    def found(self) -> Generated:
        return Generated(
            text_agreement=self.equal / self.rows,
            token_agreement=self.common / self.longer if self.longer else 1.0,
            tokens_one=self.tokens[0],
            tokens_other=self.tokens[1],
        )


#: How two outputs of a task are compared.
_COMPARISONS: Mapping[str, Callable[[Output, Output], _Scores | _Texts]] = {
    "generate": _Texts,
    "score": _Scores,
}
