"""Which of several errors ends a run."""

from __future__ import annotations

from itertools import combinations

import pytest

from batchinfer.errors import EngineDied, InputError, Stopped
from batchinfer.runner import Stop
from batchinfer.runner.ending import Causes, bad_input, end, stopped

#: The list itself: each of them hides those behind it.
PRECEDENCE = ("stop", "writer", "reader", "lease", "engine", "input")


def test_the_order_of_causes_is_this_list() -> None:
    assert Causes._fields == PRECEDENCE


@pytest.mark.parametrize(("earlier", "later"), list(combinations(PRECEDENCE, 2)))
def test_of_two_causes_the_earlier_ends_the_run(earlier: str, later: str) -> None:
    causes = Causes(**{earlier: RuntimeError(earlier), later: RuntimeError(later)})
    with pytest.raises(RuntimeError, match=earlier):
        end(causes)


def test_without_a_cause_nothing_is_raised() -> None:
    end(Causes(stop=stopped(Stop(), None), input=bad_input([])))


def test_a_dead_engine_is_reported_with_what_is_durable() -> None:
    with pytest.raises(EngineDied, match=r"gone\. Finished rows are durable: start again"):
        end(Causes(engine=EngineDied("gone")))


def test_a_stop_keeps_its_code_and_says_what_the_writer_could_not_write() -> None:
    stop = Stop()
    stop.request(143, "received SIGTERM")
    with pytest.raises(Stopped, match="received SIGTERM: disk full; the next start") as caught:
        end(Causes(stop=stopped(stop, OSError("disk full")), writer=OSError("disk full")))
    assert caught.value.code == 143


def test_twenty_bad_shards_are_named() -> None:
    error = bad_input([InputError(f"shard {n}") for n in range(30)])
    assert str(error).count("shard") == 20
