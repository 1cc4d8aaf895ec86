"""Two real engines under one command: on two shares of a CPU, on two GPUs."""

from __future__ import annotations

import signal
from importlib.util import find_spec
from typing import Any

import polars as pl
import pytest

from batchinfer.engine.hardware import visible_gpus
from tests.support.jobs import ROOT, Ended, Place, results, run, start, wait
from tests.support.processes import await_children, kill_one

SUMMARIZE = ROOT / "jobs" / "summarize.yaml"


def sets(folder: Place, **more: Any) -> list[str]:
    settings = {"output.path": folder.url("out"), "sampling.max_tokens": 16, **more}
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def must_be_whole(folder: Place, ended: Ended, num_rows: int) -> None:
    assert ended.code == 0, ended.stderr
    have = results(folder)
    assert have.height == have.unique(["shard", "row"]).height == num_rows
    assert have["error_type"].null_count() == num_rows
    shards = {name for name in folder.names("out") if name.endswith(".parquet")}
    for name in shards:
        rows = folder.read_parquet(f"out/{name}")["row"]
        assert rows.to_list() == list(range(len(rows))), "in input order"
    assert ended.stderr.count("replica started") >= 2
    computed = [line for line in ended.stderr.splitlines() if " computed rows=" in line]
    assert len(computed) >= 2 and not any("rows=0 " in line for line in computed)


@pytest.mark.real_engine
@pytest.mark.parametrize(
    "executor",
    [
        "local",
        pytest.param(
            "ray",
            marks=pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
        ),
    ],
)
def test_two_engines_on_one_cpu_share_a_job(folder: Place, executor: str) -> None:
    """With Ray in an instance of its own, on this machine."""
    prompts = pl.read_parquet(ROOT / "jobs/demo/prompts/prompts-00000-of-00004.parquet")
    folder.write_parquet("in/one.parquet", prompts.head(60))
    more = {"executor": executor, "engine.devices": 2, "input.path": folder.url("in")}
    ended = run(
        SUMMARIZE,
        *sets(folder, **more),
        engine="real",
        environ={"RAY_ADDRESS": ""},
        spares=(2,) if executor == "local" else (),
        timeout_s=290,
    )
    must_be_whole(folder, ended, 60)
    assert results(folder).select(pl.col("completion").str.len_chars().median()).item() > 20


@pytest.mark.gpu
@pytest.mark.real_engine
@pytest.mark.timeout(600)
@pytest.mark.skipif(len(visible_gpus()) < 2, reason="needs two GPUs")
def test_all_gpus_share_a_job_and_one_that_dies_is_replaced(folder: Place) -> None:
    process = start(SUMMARIZE, *sets(folder, **{"engine.max_num_seqs": 8}), engine="real")
    replicas = await_children(process.pid, 2, timeout_s=120)
    while not folder.parts() and process.poll() is None:
        pass
    kill_one(replicas[0], signal.SIGKILL)
    must_be_whole(folder, wait(process, 400), 1200)
