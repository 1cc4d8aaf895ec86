"""The demo jobs on the real engine, through the command line."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from tests.support.jobs import ROOT, Place, kill, results, run, stable, start, wait, wait_until

pytestmark = pytest.mark.real_engine

SUMMARIZE = ROOT / "jobs" / "summarize.yaml"
#: Of each of the demo's four files, which have 300.
NUM_ROWS = 50


def real(path: Path, *sets: str, is_fresh: bool = False) -> dict[str, object]:
    arguments = [a for s in sets for a in ("--set", s)]
    ended = run(path, *arguments, engine="real", timeout_s=280, is_fresh=is_fresh)
    assert ended.code == 0, ended.stderr
    return ended.result


def count_parts(folder: Place) -> int:
    return sum(name.endswith(".part") for name in folder.names("out"))


def test_the_demo_job_gives_a_result_for_each_row(
    folder: Place,
) -> None:
    """The demo job gives a result for each row in files named like the inputs.

    Over the first rows of each of its files.
    """
    for path in sorted((ROOT / "jobs" / "demo" / "prompts").glob("*.parquet")):
        folder.write_parquet(f"in/{path.name}", pl.read_parquet(path).head(NUM_ROWS))
    sets = [f"output.path={folder.url('out')}", f"input.path={folder.url('in')}/*.parquet"]
    assert real(SUMMARIZE, *sets, is_fresh=True)["status"] == "complete"
    names = [n for n in folder.names("out") if n.endswith(".parquet")]
    assert names == [f"prompts-0000{i}-of-00004.parquet" for i in range(4)]
    have = results(folder)
    assert have.height == 4 * NUM_ROWS
    for name in names:
        one = have.filter(pl.col("shard") == name)
        given = folder.read_parquet(f"in/{name}")
        assert one["row"].to_list() == list(range(NUM_ROWS))
        assert one.select("id", "reference_summary").equals(given.select("id", "reference_summary"))
    assert have["error_type"].null_count() == have.height
    assert have["completion"].str.len_chars().median() > 20, "not summaries"
    assert have.filter(pl.col("finish_reason") == "stop").height > 0.8 * have.height
    sums = have["token_logprobs"].list.sum()
    assert (sums - have["cumulative_logprob"]).abs().max() < 1e-3
    assert have["total_s"].min() > 0
    facts = json.loads(pq.read_metadata(folder.url("out", names[0])).metadata[b"batchinfer"])
    assert (facts["engine"]["name"], facts["rows"], facts["rows_failed"]) == ("vllm", NUM_ROWS, 0)
    log = (Path(folder.url("out")) / "_batchinfer" / "logs" / "0001.log").read_text()
    assert "vllm" in log, "the engine's own log goes to the log file"


def test_resumed_runs_equal_an_uninterrupted_one(
    folder: Place,
) -> None:
    """In fp32 without prefix caching, which on the CPU is bit-equal whatever shares a batch."""
    sets = [
        "model.dtype=fp32",
        'engine.options={"enable_prefix_caching": false, "enable_chunked_prefill": false}',
        f"input.path={folder.url('in.parquet')}",
        "checkpoint.every_rows=16",
        "checkpoint.every_s=1",
        "engine.max_num_seqs=8",
    ]
    prompts = pl.read_parquet(ROOT / "jobs/demo/prompts/prompts-00000-of-00004.parquet")
    folder.write_parquet("in.parquet", prompts.head(128))
    whole = real(SUMMARIZE, *sets, f"output.path={folder.url('whole')}")
    assert whole["rows"] == 128
    sets.append(f"output.path={folder.url('out')}")
    arguments = [a for s in sets for a in ("--set", s)]
    for number in (signal.SIGKILL, signal.SIGTERM):
        num_parts = count_parts(folder)
        process = start(SUMMARIZE, *arguments, engine="real")
        wait_until(lambda n=num_parts: count_parts(folder) > n, timeout_s=120, what="a part")
        kill(process, number)
        ended = wait(process, 20)
        assert ended.code == (-9 if number == signal.SIGKILL else 143), ended.stderr
    assert real(SUMMARIZE, *sets)["rows_computed"] < 128
    assert stable(results(folder)).equals(stable(results(folder, "whole")))
    assert results(folder)["attempt"].n_unique() == 3


@pytest.mark.parametrize("name", ["classify", "extract"])
def test_structured_jobs_give_what_was_asked_for(name: str, folder: Place) -> None:
    path = ROOT / "jobs" / f"{name}.yaml"
    ended = run(
        path,
        "--limit",
        "40",
        "--set",
        f"output.path={folder.url('out')}",
        engine="real",
        timeout_s=280,
    )
    assert ended.code == 0, ended.stderr
    shown = run(folder.url("out"), "-n", "40", "--json", command=("show",)).stdout.splitlines()
    found = [json.loads(line) for line in shown]
    assert len(found) == 40
    if name == "classify":
        right = sum(row["completion"] == row["reference_section"] for row in found)
        assert right > 20, f"{right} of 40 sections are right"
    else:
        stopped = [row for row in found if row["finish_reason"] == "stop"]
        assert len(stopped) > 30
        assert all(set(json.loads(row["parsed"])) == {"summary", "section"} for row in stopped)
