"""`status`: how an output stands, from the output location alone.

Must not know: jobs, what is in results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from batchinfer.ledger import Holder, records
from batchinfer.runner.restart import describe as describe_restart
from batchinfer.runner.restart import read_pending
from batchinfer.runner.start import open_location
from batchinfer.telemetry import Clock, describe


def show_status(output: str, *, as_json: bool) -> None:
    """Whether it is complete, and one line for the newest run of each slice."""
    store = open_location(output)
    restart = read_pending(store)
    job = (
        records.require_job(store) if restart is None else {"name": restart.get("name", "restart")}
    )
    success = records.read_success(store)
    newest = records.newest_statuses(store)
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
