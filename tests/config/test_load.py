"""The job file: what loads, where each value comes from, and what every mistake is called."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from pydantic import ValidationError

from batchinfer.config import (
    Job,
    LoadedJob,
    explain,
    job_from,
    job_schema,
    job_schema_text,
    load_job,
    thaw,
)
from batchinfer.config.yaml12 import load_yaml
from batchinfer.errors import ConfigError

ROOT = Path(__file__).parents[2]
MINIMAL = """\
version: 1
name: small
input:
  path: in/*.parquet
prompt:
  column: text
model:
  path: some/model
output:
  path: out/small
"""

Load = Callable[..., LoadedJob]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a text as `job.yaml` of the current directory, without this process's environment."""
    monkeypatch.chdir(tmp_path)

    def load_text(
        text: str, sets: Sequence[str] = (), environ: Mapping[str, str] | None = None
    ) -> LoadedJob:
        Path("job.yaml").write_text(text)
        return load_job("job.yaml", sets, environ or {})

    return load_text


def problems_of(load: Load, text: str, *args: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *args)
    return str(caught.value).splitlines()


def sampling(**settings: Any) -> Job:
    return job(sampling=settings)


def job(**sections: Any) -> Job:
    data = load_yaml(MINIMAL, "minimal").data
    return Job.model_validate(data | sections)


# --- YAML 1.2 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("0123", 123),
        ("0o17", 15),
        ("0xFf", 255),
        ("-7", -7),
        ("+7", 7),
        ("1_000", "1_000"),
        ("0b101", "0b101"),
        ("12:30:00", "12:30:00"),
        ("2026-11-20", "2026-11-20"),
        ("1e-3", 0.001),
        ("1.", 1.0),
        (".5", 0.5),
        ("1.5E+2", 150.0),
        ("1.2.3", "1.2.3"),
        ("-.inf", float("-inf")),
        ("True", True),
        ("FALSE", False),
        ("tRuE", "tRuE"),
        ("~", None),
        ("NULL", None),
        ("none", "none"),
        ("", None),
        ("'12'", "12"),
        ("!!str 12", "12"),
        ("<<", "<<"),
        ("=", "="),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(written: str, value: object) -> None:
    loaded = load_yaml(f"key: {written}", "x.yaml").data["key"]
    assert loaded == value
    assert type(loaded) is type(value)


def test_every_key_has_its_line_also_in_lists_and_flow_mappings() -> None:
    lines = load_yaml("a:\n  b: 1\n  c:\n    - {d: 1}\n    -\n      e: 2\n", "x.yaml").lines
    expected = {"a": 1, "a.b": 2, "a.c": 3, "a.c.0.d": 4, "a.c.1.e": 6}
    assert {key: lines[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: [1\n", "x.yaml:3: not valid YAML: "),
        ("a: 1\n\tb: 2\n", "x.yaml:2: not valid YAML: "),
        ("a: 1\n---\nb: 1\n", "x.yaml:2: not valid YAML: "),
        ("a: 1\nb: \x07\n", "x.yaml:2: not valid YAML: "),
        ("a: *nobody\n", "x.yaml:1: not valid YAML: "),
    ],
)
def test_what_is_not_yaml_is_refused_with_file_and_line(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_yaml(text, "x.yaml")
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a:\n  b: 1\n  b: 2\n", "x.yaml:3: a.b: given twice, first in line 2"),
        ("1: x\n", "x.yaml:1: key 1 must be text: put it in quotes"),
        ("[a]: x\n", "x.yaml:1: key"),
        ("a: !!timestamp 2026-11-20\n", "x.yaml:1: the tag timestamp is not supported"),
        ("a: !join [b, c]\n", "x.yaml:1: the tag !join is not supported"),
        ("a: 1\nb: !include {c: d}\n", "x.yaml:2: the tag !include is not supported"),
        ("a: !!set {b, c}\n", "x.yaml:1: the tag set is not supported"),
        ("a: !!seq {b: c}\n", "x.yaml:1: the tag seq is not supported"),
        ("a: !!python/object:os.system x\n", "x.yaml:1: the tag"),
        ("a: !!bool no\n", "x.yaml:1: 'no' is not a value of its tag"),
        ("a: &x [1, *x]\n", "x.yaml:1: an alias refers to the value it is in"),
    ],
)
def test_what_a_job_cannot_use_is_a_problem_with_its_line(text: str, problem: str) -> None:
    (found,) = load_yaml(text, "x.yaml").problems
    assert found.startswith(problem)


# --- defaults, precedence, origins --------------------------------------------------------------


def test_a_minimal_job_has_the_documented_defaults(load: Load) -> None:
    loaded = load(MINIMAL).job
    assert loaded.sampling.max_tokens == 256
    assert loaded.sampling.is_greedy
    assert loaded.model.max_model_len is None
    assert loaded.packing.window_rows == 16384
    assert loaded.checkpoint.every_s == 15.0
    assert loaded.engine.max_num_seqs == "auto"
    assert loaded.limits.max_failed_fraction == 0.01
    assert loaded.input.path == ("in/*.parquet",)


def test_set_beats_environment_beats_yaml_beats_default(load: Load) -> None:
    text = MINIMAL + "sampling: {seed: 1, top_k: 1, max_tokens: 1}\n"
    environ = {"BATCHINFER__SAMPLING__SEED": "2", "BATCHINFER__SAMPLING__TOP_K": "2", "HOME": "/"}
    loaded = load(text, ["sampling.seed=3"], environ)
    chosen = loaded.job.sampling
    assert (chosen.seed, chosen.top_k, chosen.max_tokens, chosen.n) == (3, 2, 1, 1)
    origins = [loaded.origins[f"sampling.{key}"] for key in ("seed", "top_k", "max_tokens", "n")]
    assert origins == ["--set", "BATCHINFER__SAMPLING__TOP_K", "job.yaml:11", "default"]


def test_the_environment_of_the_process_counts_unless_another_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(MINIMAL)
    monkeypatch.setenv("BATCHINFER__SAMPLING__SEED", "7")
    assert load_job(path).job.sampling.seed == 7
    assert load_job(path, environ={}).job.sampling.seed is None


def test_explain_names_every_setting_once_with_value_and_origin(load: Load) -> None:
    text = MINIMAL + "engine:\n  options:\n    enforce_eager: true\n"
    rows = explain(load(text, ["engine.options.block_size=32", "output.single_writer=true"]))
    by_key = {key: (value, origin) for key, value, origin in rows}
    assert len(by_key) == len(rows)
    assert by_key["engine.options.enforce_eager"] == ("true", "job.yaml:13")
    assert by_key["engine.options.block_size"] == ("32", "--set")
    assert by_key["output.single_writer"] == ("true", "--set")
    assert by_key["sampling.structured"] == ("null", "default")
    assert by_key["input.s3.region"] == ("null", "default")
    assert by_key["name"] == ('"small"', "job.yaml:2")


def test_a_mapping_for_a_section_changes_the_keys_it_has_and_no_others(load: Load) -> None:
    text = MINIMAL + "sampling: {seed: 1, top_k: 1, structured: {choice: [a, b]}}\n"
    sets = ['sampling={"top_k": 5, "structured": {"choice": ["c", "d"]}}']
    loaded = load(text, sets, {"BATCHINFER__MODEL": '{"dtype": "float32"}'})
    chosen = loaded.job.sampling
    assert (chosen.top_k, chosen.seed) == (5, 1)
    assert chosen.structured is not None and chosen.structured.choice == ("c", "d")
    assert (loaded.job.model.path, loaded.job.model.dtype) == ("some/model", "float32")
    assert loaded.origins["sampling.top_k"] == "--set"
    assert loaded.origins["sampling.seed"] == "job.yaml:11"
    assert loaded.origins["model.dtype"] == "BATCHINFER__MODEL"
    assert load(text, ["sampling.structured=null"]).job.sampling.structured is None


def test_a_mapping_of_free_keys_is_replaced_as_a_whole(load: Load) -> None:
    text = MINIMAL + "engine: {options: {block_size: 16}}\n"
    loaded = load(text, ['engine={"options": {"enforce_eager": true}}'])
    assert loaded.job.engine.options == {"enforce_eager": True}
    assert "engine.options.block_size" not in loaded.origins


def test_an_unknown_key_in_a_mapping_for_a_section_is_refused(load: Load) -> None:
    (problem,) = problems_of(load, MINIMAL + "sampling: {seed: 1}", ['sampling={"tem": 1}'])
    assert problem.startswith("--set: sampling.tem: unknown key")


def test_the_prompt_of_the_file_can_be_swapped_for_another_kind(load: Load) -> None:
    loaded = load(MINIMAL, ["prompt.column=null", "prompt.template=Say {{ text }}!"])
    assert loaded.job.prompt.template == "Say {{ text }}!"


@pytest.mark.parametrize(
    ("assignment", "read", "value"),
    [
        ("model.revision=1234567", lambda job: job.model.revision, "1234567"),
        ("model.revision=1e5", lambda job: job.model.revision, "1e5"),
        ("input.path=2026", lambda job: job.input.path, ("2026",)),
        ("sampling.stop=7", lambda job: job.sampling.stop, ("7",)),
        ('sampling.stop=["a","b"]', lambda job: job.sampling.stop, ("a", "b")),
        ("model.quantization=none", lambda job: job.model.quantization, "none"),
        ("input.filter=a = 'b=c'", lambda job: job.input.filter, "a = 'b=c'"),
    ],
)
def test_an_override_is_json_unless_text_is_wanted(
    load: Load, assignment: str, read: Callable[[Job], object], value: object
) -> None:
    assert read(load(MINIMAL, [assignment]).job) == value


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("addition", "problem"),
    [
        (
            "sampling:\n  temperature: -1",
            "job.yaml:12: sampling.temperature: must be at least 0, got -1",
        ),
        (
            "sampling: {max_tokens: 1.5}",
            "job.yaml:11: sampling.max_tokens: must be a whole number, got 1.5",
        ),
        (
            "sampling: {n: true}",
            "job.yaml:11: sampling.n: must be a whole number, got true",
        ),
        (
            "sampling: {ignore_eos: no}",
            'job.yaml:11: sampling.ignore_eos: must be true or false, got "no"',
        ),
        (
            "limits: {max_seconds: .inf}",
            "job.yaml:11: limits.max_seconds: must be a finite number, got Infinity",
        ),
        (
            "packing: {order: lenght}",
            "job.yaml:11: packing.order: must be one of auto, length, prefix, input, got "
            '"lenght"; did you mean length?',
        ),
        ("packing:", "job.yaml:11: packing: must be a mapping (keys with values), got null"),
        (
            "engine: {max_num_seqs: 0}",
            "job.yaml:11: engine.max_num_seqs: must be auto or a whole number of at least 1, got 0",
        ),
        (
            "sampling:\n  seed: 1\n  n: 2",
            "job.yaml:13: sampling.n: 2 samples need temperature > 0 (greedy samples would be "
            "equal)",
        ),
        (
            "engine:\n  options:\n    max_model_len: 4",
            "job.yaml:13: engine.options.max_model_len: has its own setting: use "
            "model.max_model_len",
        ),
        (
            "engine: {options: {hf_token: abc}}",
            "job.yaml:11: engine.options.hf_token: is a secret; set HF_TOKEN in the environment",
        ),
        # unknown keys
        (
            "sampling:\n  temprature: 1",
            "job.yaml:12: sampling.temprature: unknown key; did you mean sampling.temperature?",
        ),
        ("top_p: 1", "job.yaml:11: top_p: unknown key; did you mean sampling.top_p?"),
        (
            "path: x",
            "job.yaml:11: path: unknown key; did you mean input.path or model.path or output.path?",
        ),
        (
            "limits: {zzz: 1}",
            "job.yaml:11: limits.zzz: unknown key; the keys here are max_failed_fraction, "
            "max_seconds, price_per_hour",
        ),
        ("name: again", "job.yaml:11: name: given twice, first in line 2"),
    ],
)
def test_a_mistake_in_the_file_is_a_sentence_with_its_line(
    load: Load, addition: str, problem: str
) -> None:
    assert problems_of(load, f"{MINIMAL}{addition}\n") == [problem]


@pytest.mark.parametrize(
    ("sets", "environ", "problem"),
    [
        (
            ["sampling.temprature=1"],
            {},
            "--set sampling.temprature: unknown key; did you mean sampling.temperature?",
        ),
        (["samplng.seed=1"], {}, "--set samplng.seed: unknown key; did you mean sampling.seed?"),
        (
            ['sampling={"seed": 1, "top_k": 2, "seed": 3}'],
            {},
            "--set: sampling: seed: given twice",
        ),
        (
            [],
            {"BATCHINFER__SAMPLING__STRUCTURED": '{"json_schema": {"a": 1, "a": 2}}'},
            "BATCHINFER__SAMPLING__STRUCTURED: sampling.structured: a: given twice",
        ),
        (["seed"], {}, '--set "seed": must look like section.key=value'),
        (["sampling.seed=-1"], {}, "--set: sampling.seed: must be at least 0, got -1"),
        (
            ["prompt.column.x=1"],
            {},
            "--set: prompt.column.x: prompt.column is not a mapping; set it as a whole (as JSON)",
        ),
        (
            [],
            {"BATCHINFER__SAMPLNG__SEED": "1"},
            "BATCHINFER__SAMPLNG__SEED: unknown key; did you mean BATCHINFER__SAMPLING__SEED?",
        ),
        (
            [],
            {"BATCHINFER__SEED": "1"},
            "BATCHINFER__SEED: unknown key; did you mean BATCHINFER__SAMPLING__SEED?",
        ),
        (
            [],
            {"BATCHINFER__SAMPLING__SEED": "x"},
            'BATCHINFER__SAMPLING__SEED: sampling.seed: must be a whole number, got "x"',
        ),
    ],
)
def test_a_mistake_in_an_override_names_the_override(
    load: Load, sets: list[str], environ: dict[str, str], problem: str
) -> None:
    assert problems_of(load, MINIMAL, sets, environ) == [problem]


def test_all_problems_are_reported_together(load: Load) -> None:
    text = (
        MINIMAL.replace("  path: some/model\n", "  pth: x\n") + "sampling: {top_p: 2, top_p: 3}\n"
    )
    found = problems_of(load, text, ["nme=x"], {"BATCHINFER__OUTPT": "1"})
    assert found == [
        "job.yaml:11: sampling.top_p: given twice, first in line 11",
        "BATCHINFER__OUTPT: unknown key; did you mean BATCHINFER__OUTPUT?",
        "--set nme: unknown key; did you mean name?",
        "job.yaml:7: model.path: is missing",
        "job.yaml:8: model.pth: unknown key; did you mean model.path?",
        "job.yaml:11: sampling.top_p: must be at most 1, got 2",
    ]


def test_a_file_that_cannot_be_a_job_is_refused_with_its_name(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: no such job file"):
        load_job("no.yaml")
    with pytest.raises(ConfigError, match="is a folder, not a job file"):
        load_job(tmp_path)
    assert problems_of(load, "# nothing\n") == ["job.yaml: the job file is empty"]
    assert problems_of(load, "- a\n") == [
        "job.yaml: must be a mapping (keys with values) at the top"
    ]
    Path("job.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match=r"job\.yaml: is not UTF-8 text"):
        load_job("job.yaml")
    Path("job.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_job("job.yaml", environ={}).job.name == "small"


@pytest.mark.parametrize(
    ("location", "sentence"),
    [
        ("s3://KEY:SECRET@bucket/x", "must not contain credentials"),
        ("s3://KEY:SEC/RET@bucket/x", "must not contain credentials"),
        ("gs://KEY:SECRET@bucket/x", "must not contain credentials"),
        ("KEY:SECRET@s3://bucket/x", "must not contain credentials"),
        ("gs://bucket/x", "must be a local path or s3://bucket/…; gs:// is not supported"),
        ("file:///tmp/x", "file:// is not supported"),
        ("s3:/bucket/x", "must start with s3://"),
        ("s3:///x", "names no bucket"),
        ("", "must not be empty"),
        ("   ", "must not be empty"),
    ],
)
@pytest.mark.parametrize("key", ["input.path", "output.path"])
def test_a_location_is_local_or_s3_and_holds_no_secret(
    load: Load, key: str, location: str, sentence: str
) -> None:
    (problem,) = problems_of(load, MINIMAL, [f"{key}={location}"])
    assert problem.startswith(f"--set: {key}: ")
    assert sentence in problem
    assert "SEC" not in problem


def test_an_access_point_and_a_key_with_an_at_sign_are_not_credentials() -> None:
    paths = ["s3://arn:aws:s3:eu-central-1:123456789012:accesspoint/a/x", "s3://bucket/a@b/c:d"]
    assert job(input={"path": paths}).input.path == tuple(paths)


@pytest.mark.parametrize(
    "endpoint", ["https://user:pw@host", "https://user:p/w@host", "host:9000", "ftp://host"]
)
def test_an_endpoint_is_a_plain_http_url(load: Load, endpoint: str) -> None:
    (problem,) = problems_of(load, MINIMAL, [f"input.s3.endpoint_url={endpoint}"])
    assert "pw" not in problem and "p/w" not in problem


def test_an_endpoint_loses_its_last_slash(load: Load) -> None:
    loaded = load(MINIMAL, ["output.s3.endpoint_url=http://127.0.0.1:5000/"])
    assert loaded.job.output.s3.endpoint_url == "http://127.0.0.1:5000"


def test_a_mistyped_value_is_shown_without_the_credentials_in_it(load: Load) -> None:
    (problem,) = problems_of(load, MINIMAL, ['output.path={"a": "s3://K:S/T@b"}'])
    assert problem == '--set: output.path: must be text, got {"a": "s3://***@b"}'


# --- what sections check ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 2.1},
        {"temperature": 0.001},
        {"temperature": float("nan")},
        {"temperature": "1"},
        {"max_tokens": 0},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"min_p": -0.1},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"repetition_penalty": 0},
        {"stop": [""]},
        {"stop": ["a", "a"]},
        {"stop_token_ids": [-1]},
        {"seed": -1},
        {"seed": 2**63},
        {"n": 0},
        {"n": 2},
        {"logprobs": 21},
        {"logprobs": True},
        {"structured": {}},
        {"structured": {"regex": "("}},
        {"structured": {"choice": []}},
        {"structured": {"choice": ["a", "a"]}},
        {"structured": {"json_schema": "{}"}},
        {"structured": {"json_schema": {"minimum": float("inf")}}},
        {"structured": {"regex": "a", "choice": ["a"]}},
    ],
)
def test_sampling_outside_its_range_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        sampling(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 2, "n": 3},
        {"temperature": 0.01},
        {"top_k": -1},
        {"stop": "\n"},
        {"logprobs": 0},
        {"logprobs": 20},
        {"structured": {"json_schema": {}}},
        {"structured": {"grammar": 'root ::= "a"'}},
    ],
)
def test_sampling_at_its_bounds_is_taken(settings: dict[str, Any]) -> None:
    sampling(**settings)


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ({}, "got none"),
        ({"column": "a", "template": "b"}, "got column and template"),
        ({"messages": []}, "messages"),
        ({"column": "a", "chat_template": "x"}, "only applies to messages and messages_column"),
        (
            {"messages_column": "a", "chat_template_kwargs": {"continue_final_message": True}},
            "cannot set continue_final_message: set prompt.continue_final_message: true",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}], "continue_final_message": True},
            "continue_final_message: needs a last message that is the assistant's",
        ),
        (
            {"column": "a", "continue_final_message": True},
            "continue_final_message: only applies to messages and messages_column",
        ),
        ({"template": "a", "chat_template_kwargs": {"x": 1}}, "only applies to messages"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "role"),
    ],
)
def test_a_prompt_is_exactly_one_kind(prompt: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        job(prompt=prompt)


@pytest.mark.parametrize(
    ("dtype", "canonical"),
    [
        ("auto", "auto"),
        *((name, "float32") for name in ("float32", "fp32", "float")),
        *((name, "float16") for name in ("float16", "fp16", "half")),
        *((name, "bfloat16") for name in ("bfloat16", "bf16")),
    ],
)
def test_short_names_of_dtypes_mean_the_long_ones(dtype: str, canonical: str) -> None:
    model = job(model={"path": "m", "dtype": dtype}).model
    assert model.dtype == model.resolved_dtype == canonical


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("w4a16", "int4"),
        ("w8a8", "int8"),
        ("W8A16", "int8"),
        ("nvfp4", "fp4"),
        ("MXFP4", "fp4"),
        ("nvfp4a16", "fp4"),
        ("fp8_per_block", "fp8"),
        ("fp8_per_tensor", "fp8"),
        ("FP8_DYNAMIC", "fp8"),
        ("mxfp8", "fp8"),
        ("bitsandbytes", "nf4"),
        ("gptq_marlin", "gptq"),
        ("awq_marlin", "awq"),
        ("compressed-tensors", "auto"),
        ("modelopt_fp4", "auto"),
        ("torchao", "auto"),
    ],
)
def test_another_programs_word_is_refused_with_our_name(word: str, meant: str) -> None:
    """Another programs word for a quantization is refused with the name here."""
    with pytest.raises(ValidationError, match=f'write {meant}, .*got "{word}"'):
        job(model={"path": "m", "quantization": word})
    sentence = f"write {meant}, " if meant != "auto" else "Input should be 'none', "
    with pytest.raises(ValidationError, match=sentence):
        job(model={"path": "m", "quantization": "int8", "quantization_fallback": ["bf16", word]})


def test_a_quantization_that_names_a_dtype_decides_it_and_may_not_contradict_it() -> None:
    assert job(model={"path": "m", "quantization": "fp16"}).model.resolved_dtype == "float16"
    job(model={"path": "m", "quantization": "fp16", "dtype": "half"})
    with pytest.raises(ValidationError, match="float32 contradicts quantization fp16"):
        job(model={"path": "m", "quantization": "fp16", "dtype": "float32"})


def test_completions_that_leave_no_room_for_a_prompt_are_refused(load: Load) -> None:
    (problem,) = problems_of(load, MINIMAL, ["model.max_model_len=256"])
    assert problem == (
        "job.yaml: sampling.max_tokens: 256 leaves no room for a prompt in model.max_model_len 256"
    )
    load(MINIMAL, ["model.max_model_len=257"])


@pytest.mark.parametrize("path", ["out/*", "s3://bucket/a?"])
def test_an_output_is_one_folder(path: str) -> None:
    with pytest.raises(ValidationError, match="must be one folder"):
        job(output={"path": path})


def test_a_model_is_a_folder_or_a_hub_name() -> None:
    with pytest.raises(ValidationError, match="s3:// is not supported here"):
        job(model={"path": "s3://bucket/model"})


def test_anonymous_access_with_a_profile_is_refused() -> None:
    with pytest.raises(ValidationError, match="contradicts profile"):
        job(output={"path": "o", "s3": {"anonymous": True, "profile": "p"}})


# --- immutability and round trip ----------------------------------------------------------------


RICH: dict[str, Any] = {
    "input": {"path": ["a", "s3://b/c"], "keep_columns": ["x"], "s3": {"region": "eu-central-1"}},
    "prompt": {
        "messages": [{"role": "user", "content": "{{ x }}"}],
        "chat_template_kwargs": {"a": [1, {"b": None}]},
    },
    "model": {"path": "m", "dtype": "half", "max_model_len": 4096},
    "sampling": {
        "temperature": 0.7,
        "stop": "x",
        "n": 2,
        "structured": {"json_schema": {"required": ["a"]}},
    },
    "engine": {
        "max_num_seqs": 8,
        "devices": [0, 2],
        "options": {"compilation_config": {"level": 0, "sizes": [1, 2]}},
    },
}


def test_a_job_survives_json_and_pickle_unchanged() -> None:
    rich = job(**RICH)
    dumped = rich.model_dump(mode="json")
    assert Job.model_validate(json.loads(json.dumps(dumped))) == rich
    assert pickle.loads(pickle.dumps(rich)) == rich
    assert thaw(rich.engine.options) == RICH["engine"]["options"]


def test_nothing_inside_a_job_can_change() -> None:
    rich = job(**RICH)
    with pytest.raises(ValidationError):
        rich.sampling.n = 3
    options: Any = rich.engine.options
    changes: list[Callable[[], object]] = [
        lambda: options.update(a=1),
        lambda: options.__setitem__("a", 1),
        lambda: options["compilation_config"].pop("level"),
        lambda: options["compilation_config"]["sizes"].append(3),
        lambda: options.__ior__({"a": 1}),
    ]
    for change in changes:
        with pytest.raises((TypeError, AttributeError)):
            change()
    assert rich == job(**RICH)


# --- JSON Schema --------------------------------------------------------------------------------


def test_the_checked_in_schema_is_the_models() -> None:
    checked_in = (ROOT / "schemas/job.schema.json").read_text()
    assert checked_in == job_schema_text(), "write job_schema_text() to schemas/job.schema.json"


def test_the_schema_describes_every_field() -> None:
    """The schema is draft 7 with a description on every field and no open mapping."""
    schema = job_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert "$defs" not in json.dumps(schema)
    for section in [schema, *schema["definitions"].values()]:
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            if "$ref" in field:  # draft 7 ignores whatever stands beside a $ref
                assert list(field) == ["$ref"], name
                field = schema["definitions"][field["$ref"].rpartition("/")[2]]
            assert field["description"], name
            assert "\n" not in field["description"], name


@pytest.mark.parametrize(
    ("sections", "is_valid"),
    [
        ({}, True),
        ({"sampling": {"stop": "x", "structured": {"choice": ["a"]}}}, True),
        ({"model": {"path": "m", "dtype": "half"}}, True),
        ({"engine": {"max_num_seqs": "auto", "options": {"anything": [1]}}}, True),
        ({"sampling": {"temperature": -1}}, False),
        ({"sampling": {"structured": {"choice": ["a"], "regex": "a"}}}, False),
        ({"prompt": {"column": "a", "template": "b"}}, False),
        ({"engine": {"max_num_seqs": 0}}, False),
        ({"typo": 1}, False),
    ],
)
def test_editors_and_the_program_agree(sections: dict[str, Any], is_valid: bool) -> None:
    data = load_yaml(MINIMAL, "minimal").data | sections
    assert jsonschema.Draft7Validator(job_schema()).is_valid(data) is is_valid
    if is_valid:
        Job.model_validate(data)
    else:
        with pytest.raises(ValidationError):
            Job.model_validate(data)


def test_importing_the_config_imports_nothing_heavy() -> None:
    script = "import sys, batchinfer.config; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "batchinfer.config.job" in modules
    heavy = {"vllm", "torch", "transformers", "polars", "pyarrow", "s3fs", "numpy"}
    assert heavy.isdisjoint(modules)


@pytest.mark.parametrize("value", [MappingProxyType({"x": 1}), iter(()), sys.stdout])
def test_a_value_that_cannot_be_copied_is_named_or_taken(value: Any) -> None:
    """A frozen mapping is a mapping; the others are wrong for any key."""
    data = {"version": 1, "name": "a", "input": {"path": "x"}, "prompt": {"column": "a"}}
    data |= {"model": {"path": "x"}, "output": {"path": "y"}}
    if isinstance(value, MappingProxyType):
        assert thaw(job_from({**data, "engine": {"options": value}}).engine.options) == {"x": 1}
    else:
        with pytest.raises(ConfigError, match=r"sampling\.max_tokens"):
            job_from({**data, "sampling": {"max_tokens": value}})
