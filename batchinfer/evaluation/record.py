"""What an evaluation is asked, and what came of it: the two shapes that every command here shares.

Must not know: how anything is measured, files, engines. Invariants: both are immutable and go
through JSON unchanged; a record without an error has the figures of a measurement, and none of its
numbers is NaN or infinite.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from batchinfer.config import DEFAULT_ENGINE

#: What a record has unless it has an error.
MEASURED = ("dtype", "context", "stride", "windows", "tokens", "nll", "perplexity", "data_digest")


class Frozen(BaseModel):
    """Immutable, without unknown fields, and no number is NaN or infinite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PerplexityRequest(Frozen):
    """One model in one quantization, on one text. A relative path starts at the current directory.

    `settings`: further settings of the score job by dotted key, such as
    `{"engine.max_num_seqs": 8, "model.tensor_parallel_size": 2}`.
    """

    label: str = Field(min_length=1)
    family: str = ""  # of the format, for colours; "": what runs, such as int4
    model: str  # folder or hub name
    quantization: str = "auto"
    dtype: str = "auto"
    engine: str = DEFAULT_ENGINE
    settings: dict[str, Any] = Field(default_factory=dict)
    data: str = "wikitext2"  # a name of evaluation.data, or a Parquet or text file
    column: str | None = None  # of Parquet
    context: int = Field(default=2048, ge=2)  # tokens of a window
    stride: int = Field(default=512, ge=1)  # tokens from the start of a window to the next
    max_rows: int | None = Field(default=None, ge=1)  # windows; None: all of the text
    top_k: int | None = Field(default=None, ge=1)  # likeliest tokens to keep, for KL; None: none
    reference: str | None = None  # a finished output of the same windows, with top_k


class Record(Frozen):
    """What was measured. Of a request that failed: its label, family, model and `error`."""

    label: str
    family: str
    model: str
    quantization: str | None = None  # what ran, not what was asked for
    dtype: str | None = None
    engine: str | None = None  # name and version
    device: str | None = None
    settings: str | None = None  # of the job, where it says more than the model: KEY=VALUE, ...

    data: str | None = None
    context: int | None = None  # tokens
    stride: int | None = None  # tokens
    windows: int | None = None
    tokens: int | None = None  # scored
    bytes_of_text: int | None = None  # UTF-8, of the scored tokens; None: unknown

    nll: float | None = None  # mean negative log-likelihood of a token, nats
    perplexity: float | None = None  # exp(nll)
    perplexity_low: float | None = None  # 95 % interval over windows; None: one window
    perplexity_high: float | None = None
    bits_per_byte: float | None = None

    layer_bits_per_weight: float | None = None  # of the checkpoint's decoder layers
    head_bits_per_weight: float | None = None
    model_bytes: int | None = None  # of the weights, as stored
    peak_memory_bytes: int | None = None  # of the device, without KV cache; None: unknown
    tokens_per_s: float | None = None  # scored tokens; None: unknown

    kl: float | None = None  # mean KL divergence of a token from the reference, nats
    kl_top_k: int | None = None  # likeliest tokens that it was computed from
    top1_agreement: float | None = None  # share of tokens, 0 to 1
    reference: str | None = None

    error: str | None = None
    tokenizer_digest: str | None = None  # sha256
    data_digest: str | None = None  # sha256 of the windows' token ids
    batchinfer_version: str

    @model_validator(mode="after")
    def _check(self) -> Record:
        missing = [name for name in MEASURED if getattr(self, name) is None]
        if self.error is None and missing:
            raise ValueError(f"a record without error needs {', '.join(missing)}")
        return self
