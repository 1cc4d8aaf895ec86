"""`plan --measure`: rows from all over the input are run and nothing is written; what is left is
forecast by the engine's own schedule.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.cli.app import cli
from batchinfer.config import SamplingSettings
from batchinfer.engine.base import EngineFacts
from batchinfer.engine.demands.completion import (
    Completion,
    CompletionDemand,
    CompletionRequest,
)
from batchinfer.forecast.forecast import Lengths, RemainingRows, Wave, forecast, simulate
from batchinfer.testing import FakeEngine, FakePlan
from tests.support.jobs import Ended, Place, job, kill, run, start, wait, wait_until, write_job

NUM_ROWS = 50  # of each of four shards


@pytest.fixture
def four_shards(folder: Place) -> Place:
    """Shards whose rows have about 5, 25, 45 and 65 words."""
    for shard in range(4):
        numbers = range(NUM_ROWS)
        texts = [f"{shard} {n} " + "word " * (3 + 20 * shard) for n in numbers]
        frame = pl.DataFrame({"id": [f"{shard}-{n}" for n in numbers], "text": texts})
        folder.write_parquet(f"in/{shard}.parquet", frame)
    return folder


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """Where the command puts temporary files."""
    path = tmp_path / "tmp"
    path.mkdir()
    return path


def plan(path: Path, *arguments: str, temporary: Path, **options: Any) -> Ended:
    return run(path, *arguments, command=("plan",), environ={"TMPDIR": str(temporary)}, **options)


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in:\n{text}"
    return float(found[1].replace(",", ""))


def test_rows_of_all_shards_are_run_and_nothing_is_written(
    four_shards: Place, tmp_path: Path, temporary: Path
) -> None:
    sampling = {"n": 2, "temperature": 1.0, "seed": 1}
    path = write_job(tmp_path, job(four_shards, sampling=sampling))
    log = tmp_path / "requests"
    fake = {"log_file": str(log), "step_s": 0.01}
    ended = plan(
        path, "--measure", "16", "--price-per-hour", "36000", temporary=temporary, fake=fake
    )
    assert ended.code == 0, ended.stderr
    requests = log.read_text().split()
    assert (len(requests), len(set(requests))) == (32, 16)
    assert not four_shards.names("out")
    assert not list(temporary.iterdir())
    log.unlink()
    result = run(path, fake=fake).result
    # Prompts of the run, by where they stand in it: those of all shards were chosen from.
    prompts = dict.fromkeys(log.read_text().split())
    shards = [list(prompts).index(request) // NUM_ROWS for request in dict.fromkeys(requests)]
    assert np.bincount(shards, minlength=4).tolist() == [4, 4, 4, 4]
    assert number(r"left +([\d,]+) results", ended.stdout) == result["rows"] == 400
    assert number(r"about ([\d,]+) of prompts, [\d,]+ ", ended.stdout) == result["prompt_tokens"]
    total_s = number(r"time +about ([\d.]+) s", ended.stdout)
    assert number(r"cost +about ([\d.]+)", ended.stdout) == pytest.approx(10 * total_s, abs=0.6)


def test_only_what_is_left_counts_and_a_complete_output_runs_nothing(
    four_shards: Place, tmp_path: Path, temporary: Path
) -> None:
    path = write_job(tmp_path, job(four_shards))
    run(path, "--limit", str(NUM_ROWS + 20))
    before = four_shards.names("out")
    ended = plan(path, "--measure", "8", temporary=temporary)
    assert number(r"left +([\d,]+) results", ended.stdout) == 3 * NUM_ROWS - 20
    assert number(r"sample +([\d,]+) rows", ended.stdout) == 3 * NUM_ROWS
    assert four_shards.names("out") == before
    run(path)
    log = tmp_path / "requests"
    ended = plan(path, "--measure", "8", temporary=temporary, fake={"log_file": str(log)})
    assert ended.code == 0 and "left     nothing" in ended.stdout
    assert not log.exists()


def test_a_plan_counts_rows_after_the_filter(
    four_shards: Place, tmp_path: Path, temporary: Path
) -> None:
    """With a filter a complete output is all done and one that passes nothing no error."""
    settings = job(four_shards, input={"filter": "id = '0-7'"})
    path = write_job(tmp_path, settings)
    run(path)
    ended = plan(path, temporary=temporary)
    assert re.search(r"results +1 to compute", ended.stdout)
    assert re.search(r"done +1 \(100%\)", ended.stdout)
    settings["input"]["filter"] = "id = 'nobody'"
    settings["output"]["path"] += "-2"
    path = write_job(tmp_path, settings)
    ended = plan(path, "--measure", "8", temporary=temporary)
    assert ended.code == 0, ended.stderr
    assert "none of 200 rows read passes the filter, no row was run" in ended.stdout


def test_a_forecast_from_very_few_rows_calls_itself_a_guess(
    four_shards: Place, tmp_path: Path, temporary: Path
) -> None:
    path = write_job(tmp_path, job(four_shards))
    assert "is a guess" in plan(path, "--measure", "8", temporary=temporary).stdout
    assert "is a guess" not in plan(path, "--measure", "16", temporary=temporary).stdout


def test_prompts_that_repeat_are_looked_for_only_where_a_forecast_is_made(
    folder: Place, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"id": [str(n) for n in range(32)], "text": ["the same"] * 32}
    folder.write_parquet("in/0.parquet", pl.DataFrame(texts))
    path = write_job(tmp_path, job(folder))
    said = plan(path, "--measure", "8", temporary=temporary).stdout
    assert "31 of 32 prompts read also occur in other rows" in said
    monkeypatch.setattr("batchinfer.forecast.sample._digests", lambda _: pytest.fail("hashed"))
    ended = CliRunner().invoke(cli, ["plan", str(path)])
    assert ended.exit_code == 0, ended.output
    assert "32 rows read, 32 prompts" in ended.output


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--measure", "0"], "x>=1"),
        (["--measure", "8", "--price-per-hour", "-1"], "x>=0"),
        (["--measure", "8", "--price-per-hour", "nan"], "is not a price"),
        (["--price-per-hour", "2"], "needs --measure"),
        (["--measure", "8", "--no-tokenizer"], "without --no-tokenizer"),
    ],
)
def test_options_that_mean_nothing_are_refused(arguments: list[str], word: str) -> None:
    ended = CliRunner().invoke(cli, ["plan", "job.yaml", *arguments])
    assert ended.exit_code == 2 and word in ended.output


def test_an_engine_that_fails_leaves_its_log_and_no_traceback(
    four_shards: Place, tmp_path: Path, temporary: Path
) -> None:
    path = write_job(tmp_path, job(four_shards))
    ended = plan(path, "--measure", "8", temporary=temporary, fake={"fail_build": "does not fit"})
    assert ended.code == 2 and "does not fit" in ended.stderr
    (log,) = temporary.glob("*/engine.log")
    assert str(log) in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("fake", [{"build_s": 60}, {"step_s": 0.5}], ids=["loading", "running"])
def test_an_interrupt_ends_it_with_130_and_leaves_nothing(
    four_shards: Place, tmp_path: Path, temporary: Path, fake: dict[str, Any]
) -> None:
    path = write_job(tmp_path, job(four_shards))
    process = start(
        path,
        *("--measure", "8"),
        command=("plan",),
        fake=fake,
        environ={"TMPDIR": str(temporary)},
    )
    wait_until(lambda: list(temporary.glob("*/engine.log")), what="the engine's log")
    kill(process, signal.SIGINT)
    ended = wait(process, 20)
    assert ended.code == 130
    assert "SIGINT" in ended.stderr and "Traceback" not in ended.stderr
    assert not list(temporary.iterdir()) and not four_shards.names("out")


def facts_of(max_num_seqs: int, max_num_batched_tokens: int = 8192) -> EngineFacts:
    return EngineFacts(
        name="fake",
        version="0",
        device="none",
        dtype="float32",
        quantization="none",
        max_model_len=4096,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_tokens=None,
    )


def lengths_of(prompt: list[int], completion: list[int]) -> Lengths:
    return Lengths(np.array(prompt), np.array(prompt), np.array(completion))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20)), min_size=1, max_size=30),
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.integers(8, 60),
)
def test_a_simulated_schedule_reads_each_prompt_and_decodes_each_token_once(
    lengths: list[tuple[int, int]], max_num_seqs: int, max_num_batched_tokens: int
) -> None:
    prompt, completion = map(list, zip(*lengths, strict=True))
    facts = facts_of(max_num_seqs, max_num_batched_tokens)
    stretches = simulate(lengths_of(prompt, completion), facts)
    num_steps, decoded, read = stretches.T
    assert read.sum() == sum(prompt)
    assert decoded.sum() == sum(completion) - len(completion)  # the prompt's step brings the first
    assert (decoded <= num_steps * max_num_seqs).all()
    assert (decoded + read <= num_steps * max_num_batched_tokens).all()
    assert (num_steps >= 1).all()


def test_a_simulated_schedule_has_as_many_steps_as_an_engine_that_is_kept_full() -> None:
    engine = FakeEngine(
        FakePlan(max_num_seqs=8),
        CompletionDemand("generate", SamplingSettings(max_tokens=40)),
        max_model_len=4096,
    )
    for key in range(100):
        engine.add(CompletionRequest(key, np.array([key, key], np.int32)))
    completion: dict[int, Any] = {}
    num_steps = 0
    while len(completion) < 100:
        completion |= {done.key: len(Completion.of(done).token_ids) for done in engine.step()}
        num_steps += 1
    lengths = lengths_of([2] * 100, [completion[key] for key in range(100)])
    assert simulate(lengths, engine.facts)[:, 0].sum() == num_steps


def wave_of(lengths: Lengths, facts: EngineFacts, seconds: list[float]) -> Wave:
    """A measurement on an engine whose steps take just that long."""
    stretches = simulate(lengths, facts)
    each = np.repeat(stretches / stretches[:, :1], stretches[:, 0], axis=0)
    return Wave(lengths, each @ np.array(seconds))


@pytest.mark.parametrize("num_rows", [500, 20_000])
def test_a_forecast_from_a_narrow_measurement_is_the_time_of_the_full_engine(
    num_rows: int,
) -> None:
    facts = facts_of(64, 1024)
    seconds = [0.01, 0.0002, 0.00003]
    small = wave_of(lengths_of([30] * 3, [20, 25, 30]), facts, seconds)
    large = wave_of(lengths_of([30] * 15, [20, 25, 30] * 5), facts, seconds)
    left = RemainingRows(
        num_rows, 1, np.full(num_rows, 30), is_longest_first=True, chunk_rows=num_rows
    )
    found = forecast([small, large], facts, left)
    job = lengths_of([30] * num_rows, np.resize([20, 25, 30], num_rows).tolist())
    real_s = float(simulate(job, facts).sum(axis=0) @ seconds)
    assert found.generation_s.expected == pytest.approx(real_s, rel=0.03)
    assert found.prompt_tokens == 30 * num_rows
    assert found.completion_tokens.expected == pytest.approx(25 * num_rows, rel=0.03)
    rate_s = (small.step_s.sum() + large.step_s.sum()) / 18 * num_rows
    assert rate_s > 1.3 * real_s  # what seconds a row alone would say
