"""What a score output comes to: sums over its rows, and the record of a measurement.

Must not know: who computed it, files other than the output's.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass

import numpy as np

from batchinfer import __version__
from batchinfer.errors import ConfigError
from batchinfer.evaluation.bits import StoredBits
from batchinfer.evaluation.intervals import Float64Array, ratio_interval
from batchinfer.evaluation.outputs import Output, logprobs_of, refuse_failed
from batchinfer.evaluation.record import PerplexityRequest, Record
from batchinfer.evaluation.reference import Closeness
from batchinfer.evaluation.windows import NUM_BYTES, TextWindows
from batchinfer.tasks.scoring_windows import MAX_LOGPROB

logger = logging.getLogger("batchinfer.evaluation")

#: exp() of more is infinite. A model that guesses has log(vocabulary), about 12.
_MAX_NLL = 700.0


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Sums over each row of a score output, in order. `num_bytes` is 0 where it is unknown."""

    nll: Float64Array  # [n], nats: the sum over the row's scored tokens
    num_tokens: Float64Array  # [n], scored
    num_bytes: Float64Array  # [n]


def scored_rows(output: Output, bytes_column: str) -> ScoredRows:
    """Raises InputError for failed or damaged rows, ConfigError for another task's output."""
    if output.task != "score":
        raise ConfigError(f"{output.url} is an output of task {output.task}, not of score")
    refuse_failed(output)
    parts = []
    for table in output.tables(["row", "cumulative_logprob", "num_scored_tokens", bytes_column]):
        num_bytes = table[bytes_column].fill_null(0).to_numpy().astype(np.float64)
        parts.append((*logprobs_of(output, table), num_bytes))
    logprob, num_tokens, num_bytes = (np.concatenate(column) for column in zip(*parts, strict=True))
    return ScoredRows(-logprob, num_tokens, num_bytes)


def mean_nll(totals: ScoredRows, what: str) -> float:
    """The mean over tokens, in nats. Raises ConfigError if that gives no perplexity."""
    num_tokens = totals.num_tokens.sum()
    if not num_tokens:
        raise ConfigError(f"{what} has no scored token")
    nll = math.fsum(totals.nll) / float(num_tokens)
    if not -MAX_LOGPROB <= nll < _MAX_NLL:
        raise ConfigError(
            f"{what}: the mean negative log-likelihood of a token is {nll}, which no working model "
            "has: its weights or its quantization are damaged"
        )
    return nll


@dataclass(frozen=True, slots=True)
class RecordInputs:
    """All that a record is made of."""

    windows: TextWindows
    output: Output
    bits: StoredBits
    tokenizer_digest: str
    closeness: Closeness | None  # to the reference


def record_of(request: PerplexityRequest, found: RecordInputs) -> Record:
    windows, output, near = found.windows, found.output, found.closeness
    totals = scored_rows(output, NUM_BYTES)
    nll = mean_nll(totals, request.label)
    interval = ratio_interval(totals.nll, totals.num_tokens)
    if interval is None:
        logger.warning(
            "one window only, so the perplexity has no interval: how much it depends on the choice "
            "of text is unknown. Take a longer text, more windows or less context"
        )
    low, high = (None, None) if interval is None else (math.exp(bound) for bound in interval)
    engine = output.engine
    quantization = str(output.model.get("quantization", request.quantization))
    dtype = str(engine.get("dtype") or output.model["dtype"])
    return Record(
        label=request.label,
        family=request.family or _family(request, quantization, dtype),
        model=request.model,
        quantization=quantization,
        dtype=dtype,
        engine=" ".join(str(engine[key]) for key in ("name", "version") if key in engine) or None,
        device=engine.get("device"),
        settings=_settings_text(request),
        data=request.data,
        context=request.context,
        stride=request.stride,
        windows=windows.num_windows,
        tokens=int(totals.num_tokens.sum()),
        bytes_of_text=windows.num_bytes or None,
        nll=nll,
        perplexity=math.exp(nll),
        perplexity_low=low,
        perplexity_high=high,
        bits_per_byte=bits_per_byte(totals),
        layer_bits_per_weight=found.bits.layers,
        head_bits_per_weight=found.bits.head,
        model_bytes=found.bits.num_bytes,
        peak_memory_bytes=output.loaded.get("peak_bytes"),
        tokens_per_s=output.tokens_per_s(),
        kl=near.kl if near else None,
        kl_top_k=near.top_k if near else None,
        top1_agreement=near.top1_agreement if near else None,
        reference=request.reference,
        tokenizer_digest=found.tokenizer_digest,
        data_digest=windows.digest,
        batchinfer_version=__version__,
    )


def _settings_text(request: PerplexityRequest) -> str | None:
    texts = (f"{key}={json.dumps(value)}" for key, value in sorted(request.settings.items()))
    return ", ".join(texts) or None


def _family(request: PerplexityRequest, quantization: str, dtype: str) -> str:
    if request.quantization not in ("auto", "none"):
        return request.quantization
    return dtype if quantization == "none" else quantization


def bits_per_byte(totals: ScoredRows) -> float | None:
    """Bits for each byte of the scored text; None where its bytes are unknown."""
    num_bytes = totals.num_bytes.sum()
    return float(math.fsum(totals.nll) / math.log(2) / num_bytes) if num_bytes else None
