"""`show`: finished rows of an output, from the output location alone.

Must not know: jobs, how rows are computed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import click
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.cli.next_steps import after_show, say_next
from batchinfer.errors import ConfigError, RowError, printable
from batchinfer.ledger import layout, named_if_damaged, records, survey
from batchinfer.prompt import column_values
from batchinfer.runner.start import open_location
from batchinfer.storage import Store
from batchinfer.tasks import Describe, describer

#: What every result has, whatever the task.
_SHOWN = frozenset({"id", "shard", "row", "sample", "error_type", "error_message"})


def show_rows(output: str, *, max_rows: int, failed: bool, as_json: bool) -> None:
    """Finished rows: first from finished files, then from parts."""
    store = open_location(output)
    describe = describer(records.require_job(store)["job"])
    num_shown = 0
    for row in _rows(store, failed=failed):
        if num_shown == max_rows:
            break
        num_shown += 1
        if as_json:
            click.echo(json.dumps(_as_json(row), default=str, ensure_ascii=False))
        else:
            _print_row(row, describe)
    if not num_shown:
        what = "failed rows" if failed else "finished rows"
        click.echo(f"no {what} in {store.url}", err=True)
    elif not as_json and sys.stdout.isatty():
        is_complete = records.read_success(store) is not None
        say_next(sys.stdout, sys.stderr, after_show(output, is_complete=is_complete))


def _as_json(value: Any) -> Any:
    """NaN (the first prompt token has no logprob) and infinity are null in JSON."""
    if isinstance(value, dict):
        return {name: _as_json(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_as_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_row(row: dict[str, Any], describe: Describe) -> None:
    sample = f", sample {row['sample']}" if row["sample"] else ""
    click.secho(printable(f"{row['id']}  ({row['shard']}:{row['row']}{sample})"), bold=True)
    if row["error_type"] is not None:
        click.echo(printable(f"  {row['error_type']}: {row['error_message']}"))
        return
    text, facts = describe(row)
    if text is not None:
        click.echo(printable(f"  {text}"))
    if isinstance(row["total_s"], float):
        facts.append(f"{row['total_s']:.2f} s")
    click.secho("  " + ", ".join(facts), dim=True)


def _rows(store: Store, *, failed: bool) -> Iterator[dict[str, Any]]:
    """Rows of finished files and of parts; a row that is in both (after a crash) comes once."""
    for key in _files(store):
        try:
            source = store.open(key)
        except FileNotFoundError:
            continue  # a part that was folded meanwhile
        with source:
            for batch in _batches(source, store.url_of(key)):
                columns = [_shown_values(column) for column in batch.columns]
                for values in zip(*columns, strict=True):
                    row = dict(zip(batch.schema.names, values, strict=True))
                    if not failed or row["error_type"] is not None:
                        yield row


def _batches(source: BinaryIO, url: str) -> Iterator[pa.RecordBatch]:
    """Raises ConfigError for a file that is damaged or holds something else."""
    with named_if_damaged(url):
        file = pq.ParquetFile(source, pre_buffer=False)
        if lacking := _SHOWN - set(file.schema_arrow.names):
            raise ConfigError(
                f"{url} holds no results: it has no column {min(lacking)}. Move it away"
            )
        yield from file.iter_batches(batch_size=256)


def _shown_values(column: pa.Array) -> list[Any]:
    """What a kept column holds that has no text, such as bytes, is shown as the reason why."""
    values = column_values(pa.chunked_array([column]))
    return [f"({v.message})" if isinstance(v, RowError) else v for v in values]


def _files(store: Store) -> Iterator[str]:
    listed = survey(store)
    yield from sorted(listed.finished)
    for info in store.list(layout.PARTS_PREFIX):
        parsed = layout.parse_part_key(info.key)
        if parsed is not None and parsed[0] not in listed.finished:
            yield info.key
