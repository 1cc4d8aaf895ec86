"""When buffered rows become parts, and when a shard has all its results: both without a clock."""

from __future__ import annotations

import pyarrow as pa
import pytest

from batchinfer.runner.flush import FlushPolicy
from batchinfer.runner.shard_progress import ShardProgress


def policy(every_rows: int = 100, every_s: float = 60.0, max_bytes: int = 1000) -> FlushPolicy:
    return FlushPolicy(every_rows, every_s, max_bytes)


def test_nothing_buffered_is_never_due() -> None:
    flushes = policy()
    assert not flushes.is_due(1e9, is_busy=False)
    assert flushes.wait_s(0.0, is_busy=False) == 1.0


@pytest.mark.parametrize(
    ("num_rows", "num_bytes", "after_s", "is_due"),
    [(1, 1, 0.4, False), (1, 1, 0.5, True), (100, 1, 0.0, True), (1, 1000, 0.0, True)],
)
def test_a_flush_is_due_after_rows_bytes_or_time(
    num_rows: int, num_bytes: int, after_s: float, is_due: bool
) -> None:
    flushes = policy()
    flushes.add(num_rows, num_bytes, 10.0)
    assert flushes.is_due(10.0 + after_s, is_busy=False) is is_due
    assert flushes.wait_s(10.0, is_busy=False) == 0.5


def test_while_all_publishers_are_busy_only_the_longest_wait_counts() -> None:
    flushes = policy(every_s=5.0)
    flushes.add(1000, 10_000, 0.0)
    assert not flushes.is_due(4.9, is_busy=True)
    assert flushes.is_due(5.0, is_busy=True)


def test_the_interval_grows_to_a_fifth_of_the_time_and_no_longer_than_every_s() -> None:
    flushes = policy(every_s=8.0)
    flushes.add(1, 1, 0.0)
    flushes.flushed(20.0)
    flushes.remove(1, 1)
    flushes.add(1, 1, 20.0)
    assert not flushes.is_due(23.9, is_busy=False)
    assert flushes.is_due(24.0, is_busy=False)
    flushes.flushed(100.0)
    assert flushes.is_due(28.0, is_busy=False), "every_s"


def test_what_left_the_buffers_is_not_due() -> None:
    flushes = policy()
    flushes.add(100, 1, 0.0)
    flushes.remove(100, 1)
    assert not flushes.is_due(60.0, is_busy=False)


@pytest.mark.parametrize(
    ("windows", "num_done", "is_complete"),
    [([], 0, False), ([0], 4, False), ([0, 1], 7, False), ([0, 1], 8, True), ([1], 4, False)],
)
def test_a_shard_is_complete_with_all_its_windows_and_all_their_results(
    windows: list[int], num_done: int, is_complete: bool
) -> None:
    shard = ShardProgress("a", pa.schema([]), 2, lambda: None, has_results=False)
    for window in windows:
        shard.window_read(window, 4, num_done=num_done if window == windows[0] else 0)
    assert shard.is_complete is is_complete
    assert shard.expected_by_window == [4 if window in windows else 0 for window in range(2)]
