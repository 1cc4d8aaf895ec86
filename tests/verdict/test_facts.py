"""Where the numbers come from that a verdict is made of: steps, peaks, the model's sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from batchinfer.engine.base import EngineFacts, Running
from batchinfer.model import ModelFacts
from batchinfer.model.shape import Shape
from batchinfer.telemetry import Steps, Tally
from batchinfer.verdict import peaks_of, setup_of, work_of

SHAPE = Shape(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    vocab_size=128256,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    latent_size=0,
    is_tied=False,
    caches_all_tokens=True,
)


def model(quantization: str = "none", shape: Shape | None = SHAPE) -> ModelFacts:
    return ModelFacts(
        path="",
        tokenizer_path="",
        dtype="bfloat16",
        quantization=quantization,
        max_model_len=4096,
        vocab_size=128256,
        eos_token_ids=(),
        weights_bytes=0,
        kv_bytes_per_token=131072,
        digest={},
        shape=shape,
    )


def add(tally: Tally, running: int, tokens: int = 0, **more: float) -> None:
    tally.add_step(
        running,
        tokens,
        is_few=bool(more.get("is_few")),
        is_held=bool(more.get("is_held")),
        begun_s=more.get("begun_s", 0.0),
        ended_s=more.get("begun_s", 0.0) + 1.0,
        stalled_s=more.get("stalled_s", 0.0),
    )


def kinds(tally: Tally) -> dict[str, int]:
    found: dict[str, int] = {}
    for steps in tally.steps():
        found[steps.kind] = found.get(steps.kind, 0) + steps.num_steps
    return found


def test_steps_with_few_rows_are_the_tail_unless_more_rows_come() -> None:
    tally = Tally()
    tally.set_sizes(100, 1000)
    add(tally, 10, is_few=True)
    add(tally, 10, is_few=True)
    assert kinds(tally) == {"tail": 2}
    tally.add_admission()
    add(tally, 7, is_few=True)
    assert kinds(tally) == {"starved": 2, "tail": 1}


def test_a_step_is_full_by_its_sequences_or_by_its_tokens() -> None:
    tally = Tally()
    tally.set_sizes(100, 1000)
    add(tally, 95, 95)
    add(tally, 8, 990)
    add(tally, 50, 50)
    add(tally, 50, 50, is_held=True)
    assert kinds(tally) == {"full": 2, "short": 1, "held": 1}


def test_time_between_steps_is_the_hosts_but_for_waiting() -> None:
    tally = Tally()
    add(tally, 1, begun_s=100.0)
    add(tally, 1, begun_s=101.5, stalled_s=0.2)
    assert tally.host_s == pytest.approx(0.3)


def test_many_sizes_are_few_sums_and_their_totals_are_exact() -> None:
    tally = Tally()
    tally.set_sizes(4096, 65536)
    for running in range(1, 4097):
        add(tally, running, 2 * running)
    found = tally.steps()
    assert len(found) < 100
    assert sum(s.running for s in found) == 4096 * 4097 // 2
    assert sum(s.tokens for s in found) == 4096 * 4097


def test_what_a_request_attends_to_is_counted_token_by_token() -> None:
    """A prompt of 5, two of them cached, and 3 tokens: the last is never read."""
    tally = Tally()
    tally.add_answer(5, 2, 3)
    assert tally.tokens.prompt_context == 3 + 4 + 5
    assert tally.tokens.completion_context == 6 + 7
    assert (tally.tokens.prompt, tally.tokens.decoded, tally.tokens.computed) == (3, 2, 5)


def test_an_8b_models_work_is_what_its_sizes_say() -> None:
    work = work_of(model())
    assert work is not None
    assert work.token_flops == pytest.approx(2 * 6.98e9, rel=0.01)
    assert work.weights_bytes == pytest.approx(15.0e9, rel=0.01)
    assert (work.linear, work_of(model("fp8")).linear) == ("16 bit", "fp8")
    assert work_of(model(shape=None)) is None


def test_kernels_say_what_is_multiplied() -> None:
    facts = EngineFacts(
        name="vllm",
        version="0",
        device="NVIDIA H200",
        dtype="bfloat16",
        quantization="compressed-tensors",
        max_model_len=4096,
        max_num_seqs=1024,
        max_num_batched_tokens=16384,
        kv_cache_tokens=100_000,
        running=Running(kernels=("CutlassFP8ScaledMMLinearKernel",)),
    )
    peaks = peaks_of("NVIDIA H200", "bfloat16", None, "vllm")
    assert setup_of(facts, model("compressed-tensors"), peaks).work.linear == "fp8"
    facts = replace(facts, running=Running(kernels=("MacheteLinearKernel",)))
    assert setup_of(facts, model("int4"), peaks).work.linear == "16 bit"


def test_two_cards_can_do_twice_as_much() -> None:
    peaks = peaks_of("NVIDIA L4", "bfloat16", None, "vllm")
    assert peaks.times(2).bytes_per_s == 600e9


def test_a_variant_of_a_card_is_another_card() -> None:
    for name in ("NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090 D", "NVIDIA H200 MIG 1g.18gb"):
        assert peaks_of(name, "bfloat16", None, "vllm") is None


def test_a_device_is_measured_once_and_for_each_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("os.getloadavg", lambda: (0.5, 0.5, 0.5))
    times = []

    def measure() -> tuple[float, float]:
        times.append(1)
        return 2e11, 3e10

    first = peaks_of("cpu", "bfloat16", measure, "vllm")
    assert peaks_of("cpu", "bfloat16", None, "vllm") == first
    assert first.flops_per_s == {"16 bit": 2e11}
    assert peaks_of("cpu", "float32", measure, "vllm").flops_per_s == {"float32": 2e11}
    assert len(times) == 2
    for path in tmp_path.rglob("*.json"):
        assert json.loads(path.read_text())["bytes_per_s"] == 3e10
        path.write_text("{")
    assert peaks_of("cpu", "bfloat16", None, "vllm") is None, "what is damaged is not believed"


def test_what_was_measured_on_a_busy_machine_is_measured_again_and_the_best_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = iter([(2e11, 1e10), (1e11, 3e10), (9e11, 9e10)])

    def peaks(load: float) -> tuple[float, float]:
        monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
        known = peaks_of("cpu", "bfloat16", lambda: next(found), "vllm")
        return known.flops_per_s["16 bit"], known.bytes_per_s

    assert peaks(1000) == (2e11, 1e10)
    assert peaks(0.1) == (2e11, 3e10)
    assert peaks(0.1) == (2e11, 3e10), "it was quiet: this is it"


def test_a_device_that_cannot_be_measured_stays_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no" / "folder"))
    assert peaks_of("NVIDIA B200", "bfloat16", lambda: None, "vllm") is None


def test_sums_of_steps_add_up() -> None:
    steps = Steps("full", 1, 2, 3, 4.0)
    steps.add(Steps("full", 1, 2, 3, 4.0))
    assert (steps.num_steps, steps.running, steps.tokens, steps.seconds) == (2, 4, 6, 8.0)
