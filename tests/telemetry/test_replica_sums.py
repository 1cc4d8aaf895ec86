"""Several processes share a run: their sums are its, and each has a line of its own."""

from __future__ import annotations

import io

from rich.console import Console

from batchinfer.telemetry import Clock, Counters, Sums
from batchinfer.telemetry.progress import live_lines


def counters_of_two() -> Counters:
    counters = Counters(Clock())
    counters.set_total(1000, 2)
    counters.set_phase("computing")
    counters.add_replica("GPU 0")
    counters.add_replica("GPU 1", num_restarts=1)
    at_work = Sums(
        phase="computing",
        rows_computed=100,
        rows_durable=90,
        counts={"rows_cut": 2},
        result_tokens=4000,
        num_in_flight=20,
        tokens_in_flight=50,
        tokens_per_s=400.0,
        num_steps=10,
        num_running=150,
    )
    counters.set_sums("GPU 0", at_work)
    counters.set_sums("GPU 0", at_work)  # said twice, counted once
    counters.set_sums("GPU 1", Sums(phase="computing", num_steps=10, num_running=50))
    return counters


def test_what_replicas_did_is_what_the_run_did() -> None:
    snapshot = counters_of_two().snapshot()
    assert (snapshot.rows_computed, snapshot.rows_durable) == (100, 90)
    assert (snapshot.counts["rows_cut"], snapshot.result_tokens) == (2, 4000)
    assert (snapshot.num_in_flight, snapshot.tokens_in_flight) == (20, 50)
    assert (snapshot.num_steps, snapshot.mean_num_running) == (20, 10.0)


def test_what_a_replica_had_not_made_durable_is_lost_with_it() -> None:
    counters = counters_of_two()
    counters.add_replica("GPU 0", num_restarts=1)
    snapshot = counters.snapshot()
    assert (snapshot.rows_computed, snapshot.rows_durable) == (90, 90)
    assert snapshot.num_in_flight == 0
    counters.set_sums("GPU 0", Sums(rows_computed=5, rows_durable=1))
    snapshot = counters.snapshot()
    assert (snapshot.rows_computed, snapshot.rows_durable) == (95, 91)


def test_each_replica_has_a_line_below_that_of_the_run() -> None:
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    with console.capture() as shown:
        console.print(live_lines(counters_of_two().snapshot()))
    lines = [line.strip() for line in shown.get().splitlines()]
    assert len(lines) == 3 and "90/1,000 rows" in lines[0]
    assert lines[1] == "GPU 0: computing  100 rows  400 tokens/s  20 in flight"
    assert lines[2] == "GPU 1: computing  started 2 times"
