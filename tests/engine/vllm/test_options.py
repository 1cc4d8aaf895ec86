"""`engine.options`: names that vLLM lacks, and options with which it breaks the job's promises."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from batchinfer.config import SamplingSettings, ScoreSettings, StructuredSettings
from batchinfer.engine.demands.completion import CompletionDemand
from batchinfer.engine.vllm.options import argument_names, check_options
from batchinfer.errors import ConfigError
from batchinfer.tasks import Score
from tests.support.jobs import Place, job, rows, run, write_job

FREE = SamplingSettings(max_tokens=16)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
WITH_SCHEMA = SamplingSettings(structured=StructuredSettings(json_schema=SCHEMA))


def generating(sampling: SamplingSettings) -> CompletionDemand:
    return CompletionDemand("generate", sampling)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("enfore_eager", "did you mean enforce_eager"),
        ("max_num_seq", r"did you mean max_num_seqs\? \(set engine.max_num_seqs\)"),
        ("seed", "set sampling.seed"),
        ("model", "set model.path"),
        ("disable_log_stats", "always on"),
        ("data_parallel_rank", "--slice i/n"),
        ("runner", "follows from task, which may be generate or score"),
    ],
)
def test_an_option_that_cannot_be_given_is_refused_with_what_to_write(
    name: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_options({name: 1}, generating(FREE))


@pytest.mark.filterwarnings("ignore")  # vLLM's own
@pytest.mark.slow
def test_the_names_read_in_vllms_source_are_those_it_has() -> None:
    from vllm.engine.arg_utils import EngineArgs

    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    assert argument_names() == {name for name in fields if not name.startswith("_")}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"speculative_config": {"method": "ngram"}}, "nothing is generated"),
        ({"logprobs_mode": "raw_logits"}, "gives no logprobs, which task: score is for"),
        ({"kv_sharing_fast_prefill": True}, "task: score and engine.options.kv_sharing"),
        ({"skip_tokenizer_init": True}, "skip_tokenizer_init is not supported with task: score"),
        ({"override_generation_config": {"top_k": 1}}, "top_k has no effect with task: score"),
    ],
)
def test_what_scoring_cannot_use_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_options(options, Score(ScoreSettings()).demand)


@pytest.mark.parametrize(
    ("options", "sampling", "words"),
    [
        ({"reasoning_parser": "qwen3"}, {}, "set sampling.reasoning_parser"),
        (
            {"structured_outputs_config": {"reasoning_parser": "qwen3"}},
            {},
            "structured_outputs_config.reasoning_parser cannot be given: set sampling.reasoning",
        ),
        ({}, {"reasoning_parser": "qwen4"}, "has no parser qwen4: did you mean qwen3"),
        ({}, {"reasoning_parser": "//"}, "has no parser //: it has .*deepseek_r1, .*qwen3"),
        ({"reasoning_parser_plugin": "own.py"}, {"reasoning_parser": "own"}, None),
        ({}, {"reasoning_parser": "qwen3", "thinking_budget_tokens": 8}, None),
        ({"skip_tokenizer_init": True}, {"reasoning_parser": "qwen3"}, "skip_tokenizer_init"),
    ],
)
def test_thoughts_are_separated_by_the_jobs_own_setting(
    options: dict[str, Any], sampling: dict[str, Any], words: str | None
) -> None:
    settings = WITH_SCHEMA.model_copy(update=sampling)
    if words is None:
        check_options(options, generating(settings))
        return
    with pytest.raises(ConfigError, match=words):
        check_options(options, generating(settings))


def test_a_form_binds_either_the_answer_or_the_thought_too() -> None:
    inside = {"structured_outputs_config": {"enable_in_reasoning": True}}
    check_options(inside, generating(WITH_SCHEMA))
    thinking = WITH_SCHEMA.model_copy(update={"reasoning_parser": "qwen3"})
    check_options({"structured_outputs_config": {"backend": "guidance"}}, generating(thinking))
    with pytest.raises(ConfigError, match=r"would hold thoughts to sampling.structured.json"):
        check_options(inside, generating(thinking))


@pytest.mark.parametrize(
    ("options", "sampling", "words"),
    [
        ({"skip_tokenizer_init": True}, {}, "needs sampling.ignore_eos"),
        ({"skip_tokenizer_init": True}, {"ignore_eos": True, "stop": ("x",)}, "sampling.stop"),
        ({"skip_tokenizer_init": True}, {"ignore_eos": True}, None),
        ({"speculative_config": {"method": "ngram"}}, {"min_p": 0.1}, "sampling.min_p"),
        ({"speculative_config": {"method": "ngram"}}, {}, None),
        ({"kv_sharing_fast_prefill": True}, {"prompt_logprobs": True}, "prompt_logprobs"),
        (
            {"override_generation_config": {"temperature": 1.0}},
            {},
            "has no effect: set sampling.temperature",
        ),
        ({"override_generation_config": {"eos_token_id": 7}}, {}, None),
    ],
)
def test_an_option_that_breaks_a_promise_of_the_job_is_refused(
    options: dict[str, Any], sampling: dict[str, Any], words: str | None
) -> None:
    settings = FREE.model_copy(update=sampling)
    if words is None:
        check_options(options, generating(settings))
        return
    with pytest.raises(ConfigError, match=words):
        check_options(options, generating(settings))


def test_validate_refuses_them_without_vllm(folder: Place, tmp_path: Path) -> None:
    folder.write_parquet("in/a.parquet", rows(2))
    thinking = {"max_tokens": 8, "structured": {"json_schema": SCHEMA}, "reasoning_parser": "qwen3"}
    options = {"options": {"structured_outputs_config": {"enable_in_reasoning": True}}}
    refused = run(
        write_job(tmp_path, job(folder, sampling=thinking, engine=options)),
        command=("validate",),
    )
    assert refused.code == 2
    assert "reasoning_parser" in refused.stderr
    assert "json_schema" in refused.stderr
    free = write_job(tmp_path, job(folder, sampling=thinking), "free.yaml")
    assert run(free, command=("validate",)).code == 0
    unknown = write_job(tmp_path, job(folder, engine={"options": {"no_such": 1}}), "unknown.yaml")
    assert "not an engine argument" in run(unknown, command=("validate",)).stderr
