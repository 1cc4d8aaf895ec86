"""`status` and `show`: how an output stands and what is in it, from the output location alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import click
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import ConfigError, RowError, printable
from batchinfer.ledger import Holder, layout, named_if_damaged, records, survey
from batchinfer.prompt import column_values
from batchinfer.runner.restart import describe as describe_restart
from batchinfer.runner.restart import read_pending
from batchinfer.runner.start import open_location
from batchinfer.storage import Store
from batchinfer.tasks import Describe, describer
from batchinfer.telemetry import Clock, describe

#: What every result has, whatever the task.
_SHOWN = frozenset({"id", "shard", "row", "sample", "error_type", "error_message"})


def show_status(output: str, *, as_json: bool) -> None:
    """Whether it is complete, and one line for the newest run of each slice."""
    store = open_location(output)
    restart = read_pending(store)
    job = _read_job(store) if restart is None else {"name": restart.get("name", "restart")}
    success = records.read_success(store)
    newest = _newest_of_each_slice(store)
    is_complete = success is not None and restart is None
    if as_json:
        whole = {"complete": is_complete, "success": success, "pending_restart": restart}
        for record in [whole, *newest]:
            click.echo(json.dumps(record))
        return
    click.echo(f"{job.get('name')}: {store.url}")
    if restart is not None:
        click.echo(f"not complete: {describe_restart(store.url, restart)}")
    elif success is not None:
        click.echo(
            f"complete: {success['rows']:,} rows ({success['rows_failed']:,} failed) "
            f"in {success['shards']:,} shards"
        )
        for line in _beside(success):
            click.echo(line)
    else:
        click.echo("not complete: no _SUCCESS")
    now_s = Clock().wall()
    for record in newest:
        holder = Holder.from_record(record["holder"])
        is_dead_here = holder.is_dead_here() if holder is not None else None
        click.echo(describe(record, now_s, is_dead_here=is_dead_here))


def _beside(success: dict[str, Any]) -> Iterator[str]:
    """What the output has of shards that had left the input when `_SUCCESS` was written."""
    found = success.get("not_in_input", {})
    if finished := found.get("finished"):
        yield (
            f"besides: {finished['rows']:,} rows of {finished['shards']:,} shards that are no "
            "longer in the input"
        )
    if left := found.get("unfinished"):
        yield (
            f"unfinished: {left['rows']:,} durable rows of {left['shards']:,} shards that left "
            "the input, in no result file"
        )


def _read_job(store: Store) -> dict[str, Any]:
    """The output's job.json. Raises ConfigError where there is none."""
    job = records.read_job_to_look(store)
    if job is None:
        raise ConfigError(f"{store.url} is not an output of batchinfer: no {layout.JOB_KEY} in it")
    return job


def _newest_of_each_slice(store: Store) -> list[dict[str, Any]]:
    newest: dict[str, dict[str, Any]] = {}
    for info in store.list(layout.STATUS_PREFIX):  # by run number
        record = records.read_status(store, info.key)
        if record is not None:
            newest[record["slice"]] = record
    return sorted(newest.values(), key=lambda record: int(record["run"]))


def show_rows(output: str, *, max_rows: int, failed: bool, as_json: bool) -> None:
    """Finished rows: first from finished files, then from parts."""
    store = open_location(output)
    describe = describer(_read_job(store)["job"])
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
    if row["total_s"] is not None:
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
