"""What bound a run, and what would help, from counted steps: an 8B model on an H200."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from batchinfer.telemetry import Steps, Tally, Tokens
from batchinfer.verdict import ModelWork, Peaks, Setup, Verdict, judge, peaks_of
from batchinfer.verdict.overhead import Sized, step_overhead

H200 = peaks_of("NVIDIA H200", "bfloat16", None, "vllm")
LLAMA_8B = ModelWork(
    token_flops=14e9,
    logits_flops=1.05e9,
    context_flops=4.0 * 32 * 4096,
    weights_bytes=15e9,
    kv_bytes=131_072,
    linear="16 bit",
    attention="16 bit",
)
SETUP = Setup(
    device="NVIDIA H200",
    width=1024,
    max_step_tokens=16384,
    kv_tokens=860_000,
    work=LLAMA_8B,
    peaks=H200,
    can_fp8_weights=True,
    can_fp8_kv=True,
    graph_width=1024,
    utilization=0.9,
)


def tokens_of(prompt: int, completion: int, num_requests: int = 4096) -> Tokens:
    tally = Tally()
    for _ in range(num_requests):
        tally.add_answer(prompt, 0, completion)
    return tally.tokens


def steps_of(num_steps: int, running: int, step_s: float, **more: Any) -> Steps:
    """Each computes `tokens`, or one token of each sequence."""
    tokens = more.get("tokens", running)
    kind = more.get("kind", "full")
    return Steps(kind, num_steps, num_steps * running, num_steps * tokens, num_steps * step_s)


def judged(
    *steps: Steps,
    tokens: Tokens | None = None,
    setup: Setup = SETUP,
    host_s: float = 0.0,
    stalled_s: float = 0.0,
) -> Verdict:
    found = judge(
        steps,
        tokens or tokens_of(128, 512),
        setup,
        tokens_per_s=1000.0,
        host_s=host_s,
        stalled_s=stalled_s,
    )
    assert found is not None
    return found


def test_a_run_without_a_step_has_no_verdict() -> None:
    assert judge([], Tokens(), SETUP, tokens_per_s=0.0, host_s=0.0, stalled_s=0.0) is None


def test_steps_full_of_prompts_are_bound_by_compute() -> None:
    """16,384 tokens of 14 GFLOP at 989 TFLOP/s are 232 ms, and the weights are read in 3 ms."""
    found = judged(steps_of(100, 130, 0.45, tokens=16384, kind="full"), tokens=tokens_of(2040, 128))
    assert found.bound == "compute"
    assert found.share_of_roof == pytest.approx(0.55, abs=0.03)
    assert found.compute is not None and found.memory_bandwidth is not None
    assert found.compute > 10 * found.memory_bandwidth


def test_long_contexts_that_decode_are_bound_by_memory_bandwidth() -> None:
    """600 sequences of 1,500 tokens hold 118 GB: 25 ms to read, 9 ms to compute their layers."""
    found = judged(steps_of(2000, 600, 0.05, kind="short"), tokens=tokens_of(1000, 1000))
    assert found.bound == "memory bandwidth"
    assert found.lever is not None
    assert (found.lever.setting, found.lever.value) == ("model.kv_cache_dtype", "fp8")
    assert found.lever.changes_tokens
    assert found.kv_room == pytest.approx(1.0, abs=0.05)


def test_a_narrow_run_reads_its_weights_for_few_and_is_to_be_wider() -> None:
    setup = replace(SETUP, width=32, can_fp8_kv=False, can_fp8_weights=False)
    found = judged(steps_of(5000, 32, 0.006), setup=setup)
    assert found.bound == "memory bandwidth"
    assert found.lever is not None
    assert (found.lever.setting, found.lever.value) == ("engine.max_num_seqs", 64)
    assert not found.lever.changes_tokens
    assert found.lever.expected_gain == pytest.approx(0.4, abs=0.15)


def test_no_wider_run_is_advised_than_there_are_rows() -> None:
    setup = replace(SETUP, width=32, can_fp8_kv=False, can_fp8_weights=False)
    found = judged(steps_of(500, 32, 0.006), setup=setup, tokens=tokens_of(128, 512, 33))
    assert found.lever is None


def test_rows_that_wait_for_the_kv_cache_are_bound_by_its_room() -> None:
    """Eight sequences fit where 1,024 may run: each step reads the weights for eight."""
    setup = replace(SETUP, kv_tokens=16_000, can_fp8_weights=False)
    found = judged(steps_of(9000, 8, 0.005, kind="short"), setup=setup, tokens=tokens_of(1800, 200))
    assert found.bound == "KV room"
    assert found.lever is not None and found.lever.setting == "model.kv_cache_dtype"
    assert found.lever.expected_gain is not None and found.lever.expected_gain > 0.3


def test_a_gpu_that_may_use_less_memory_than_there_is_gets_more() -> None:
    setup = replace(
        SETUP, kv_tokens=16_000, can_fp8_weights=False, can_fp8_kv=False, utilization=0.15
    )
    found = judged(steps_of(9000, 8, 0.005, kind="short"), setup=setup, tokens=tokens_of(1800, 200))
    assert found.lever is not None
    assert (found.lever.setting, found.lever.value) == ("engine.gpu_memory_utilization", 0.9)
    assert not found.lever.changes_tokens


def test_where_rows_came_too_late_the_input_binds() -> None:
    starved = steps_of(3000, 40, 0.01, kind="starved")
    assert judged(steps_of(300, 1024, 0.05), starved).bound == "input"


def test_a_wait_between_steps_is_the_inputs_too() -> None:
    found = judged(steps_of(300, 1024, 0.05), stalled_s=40.0)
    assert found.bound == "input"
    assert found.waiting == pytest.approx(40 / 55)


def test_a_long_end_with_few_rows_is_the_tail() -> None:
    found = judged(steps_of(200, 1024, 0.05), steps_of(4000, 12, 0.006, kind="tail"))
    assert found.bound == "tail"
    assert found.tail == pytest.approx(24 / 34)


def test_a_short_end_leaves_the_bound_to_the_full_steps() -> None:
    found = judged(steps_of(1000, 1024, 0.05), steps_of(500, 100, 0.01, kind="tail"))
    assert found.bound == "compute"


def test_more_time_between_steps_than_in_them_is_the_hosts() -> None:
    found = judged(steps_of(100, 1024, 0.05), host_s=6.0)
    assert found.bound == "host"
    assert found.host == pytest.approx(6 / 11)


TINY = replace(LLAMA_8B, token_flops=14e6, logits_flops=1e6, weights_bytes=14e6, kv_bytes=1000)
OF_TINY = replace(SETUP, work=TINY, width=64, can_fp8_kv=False, can_fp8_weights=False)


def test_steps_that_take_as_long_whatever_they_hold_are_to_hold_more() -> None:
    """A model of some megabytes: a millisecond of launches for microseconds of arithmetic."""
    full, end = steps_of(1000, 64, 0.002), steps_of(100, 16, 0.0018, kind="tail")
    found = judged(full, end, setup=OF_TINY)
    assert found.bound == "step overhead"
    assert found.lever is not None
    assert (found.lever.setting, found.lever.value) == ("engine.max_num_seqs", 128)
    assert found.lever.expected_gain == pytest.approx(0.7, abs=0.1)
    unknown = judged(full, end, setup=replace(OF_TINY, peaks=None))
    assert (unknown.bound, unknown.lever.value) == ("step overhead", 128)


def test_slow_steps_whose_time_grows_with_what_they_hold_are_not_to_be_wider() -> None:
    """Kernels that reach little of the peak: half the sequences take half the time."""
    found = judged(steps_of(1000, 64, 0.02), steps_of(100, 16, 0.005, kind="tail"), setup=OF_TINY)
    assert found.bound in ("compute", "memory bandwidth")
    assert found.share_of_roof is not None and found.share_of_roof < 0.01
    assert found.lever is None


def test_of_steps_that_are_all_alike_nothing_is_promised() -> None:
    found = judged(steps_of(1000, 64, 0.002), setup=OF_TINY)
    assert (found.bound, found.lever) == ("step overhead", None)


def test_what_a_step_costs_whatever_it_holds_is_where_the_line_begins() -> None:
    line = [Sized(10, 10 * held, 10 * (0.5 + 0.25 * held)) for held in (1, 3, 9)]
    assert step_overhead(line) == pytest.approx(0.5)
    assert step_overhead(line[:1]) is None
    assert step_overhead([Sized(5, 5, 10.0), Sized(5, 50, 5.0)]) == pytest.approx(1.5)
    assert step_overhead([Sized(5, 5, 1.0), Sized(5, 50, 20.0)]) == 0.0
    assert step_overhead([Sized(5, 0, 1.0)]) is None


def test_steps_wider_than_their_graphs_are_to_get_some() -> None:
    setup = replace(SETUP, graph_width=512, can_fp8_kv=False, can_fp8_weights=False)
    found = judged(steps_of(1000, 1000, 0.054, tokens=1250), setup=setup)
    assert found.lever is not None
    assert found.lever.setting == "engine.options.max_cudagraph_capture_size"
    assert found.lever.value == 1024
    assert found.lever.expected_gain == pytest.approx(0.09)
    assert not found.lever.changes_tokens
    within = judged(steps_of(1000, 500, 0.03, kind="held"), setup=setup)
    assert within.lever is None


def test_eager_mode_is_the_first_to_be_left() -> None:
    found = judged(steps_of(1000, 1000, 0.054), setup=replace(SETUP, is_eager=True))
    assert str(found.lever) == "engine.options.enforce_eager: false, same tokens but for rounding"


def test_of_an_unknown_device_only_the_times_are_told() -> None:
    found = judged(steps_of(1000, 1000, 0.05), host_s=1.0, setup=replace(SETUP, peaks=None))
    assert (found.bound, found.share_of_roof, found.compute, found.peaks) == (
        "unknown",
        None,
        None,
        None,
    )
    assert found.lever is None
    assert "unknown" in str(found)
    lost = judged(steps_of(1000, 1000, 0.05), host_s=100.0, setup=replace(SETUP, peaks=None))
    assert lost.bound == "host"


def test_a_measured_device_without_the_precision_is_unknown() -> None:
    """Nobody measured int8 products of that CPU."""
    cpu = Peaks({"16 bit": 2e11}, 2e10, "measured")
    setup = replace(SETUP, peaks=cpu, work=replace(LLAMA_8B, linear="int8"))
    assert judged(steps_of(10, 8, 1.0), setup=setup).share_of_roof is None


def test_a_card_without_fp8_multiplies_in_16_bits() -> None:
    a100 = peaks_of("NVIDIA A100-SXM4-80GB", "bfloat16", None, "vllm")
    setup = replace(SETUP, peaks=a100, work=replace(LLAMA_8B, linear="fp8"))
    own = replace(SETUP, peaks=a100)
    steps = steps_of(100, 256, 0.1)
    assert judged(steps, setup=setup).compute == judged(steps, setup=own).compute


def test_an_engine_that_does_not_say_what_it_ran_is_taken_by_its_room() -> None:
    """It says that 1,024 ran, and its cache holds 300 of their length."""
    setup = replace(SETUP, kv_tokens=450_000)
    silent = Steps("full", 2000, 2000 * 1024, 0, 70.0)
    found = judged(silent, tokens=tokens_of(1000, 1000, 600), setup=setup)
    assert found.kv_room == pytest.approx(1.0)
    assert found.bound == "memory bandwidth"
    told = Steps("short", 2000, 2000 * 300, 1_199_400, 70.0)
    same = judged(told, tokens=tokens_of(1000, 1000, 600), setup=setup)
    assert found.share_of_roof == pytest.approx(same.share_of_roof, rel=0.02)


def test_the_line_for_people_says_all_of_it() -> None:
    found = judged(steps_of(2000, 600, 0.05, kind="short"), tokens=tokens_of(1000, 1000))
    assert str(found).startswith("1,000 tokens/s, ")
    assert "of the roof of NVIDIA H200, bound by the device's memory bandwidth" in str(found)
    assert str(found).endswith("changes tokens")
    block = found.as_dict()
    assert block["setting"]["key"] == "model.kv_cache_dtype"
    assert block["text"] == str(found)
