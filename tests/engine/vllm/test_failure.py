"""What vLLM's engine core, in a process of its own, tells of its end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchinfer.config import SamplingSettings
from batchinfer.engine.demands.completion import CompletionDemand
from batchinfer.engine.vllm import errors
from batchinfer.engine.vllm.failure import CORE_LOGGER, VARIABLE, Circumstances, tell_failures
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.errors import ConfigError, EngineDied

SETTINGS = VllmSettings(
    model_path="/models/m",
    tokenizer_path="/models/m",
    dtype="float32",
    max_model_len=64,
    weights_bytes=1,
    kv_bytes_per_token=1,
    demand=CompletionDemand("generate", SamplingSettings()),
)
ARGUMENTS = {"model": "/models/m", "max_num_seqs": 8, "max_num_batched_tokens": 64}
CORE = logging.getLogger(CORE_LOGGER)


@pytest.fixture
def circumstances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Circumstances]:
    """Passed on to this very process, as if it were the engine core's. No device is asked."""
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(errors, "construction_error", lambda e, *_: ConfigError(f"start: {e}"))
    monkeypatch.setattr(errors, "step_error", lambda e, *_, **__: EngineDied(f"step: {e}"))
    found = Circumstances(ARGUMENTS, SETTINGS, None, str(tmp_path / "failure.json"))
    found.pass_on(tmp_path / "circumstances")
    before = list(CORE.handlers)
    tell_failures()
    yield found
    CORE.handlers = before


def log(text: str, error: Exception | None) -> None:
    try:
        if error is not None:
            raise error
        CORE.error(text)
    except Exception:
        CORE.exception(text)


def test_a_failed_start_means_what_it_means_to_a_run(circumstances: Circumstances) -> None:
    log("EngineCore failed to start.", ValueError("no room"))
    told = circumstances.told()
    assert type(told) is ConfigError and str(told) == "start: no room"


def test_a_failed_step_means_what_it_means_to_a_run(circumstances: Circumstances) -> None:
    log("EngineCore encountered a fatal error.", RuntimeError("gone"))
    told = circumstances.told()
    assert type(told) is EngineDied and str(told) == "step: gone"


def test_other_errors_of_the_core_are_not_its_end(circumstances: Circumstances) -> None:
    """Of a request that the engine refused, say."""
    log("Unexpected error pre-processing request", ValueError("odd"))
    log("EngineCore failed to start.", None)
    assert circumstances.told() is None


def test_an_engine_whose_end_nobody_waits_for_reports_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    before = list(CORE.handlers)
    tell_failures()
    assert CORE.handlers == before
