"""Rows of text that a checkpoint is calibrated with, as `quantize` is given them.

Must not know: what is calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass

import click

from batchinfer.errors import InputError
from batchinfer.evaluation.texts import valid_texts
from batchinfer.source import Shard, ShardReader, list_shards
from batchinfer.storage import open_store


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rows of text to calibrate with."""

    path: str
    column: str
    max_rows: int


def texts_of(calibration: Calibration) -> list[str]:
    """The first rows that are more than white space."""
    texts: list[str] = []
    try:
        shards = list_shards([calibration.path], open_store)
    except InputError as error:
        raise InputError(str(error).replace("input.path", "--calibration")) from None
    for shard in shards:
        texts += _texts_of(shard, calibration, calibration.max_rows - len(texts))
        if len(texts) == calibration.max_rows:
            return texts
    if not texts:
        raise InputError(f"column {calibration.column!r} of {calibration.path} has no text")
    click.echo(f"calibrating with all {len(texts):,} rows that have text", err=True)
    return texts


def _texts_of(shard: Shard, calibration: Calibration, max_rows: int) -> list[str]:
    texts: list[str] = []
    with ShardReader(shard, [calibration.column]) as reader:
        kind = reader.schema.field(0).type
        if str(kind) not in ("string", "large_string"):
            raise InputError(f"{shard.url}: column {calibration.column!r} is {kind}, not text")
        for block in reader.blocks(0, reader.num_rows):
            found = valid_texts(block, shard, calibration.column)
            texts += [text for text in found if text and text.strip()]
            if len(texts) >= max_rows:
                return texts[:max_rows]
    return texts
