"""The status record that a run rewrites while it is at work, and its form for people.

Must not know: where the record is kept, how a process is identified. A record without an exit code
whose process is gone, or that is a minute old, belongs to a run that died.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from batchinfer.telemetry.clock import utc_seconds
from batchinfer.telemetry.counters import Counters

#: A run, which rewrites its record every few seconds, is taken for dead if it is silent so long.
DEAD_AFTER_S = 60.0
_ROUNDED = (
    "elapsed_s",
    "generation_s",
    "tokens_per_s",
    "mean_tokens_per_s",
    "mean_num_running",
    "share_of_steps_underfilled",
    "stalled_s",
    "eta_s",
)
#: Rows in flight that a record names: enough to find a poison row, small enough to rewrite often.
MAX_IN_FLIGHT_NAMES = 2048


def status_record(
    counters: Counters,
    *,
    run: int,
    slice_name: str,
    holder: Mapping[str, Any],
    in_flight: Sequence[str],
    startup: Mapping[str, Any],
    exit_code: int | None = None,
) -> dict[str, Any]:
    """JSON-ready. `in_flight`: "shard:row" of what the engine holds; `startup`: of `StartUp`.

    An `exit_code` ends the run.
    """
    counts = asdict(counters.snapshot())
    for name in _ROUNDED:
        counts[name] = None if counts[name] is None else round(counts[name], 3)
    return {
        "state": "running" if exit_code is None else "ended",
        "exit_code": exit_code,
        "run": run,
        "slice": slice_name,
        "holder": dict(holder),
        "started_at": holder["since"],
        "updated_at": counters.clock.utc(),
        **counts,
        "completion_tokens": counts["result_tokens"],  # as versions before had it
        "startup": dict(startup),
        "in_flight": list(in_flight[:MAX_IN_FLIGHT_NAMES]),
    }


def describe(record: Mapping[str, Any], now_s: float, *, is_dead_here: bool | None) -> str:
    """A line for people, and one each for its `tuning`, its `verdict` and what it `spent`, if
    known.

    `now_s`: seconds since the epoch.

    `is_dead_here`: whether the run's process is gone, None if this machine cannot know.
    """
    words = [f"run {record['run']}"]
    if record["slice"] != "all":
        words.append(f"(slice {record['slice']})")
    words += [_liveness(record, now_s, is_dead_here) + ",", _rows(record)]
    if record["state"] == "running" and is_dead_here is not True:
        words += _speed(record)
    told = (record.get(name) for name in ("tuning", "verdict", "spent"))
    texts = [str(found.get("text", "")) for found in told if isinstance(found, Mapping)]
    return "\n  ".join([" ".join(words), *filter(None, texts)])


def is_probably_dead(record: Mapping[str, Any], now_s: float, *, is_dead_here: bool | None) -> bool:
    """Whether a record that says "running" belongs to a run that is not."""
    if record["state"] != "running":
        return False
    if is_dead_here is not None:
        return is_dead_here
    return now_s - utc_seconds(record["updated_at"]) > DEAD_AFTER_S


def _liveness(record: Mapping[str, Any], now_s: float, is_dead_here: bool | None) -> str:
    if record["state"] == "ended":
        return f"ended {record['updated_at']} with exit code {record['exit_code']}"
    holder = record["holder"]
    where = f"host {holder['host']}, pid {holder['pid']}"
    age_s = max(0.0, now_s - utc_seconds(record["updated_at"]))
    if is_dead_here:
        return f"died in phase '{record['phase']}' ({where} is gone)"
    if is_probably_dead(record, now_s, is_dead_here=is_dead_here):
        silence = timedelta(seconds=round(age_s))
        return (
            f"probably died in phase '{record['phase']}' ({where}; no sign of life for {silence})"
        )
    return f"running: {record['phase']} ({where}, updated {age_s:.0f} s ago)"


def _rows(record: Mapping[str, Any]) -> str:
    rows_done = record["rows_done_at_start"] + record["rows_durable"]
    num_rows, num_failed = record.get("rows_total"), record.get("rows_failed")
    total = "" if num_rows is None else f" of {num_rows:,}"
    failed = f" ({num_failed:,} failed)" if num_failed else ""
    return f"{rows_done:,}{total} rows durable{failed}"


def _speed(record: Mapping[str, Any]) -> list[str]:
    words = []
    if speed := record.get("tokens_per_s"):
        words.append(f"at {speed:,.0f} tokens/s")
    if (eta_s := record.get("eta_s")) is not None and eta_s < timedelta.max.total_seconds():
        words.append(f"ETA about {timedelta(seconds=round(eta_s))}")
    return words
