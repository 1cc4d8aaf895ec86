"""What is remembered of a kind of run, whatever has become of the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchinfer.engine.base import EngineFacts, Running
from batchinfer.runner.width.memory import Remembered, WidthMemory, kind_of_run

FACTS = EngineFacts(
    name="vllm",
    version="0.32.0",
    device="NVIDIA H200",
    dtype="bfloat16",
    quantization="none",
    max_model_len=4096,
    max_num_seqs=1024,
    max_num_batched_tokens=16384,
    kv_cache_tokens=800_000,
    running=Running(kv_cache_dtype="auto", graph_width=1024),
)
FOUND = Remembered(width=512, gain=0.08, completion_tokens=120.5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "batchinfer" / "widths"


def memory_of(facts: EngineFacts = FACTS, **changes: Any) -> WidthMemory:
    kind: dict[str, Any] = {
        "model": {"content": {"config.json": "abc"}},
        "options": {},
        "task": "generate",
        "prompt_tokens": 130.0,
        "max_tokens": 512,
    }
    return WidthMemory(kind_of_run(facts, **(kind | changes)))


def test_what_was_written_is_read() -> None:
    assert memory_of().read() is None
    assert memory_of().write(FOUND)
    assert memory_of().read() == FOUND


@pytest.mark.parametrize(
    "other",
    [
        {"facts": replace(FACTS, device="NVIDIA H100")},
        {"facts": replace(FACTS, version="0.33.0")},
        {"facts": replace(FACTS, quantization="fp8")},
        {"facts": replace(FACTS, max_num_seqs=512)},
        {"facts": replace(FACTS, running=Running(kv_cache_dtype="fp8", graph_width=1024))},
        {"model": {"content": {"config.json": "abd"}}},
        {"options": {"enforce_eager": True}},
        {"task": "score"},
        {"prompt_tokens": 1000.0},
        {"max_tokens": 128},
        {"max_tokens": None},
    ],
    ids=str,
)
def test_another_kind_of_run_finds_nothing(other: dict[str, Any]) -> None:
    memory_of().write(FOUND)
    assert memory_of(**other).read() is None


@pytest.mark.parametrize("near", [{"prompt_tokens": 100.0}, {"max_tokens": 500}])
def test_rows_of_about_the_same_lengths_are_of_one_kind(near: dict[str, Any]) -> None:
    memory_of().write(FOUND)
    assert memory_of(**near).read() == FOUND


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"width": 8}', b"null", b"\xff\xfe\x00"])
def test_a_damaged_file_is_said_ignored_and_replaced(
    cache: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    memory_of().write(FOUND)
    (path,) = cache.iterdir()
    path.write_bytes(damage)
    assert memory_of().read() is None
    assert f"{path} is ignored, as it is damaged" in caplog.text
    assert memory_of().write(FOUND)
    assert memory_of().read() == FOUND


@pytest.mark.parametrize(
    "change",
    [
        *({"width": width} for width in (0, -8, 1025, 24.0, True, "24", None)),
        {"gain": "much"},
        {"gain": float("nan")},
        {"completion_tokens": None},
        {"device": "NVIDIA A100"},
    ],
    ids=str,
)
def test_numbers_that_cannot_be_are_ignored(cache: Path, change: dict[str, Any]) -> None:
    memory_of().write(FOUND)
    (path,) = cache.iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert memory_of().read() is None


def test_a_folder_in_its_place_is_said_and_nothing_is_remembered(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory_of().write(FOUND)
    (path,) = cache.iterdir()
    path.unlink()
    path.mkdir()
    assert memory_of().read() is None
    assert not memory_of().write(FOUND)
    assert "cannot be remembered" in caplog.text
    assert [p.name for p in cache.iterdir()] == [path.name], "no temporary file stays"
