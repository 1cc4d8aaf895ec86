"""Which outputs a job may go on with: what decides results, and what was recorded of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from batchinfer.config import Job, deciding_values
from batchinfer.engine.vllm.options import HARMLESS_OPTIONS, deciding_options
from batchinfer.runner.digest import Identity, identity_of
from tests.support.jobs import MODEL, Place, job, results, run, stable, write_job
from tests.support.models import read_model

#: An output that version 0.1.0 (commit eb23c6f) left when it was killed: one shard is finished, of
#: the other there are two parts. Made with the fake engine.
OLD = Path(__file__).parents[1] / "data" / "output_of_0.1.0"
OPTIONS = {"load_format": "auto", "logprobs_mode": "raw_logprobs"}


def job_of_old(place: Place, output: str = "begun", **sections: Any) -> dict[str, Any]:
    settings = job(
        place,
        output,
        model={"path": str(MODEL), "dtype": "float32"},
        packing={"window_rows": 16},
        engine={"options": OPTIONS},
    )
    for name, section in sections.items():
        settings[name] = section if name == "prompt" else settings[name] | section
    return settings


def identity(**sections: Any) -> Identity:
    found = Job.model_validate(job_of_old(Place("x"), **sections))
    model = read_model(
        str(MODEL),
        dtype="float32",
        kv_cache_dtype=found.model.kv_cache_dtype,
        max_model_len=found.model.max_model_len,
    )
    return identity_of(found, model)


def old_record() -> dict[str, Any]:
    return json.loads((OLD / "begun" / "_batchinfer" / "job.json").read_text())


@pytest.fixture
def old(tmp_path: Path) -> Place:
    shutil.copytree(OLD, tmp_path / "old")
    return Place(str(tmp_path / "old"))


def test_an_output_of_an_earlier_version_is_continued(old: Place, tmp_path: Path) -> None:
    finished = Path(old.url("begun", "a.parquet")).read_bytes()
    ended = run(write_job(tmp_path, job_of_old(old)))
    assert (ended.code, ended.result["rows"]) == (0, 26), ended.stderr
    assert ended.result["rows_computed"] < 20  # what was durable is not computed again
    assert ended.result["rows_cut"] is None  # 0.1.0 did not count them
    assert Path(old.url("begun", "a.parquet")).read_bytes() == finished
    whole = run(write_job(tmp_path, job_of_old(old, "whole")))
    assert whole.code == 0
    assert stable(results(old, "begun")).equals(stable(results(old, "whole")))
    again = run(write_job(tmp_path, job_of_old(old)))
    assert again.code == 0
    assert "nothing to do" in again.stderr  # told by the digest that it was begun with


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [
        ("sampling", {"max_tokens": 17}, "sampling.max_tokens: was 16, is 17"),
        ("prompt", {"template": "{{ id }}"}, 'prompt.template: was "{{ text }}", is "{{ id }}"'),
        ("input", {"filter": "id > 'r'"}, "input.filter: was null"),
        ("model", {"kv_cache_dtype": "fp8"}, 'model.kv_cache_dtype: was "auto", is "fp8"'),
        ("model", {"max_model_len": 512}, "model.max_model_len: was 2048, is 512"),
        # Frozen since, and not in the ingredients that 0.1.0 recorded.
        (
            "engine",
            {"options": OPTIONS | {"logprobs_mode": "processed_logprobs"}},
            'engine.options.logprobs_mode: was "raw_logprobs", is "processed_logprobs"',
        ),
        (
            "engine",
            {"options": {"load_format": "auto"}},
            'engine.options.logprobs_mode: was "raw_logprobs", is not given',
        ),
    ],
)
def test_an_earlier_output_is_refused_by_the_setting_that_was_changed(
    section: str, change: dict[str, Any], told: str
) -> None:
    (only,) = identity(**{section: change}).changes_since(old_record())
    assert only.startswith(told)


def test_the_same_settings_are_not_a_change() -> None:
    assert identity().changes_since(old_record()) == []
    record = {
        "ingredients": identity().ingredients,
        "job": Job.model_validate(job_of_old(Place("x"))).model_dump(mode="json"),
    }
    assert identity().changes_since(json.loads(json.dumps(record))) == []


@pytest.mark.parametrize("command", ["validate", "run", "plan"])
def test_a_refusal_comes_before_the_model_and_names_both_values(
    old: Place, tmp_path: Path, command: str
) -> None:
    changed = {"options": OPTIONS | {"logprobs_mode": "processed_logprobs"}}
    ended = run(write_job(tmp_path, job_of_old(old, engine=changed)), command=(command,))
    assert ended.code == 2
    assert "computed with other settings" in ended.stderr
    assert 'engine.options.logprobs_mode: was "raw_logprobs"' in ended.stderr


def test_a_harmless_engine_option_may_change(old: Place, tmp_path: Path) -> None:
    changed = {"options": OPTIONS | {"enforce_eager": True, "block_size": 32}}
    ended = run(write_job(tmp_path, job_of_old(old, engine=changed)), command=("validate",))
    assert ended.code == 0, ended.stderr


def test_a_setting_at_its_default_is_in_no_digest_and_a_new_one_refuses_nothing() -> None:
    assert identity().ingredients["settings"] == {
        "prompt.template": "{{ text }}",
        "input.id_column": "id",
        "sampling.max_tokens": 16,
        "sampling.logprobs": 1,
        "engine.options": OPTIONS,
    }
    record = old_record()
    del record["job"]["sampling"]["min_p"]  # as if it had come after the output
    assert identity().changes_since(record) == []
    assert identity(sampling={"min_p": 0.5}).changes_since(record) == [
        "sampling.min_p: was 0.0, is 0.5"
    ]


def test_a_new_key_of_a_message_refuses_nothing() -> None:
    record, of_message = old_record(), {"role": "user", "content": "{{ text }}"}
    record["job"]["prompt"] |= {"template": None, "messages": [of_message]}
    assert identity(prompt={"messages": [of_message]}).changes_since(record) == []


def test_a_setting_of_a_later_version_is_not_passed_over() -> None:
    record = old_record()
    record["ingredients"]["settings"] = {"sampling.beams": 4}
    assert identity().changes_since(record) == ["sampling.beams: was 4, is not given"]


def test_a_default_that_has_changed_since_matches_no_older_output() -> None:
    """It does not change (see below); if it does, the values tell, as job.json has all of them."""
    record = old_record()
    record["job"]["sampling"]["top_p"] = 0.9  # then the default
    assert identity().changes_since(record) == ["sampling.top_p: was 0.9, is 1.0"]


def test_one_and_true_are_two_values() -> None:
    record = old_record()
    record["job"]["prompt"]["chat_template_kwargs"] = {"thinking": 1}
    changed = identity(prompt={"template": "{{ text }}"})
    changed = dataclasses.replace(
        changed, settings={**changed.settings, "prompt.chat_template_kwargs": {"thinking": True}}
    )
    assert changed.changes_since(record) == ["prompt.chat_template_kwargs.thinking: was 1, is true"]


def test_what_differs_in_a_long_text_is_shown() -> None:
    record = old_record()
    record["job"]["prompt"]["template"] = "x" * 500 + "{{ text }}" + "y" * 500
    (change,) = identity(prompt={"template": "x" * 500 + "{{ id }}" + "y" * 500}).changes_since(
        record
    )
    assert "{{ text }}" in change
    assert "{{ id }}" in change
    assert len(change) < 200


def test_a_default_of_a_frozen_setting_never_changes() -> None:
    """Outputs that do not name it were computed with it. A new setting is added to this list."""
    nones = (
        "input.id_column input.filter prompt.column prompt.template prompt.messages "
        "prompt.messages_column prompt.token_ids_column prompt.chat_template sampling.seed "
        "sampling.logprobs sampling.structured.json_schema sampling.structured.regex "
        "sampling.structured.choice sampling.structured.grammar sampling.reasoning_parser "
        "sampling.thinking_budget_tokens "
        "score.completion_column score.context score.stride score.top_logprobs"
    )
    per_row = (
        "max_tokens temperature top_p top_k min_p presence_penalty frequency_penalty "
        "repetition_penalty stop stop_token_ids seed logprobs ignore_eos json_schema regex choice "
        "grammar lora"
    )
    nones += "".join(f" sampling.per_row.{name}" for name in per_row.split())
    assert deciding_values({}) == dict.fromkeys(nones.split()) | {
        "input.keep_columns": [],
        "prompt.on_too_long": "error",
        "prompt.continue_final_message": False,
        "prompt.chat_template_kwargs": {},
        "model.kv_cache_dtype": "auto",
        "sampling.max_tokens": 256,
        "sampling.temperature": 0.0,
        "sampling.top_p": 1.0,
        "sampling.top_k": 0,
        "sampling.min_p": 0.0,
        "sampling.presence_penalty": 0.0,
        "sampling.frequency_penalty": 0.0,
        "sampling.repetition_penalty": 1.0,
        "sampling.stop": [],
        "sampling.stop_token_ids": [],
        "sampling.n": 1,
        "sampling.prompt_logprobs": False,
        "sampling.ignore_eos": False,
        "engine.name": "vllm",
        "engine.options": {},
        "task": "generate",
    }


@pytest.mark.parametrize(
    "name",
    [
        "logprobs_mode",
        "structured_outputs_config",
        "reasoning_parser",
        "tokenizer_mode",
        "speculative_config",
        "hf_config_path",
        "hf_overrides",
        "moe_backend",
        "additional_config",
        "what_a_later_vllm_brings",
    ],
)
def test_an_engine_option_is_frozen_unless_it_is_known_to_be_harmless(name: str) -> None:
    assert deciding_options({name: 1, "enforce_eager": True}) == {name: 1}


def test_every_harmless_option_is_one_of_a_supported_vllm() -> None:
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    of_others = {  # in some of 0.26 to 0.33
        "cuda_graph_sizes",
        "disable_log_requests",
        "full_cuda_graph",
        "max_long_partial_prefills",
        "max_num_partial_prefills",
        "swap_space",
        "use_inductor",
    }
    assert known >= HARMLESS_OPTIONS - of_others
