"""The most that a device can do of a job, and a run judged before it is run: an H200, an 8B model.

Its numbers are those of docs/benchmarks.md.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from batchinfer.config import job_from
from batchinfer.engine.base import EngineFacts
from batchinfer.engine.kinds import engine_kind
from batchinfer.forecast.forecast import Interval, Lengths, RemainingRows, Wave
from batchinfer.forecast.measure import Measurement
from batchinfer.forecast.predict import Prediction, RemainingWork, predict
from batchinfer.forecast.roof import roof_of, steps_of, tokens_of, verdict_of
from batchinfer.forecast.sample import Sample
from batchinfer.runner.judged import judged_by
from batchinfer.runner.start import open_start
from batchinfer.verdict import Setup, Verdict, peaks_of, setup_of
from benchmarks.roof import SHAPES, facts_of, model_of
from tests.support.jobs import Place, job, rows

BF16 = next(shape for shape in SHAPES if shape.name.startswith("128 / 512"))


def setup(kv_dtype: str = "auto") -> tuple[EngineFacts, Setup]:
    shape = replace(BF16, kv_dtype=kv_dtype)
    facts, model = facts_of(shape, model_of(shape)), model_of(shape)
    return facts, setup_of(facts, model, peaks_of("NVIDIA H200", "bfloat16", None, "vllm"))


def roof(prompt: int, completion: int, kv_dtype: str = "auto") -> Verdict:
    facts, judged = setup(kv_dtype)
    found = roof_of(np.full(4, prompt), 3000, completion, facts, judged)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("prompt", "completion", "bound"),
    [
        (128, 128, "compute"),
        (128, 512, "compute"),
        (128, 2048, "memory bandwidth"),
        (1000, 1000, "memory bandwidth"),
        (2048, 128, "compute"),
    ],
)
def test_short_contexts_are_bound_by_compute_and_long_ones_by_bandwidth(
    prompt: int, completion: int, bound: str
) -> None:
    found = roof(prompt, completion)
    assert (found.bound, found.share_of_roof) == (bound, pytest.approx(1.0))


def test_half_the_bytes_of_the_kv_cache_lift_the_roof_where_it_binds() -> None:
    assert roof(1000, 1000, "fp8").tokens_per_s > 1.3 * roof(1000, 1000).tokens_per_s
    assert roof(2048, 128, "fp8").tokens_per_s < 1.15 * roof(2048, 128).tokens_per_s


def test_the_roof_is_above_all_that_was_measured() -> None:
    for shape in SHAPES:
        model = model_of(shape)
        facts = facts_of(shape, model)
        judged = setup_of(facts, model, peaks_of(facts.device, facts.dtype, None, "vllm"))
        lengths = shape.lengths()
        found = roof_of(lengths.prompt, 4096, int(lengths.completion.max()), facts, judged)
        assert found is not None
        assert found.tokens_per_s > shape.tokens_per_s, shape.name


def test_completions_end_where_the_context_does() -> None:
    facts, judged = setup()
    found = roof_of(np.array([4000]), 100, 512, facts, judged)
    same = roof_of(np.array([4000]), 100, 96, facts, judged)
    assert found is not None and same is not None
    assert found.tokens_per_s == same.tokens_per_s


def test_a_schedule_as_steps_has_every_token_once() -> None:
    random = np.random.default_rng(0)
    prompt, completion = random.integers(1, 900, 300), random.integers(1, 200, 300)
    lengths = Lengths(prompt, prompt, completion)
    facts, _ = setup()
    steps, tokens = steps_of(lengths, facts), tokens_of(lengths)
    assert sum(s.tokens for s in steps) == tokens.computed == prompt.sum() + (completion - 1).sum()
    assert steps[-1].kind == "tail"


def measured(seconds: float) -> tuple[Measurement, Prediction]:
    facts, _ = setup()
    rows = np.full(64, 128)
    wave = Wave(Lengths(rows, rows, np.full(64, 512)), np.full(512, 0.01))
    left = RemainingRows(4000, 1, rows, is_longest_first=False, chunk_rows=4000)
    interval = Interval(seconds, seconds, seconds)
    tokens = Interval(4000 * 512.0, 4000 * 512.0, 4000 * 512.0)
    return Measurement(facts, [wave], 0, 0, 0), Prediction(left, 512e3, tokens, 0, interval, 0)


def test_a_forecast_is_judged_as_the_run_would_be() -> None:
    _, judged = setup()
    found = verdict_of(*measured(4000 * 512 / 17637), judged)
    assert found is not None
    assert (found.bound, found.tokens_per_s) == ("compute", pytest.approx(17637))
    assert found.share_of_roof == pytest.approx(0.51, abs=0.03)
    assert found.lever is not None and found.lever.changes_tokens


def test_without_peaks_nothing_is_foreseen() -> None:
    _, judged = setup()
    unknown = replace(judged, peaks=None)
    assert verdict_of(*measured(100.0), unknown) is None
    assert roof_of(np.array([5]), 10, 10, setup()[0], unknown) is None


def test_vllm_is_foreseen_on_the_machine_at_hand(folder: Place) -> None:
    """The demo model on a CPU: sizes and room as `plan` prints them for its memory."""
    from batchinfer.config import Job

    settings = job(folder) | {"engine": {"name": "vllm", "max_num_seqs": 24}}
    folder.write_parquet("in/a.parquet", rows(1))
    start = open_start(Job.model_validate(settings))
    facts = engine_kind("vllm").expected_facts(start.spec)
    if facts is None:
        pytest.skip("no device")
    assert (facts.max_num_seqs, facts.dtype) == (24, start.model.dtype)
    assert facts.kv_cache_tokens
    work = judged_by(start, facts).work
    assert work is not None
    assert work.token_flops == pytest.approx(2 * 5.3e6, rel=0.2)


def test_devices_that_share_a_job_halve_its_time_and_leave_the_verdict_as_it_is(
    folder: Place,
) -> None:
    measurement, _ = measured(1.0)
    prompts = [np.arange(128, dtype=np.int32)] * 8
    sample = Sample(8, np.full(8, 128), 0, 0, 0.0, prompts)
    rest = RemainingWork(num_results=40_000, chunk_rows=16_384, ready_s=1.0)
    parsed = job_from(job(folder))
    one, two = (predict(parsed, sample, rest, measurement, n) for n in (1, 2))
    assert two.generation_s.expected == pytest.approx(one.generation_s.expected / 2, rel=0.02)
    assert two.completion_tokens.expected == pytest.approx(one.completion_tokens.expected, rel=0.01)
    assert two.prompt_tokens == pytest.approx(one.prompt_tokens, rel=0.01)
    assert two.completion_tokens_per_s > 1.9 * one.completion_tokens_per_s
    _, judged = setup()
    verdicts = [verdict_of(measurement, found, judged) for found in (one, two)]
    assert verdicts[0] is not None and verdicts[1] is not None
    assert verdicts[0].bound == verdicts[1].bound
    assert verdicts[1].share_of_roof == pytest.approx(verdicts[0].share_of_roof, rel=0.05)
