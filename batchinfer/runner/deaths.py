"""Rows that kill: two starts in a row that died with rows in flight and without a new durable row.

Must not know: why they died. Parts and status records show it: a run that was ended on purpose has
nothing in flight in its last record, one whose engine died keeps what was.
"""

from __future__ import annotations

from typing import Any

from batchinfer.errors import RepeatedDeath
from batchinfer.ledger import layout, records
from batchinfer.runner.options import RunOptions
from batchinfer.runner.session import Session

_MAX_NAMED_ROWS = 20


def refuse_repeated_death(session: Session) -> bool:
    """Raise RepeatedDeath if the two runs before this one, of the same slice, died so.

    Returns whether the last one did: then this run had better begin with few rows in flight. The
    refusal is a run of its own with nothing in flight, so the start after it tries once more.
    """
    deaths: list[list[str]] = []
    for number in range(session.run - 1, session.first_run - 1, -1):
        run = records.read_run(session.store, layout.run_key(number))
        if run is None or _lease_name(run) != session.options.lease_name:
            continue
        status = records.read_status(session.store, layout.status_key(number)) or {}
        in_flight = status.get("in_flight")
        if not in_flight or status.get("rows_durable") or _has_parts(session, number):
            break
        deaths.append(in_flight)
        if len(deaths) == 2:
            break
    if len(deaths) < 2:
        return bool(deaths)
    earlier = set(deaths[1])
    both = [row for row in deaths[0] if row in earlier]
    rows = ", ".join((both or deaths[0])[:_MAX_NAMED_ROWS])
    raise RepeatedDeath(
        "the last two runs died without one new durable row. In flight were (shard:row): "
        f"{rows}. Look at {session.store.url_of(layout.LOGS_PREFIX)} for why; exclude the row with "
        "input.filter or lower engine.max_num_seqs. The next start tries once more"
    )


def _lease_name(run: dict[str, Any]) -> str:
    of_slice = run["options"].get("slice")
    is_joined = bool(run["options"].get("join"))
    return RunOptions(slice=tuple(of_slice) if of_slice else None, join=is_joined).lease_name


def _has_parts(session: Session, number: int) -> bool:
    parsed = (layout.parse_part_key(i.key) for i in session.store.list(layout.PARTS_PREFIX))
    return any(found is not None and found[1].run == number for found in parsed)
