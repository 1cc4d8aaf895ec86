"""On a CUDA device (`make test-gpu`): what a run says where other processes hold the memory."""

from __future__ import annotations

import logging

import pytest

from benchmarks.gpu_memory_held import Runs, cases

pytestmark = [pytest.mark.gpu, pytest.mark.real_engine, pytest.mark.timeout(600)]

log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("held"))


@pytest.mark.parametrize("part", ["held", "full", "large", "half", "late", "step", "devices"])
def test_memory_that_others_hold_is_reported_with_who_holds_it(runs: Runs, part: str) -> None:
    found = cases(runs)
    if part not in found:
        pytest.skip("needs two devices")
    for name, case in found[part]:
        record = case()
        log.info("%s: %s", name, record)
        assert record["ok"], (name, record)
