"""How a run works through its input: in which order, how often it makes rows durable, when it ends.

No setting here changes what is computed. Must not know: engines, rows.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from batchinfer.config.section import Section
from batchinfer.config.values import MAX_COUNT

MAX_WINDOW_ROWS = 1 << 24


class PackingSettings(Section):
    """In which order and portions rows reach the engine. No setting changes what is computed."""

    order: Literal["auto", "length", "prefix", "input"] = Field(
        default="auto",
        description="length: longest expected work of a window first; prefix: rows that share a "
        "prompt prefix next to each other, for the engine's prefix cache; auto: prefix where that "
        "saves work, else input; input: as in the file.",
    )
    window_rows: int = Field(
        default=16384,
        ge=1,
        le=MAX_WINDOW_ROWS,
        description="Rows of a window; fixed for the life of an output.",
    )
    buffer_tokens: int = Field(
        default=3_000_000,
        ge=1,
        le=MAX_COUNT,
        description="Most prompt tokens that are ordered together, across windows and shards.",
    )
    batch_rows: int = Field(
        default=256, ge=1, le=MAX_COUNT, description="Rows that are admitted together."
    )
    deduplicate: bool = Field(
        default=True,
        description="Compute identical prompts of a chunk (a window, or the part of it that has "
        "buffer_tokens) once, only under greedy decoding.",
    )


class CheckpointSettings(Section):
    """When finished rows become durable: whichever comes first."""

    every_rows: int = Field(
        default=512, ge=1, le=MAX_COUNT, description="Flush after this many finished rows."
    )
    every_s: float = Field(
        default=15.0,
        gt=0,
        le=1e9,
        description="Flush when the oldest finished row has waited this many seconds.",
    )


class LimitSettings(Section):
    """When a run gives up or stops, and what it costs."""

    max_failed_fraction: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Fraction of failed rows (0 to 1) above which the exit code is 3.",
    )
    max_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Stop cleanly after this many seconds; the next start continues. null: never.",
    )
    price_per_hour: float | None = Field(
        default=None,
        ge=0,
        le=1e9,
        description="What the machine costs, in any currency: a run then reports its cost. null: "
        "it reports none.",
    )
