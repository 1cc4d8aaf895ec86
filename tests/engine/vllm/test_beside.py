"""Options of a job beside what its other keys ask for: neither undoes the other unsaid."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from batchinfer.config import SamplingSettings
from batchinfer.engine.demands.completion import CompletionDemand
from batchinfer.engine.vllm.beside import check_beside, merged
from batchinfer.engine.vllm.options import check_options
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.errors import ConfigError
from batchinfer.model import Lora
from batchinfer.quantization.methods.bitsandbytes.record import VLLM_NAME
from tests.support.adapters import write_adapter
from tests.support.jobs import MODEL, Place, job, rows, run, write_job

DEMAND = CompletionDemand("generate", SamplingSettings())
SETTINGS = VllmSettings(
    model_path=str(MODEL),
    tokenizer_path=str(MODEL),
    dtype="bfloat16",
    max_model_len=256,
    weights_bytes=1,
    kv_bytes_per_token=1,
    demand=DEMAND,
)
ADAPTER = Lora("adapter", 8, ("down_proj", "q_proj"), 2, {})


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        (
            {"quantization": VLLM_NAME},
            {"load_format": "auto"},
            f'load_format: "auto" and .*{VLLM_NAME}',
        ),
        ({"quantization": VLLM_NAME}, {"load_format": VLLM_NAME}, None),
        ({}, {"load_format": "dummy"}, None),
        ({"lora": ADAPTER}, {"lora_target_modules": ["q_proj"]}, "leaves out down_proj, which"),
        ({"adapters": {"a": ADAPTER}}, {"lora_target_modules": []}, "leaves out down_proj, q_proj"),
        ({"lora": ADAPTER}, {"lora_target_modules": ["q_proj", "down_proj", "o_proj"]}, None),
        ({}, {"lora_target_modules": ["q_proj"]}, None),
        (
            {"has_save_mode": True},
            {"kv_transfer_config": {"kv_connector": "LMCacheConnectorV1"}},
            "save_mode has a connector of its own",
        ),
        ({"has_save_mode": True}, {"kv_transfer_config": {"kv_load_failure_policy": "fail"}}, None),
    ],
)
def test_an_option_that_would_undo_another_key_of_the_job_is_refused(
    changes: dict[str, Any], options: dict[str, Any], words: str | None
) -> None:
    settings = dataclasses.replace(SETTINGS, options=options, **changes)
    if words is None:
        check_beside(settings)
        return
    with pytest.raises(ConfigError, match=words):
        check_beside(settings)


def test_a_mapping_keeps_the_keys_that_an_option_does_not_say() -> None:
    ours = {"a_config": {"x": 1, "y": 2}, "structured_outputs_config": {"backend": "xgrammar"}}
    assert merged(ours, {"a_config": {"y": 3}, "b_config": {"z": 4}}) == {
        **ours,
        "a_config": {"x": 1, "y": 3},
        "b_config": {"z": 4},
    }
    assert merged(ours, {"a_config": None}) == ours
    left = {"structured_outputs_config": {"backend": "auto", "disable_any_whitespace": True}}
    assert merged(ours, left)["structured_outputs_config"] == {
        "backend": "xgrammar",
        "disable_any_whitespace": True,
    }


@pytest.mark.parametrize(
    "name", ["structured_outputs_config", "override_generation_config", "hf_overrides"]
)
def test_an_option_with_keys_has_to_be_a_mapping(name: str) -> None:
    for value in ("xgrammar", ["a"], 3):
        with pytest.raises(ConfigError, match=f"{name} must be a mapping, got"):
            check_options({name: value}, DEMAND)
    check_options({name: None}, DEMAND)
    check_options({"compilation_config": 3, "generation_config": "vllm"}, DEMAND)


def test_validate_refuses_what_would_drop_a_part_of_an_adapter(
    folder: Place, tmp_path: Any
) -> None:
    folder.write_parquet("in/a.parquet", rows(2))
    adapter = write_adapter(tmp_path / "adapter", scale=0.1)
    changes = {
        "model": {"path": str(MODEL), "lora": str(adapter)},
        "engine": {"options": {"lora_target_modules": ["q_proj"]}},
    }
    refused = run(write_job(tmp_path, job(folder, **changes)), command=("validate",), engine="real")
    assert refused.code == 2
    assert "lora_target_modules leaves out down_proj" in refused.stderr
