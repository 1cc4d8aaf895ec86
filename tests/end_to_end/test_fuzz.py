"""Odd inputs and odd job files through the command line: a few made cases, the same each time, and
all that ever broke a promise. `make fuzz` makes as many as wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.case import Case, cases, restore, scratch
from tests.fuzz.check import check
from tests.fuzz.server import Server
from tests.fuzz.store import can_store

REGRESSIONS = sorted(
    path for path in (Path(__file__).parents[1] / "fuzz" / "regressions").glob("*")
)
NUM_CASES = 25


@pytest.fixture(scope="module")
def server_of_forks() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.mark.xdist_group("fuzz")
@pytest.mark.parametrize("kept", REGRESSIONS, ids=lambda path: path.name)
def test_what_once_broke_a_promise_keeps_it(
    kept: Path, tmp_path: Path, server_of_forks: Server
) -> None:
    check(tmp_path, restore(kept, tmp_path), server_of_forks)


@pytest.mark.xdist_group("fuzz")
@pytest.mark.parametrize("seed", range(4))
def test_no_input_and_no_job_file_breaks_a_promise(seed: int, server_of_forks: Server) -> None:
    @hypothesis.seed(seed)
    @settings(
        max_examples=NUM_CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases())
    def holds(case: Case) -> None:
        with scratch() as root:
            folder = Path(root) / "case"
            folder.mkdir()
            case.write(folder)
            check(folder, case.plan, server_of_forks)

    holds()


def test_a_table_that_ends_arrow_does_not_end_the_fuzzer() -> None:
    ends_it = pa.table({"x": pa.array([[], []], pa.list_(pa.int32(), 0))})
    assert not can_store(ends_it, 1)
    assert can_store(pa.table({"x": [1]}), 1)
