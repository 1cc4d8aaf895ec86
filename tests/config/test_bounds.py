"""Job files and settings without measure: refused with a sentence, in bounded time and memory."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batchinfer.config import load_job
from batchinfer.config.job_file import MAX_JOB_BYTES
from batchinfer.config.problems import settings
from batchinfer.config.yaml12 import MAX_DEPTH, MAX_VALUES, load_yaml
from batchinfer.errors import BatchInferError, ConfigError
from tests.support.jobs import ROOT

JOB = ROOT / "jobs" / "summarize.yaml"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

REFUSED = {
    "aliases that multiply": (BOMB, "100,000 values, counting those that aliases stand for"),
    "aliases that multiply, as a key": (BOMB + "? *i\n: 1\n", "100,000 values"),
    "an alias to what it is in": ("z: &z [*z]\n", "an alias refers to the value it is in"),
    "a key that is in itself": ("z: &z {? *z : 1}\n", "must be text"),
    "open brackets": ("z: " + "[" * 100_000, f"more than {MAX_DEPTH} deep"),
    "nested mappings": ("z: " + "{a: " * 5000, f"more than {MAX_DEPTH} deep"),
    "nested blocks": ("z:\n  " + "- " * 3000 + "x\n", f"more than {MAX_DEPTH} deep"),
    "many values": ("z: [" + "1," * (MAX_VALUES + 1) + "]\n", "100,000 values"),
    "long keys, many times": (
        "z: &z ["
        + "1," * 1000
        + "]\n"
        + "".join(f"{'k' * 900}{n}: {{{'k' * 900}: {{{'k' * 900}: *z}}}}\n" for n in range(99)),
        "100,000 values",
    ),
    "an escape beyond Unicode": ('z: "\\UFFFFFFFF"\n', "not valid YAML"),
    "half a character": ('name: "\\ud800"\n', "name: is not valid text: surrogates"),
    "a merge key": ("x: &x {a: 1}\ny: {<<: *x}\n", "y: unknown key"),
    "a number without end": ("z: " + "1" * 5000 + "\n", "is not a value of its tag"),
}


@pytest.mark.parametrize(("text", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_a_job_file_that_never_ends_is_refused_soon(
    text: str, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    begun = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_job(path, environ={})
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 3000
    assert time.process_time() - begun < 60


def test_a_bomb_of_aliases_takes_no_memory_to_speak_of(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB.read_text() + BOMB)
    ended = subprocess.run(
        [sys.executable, "-m", "batchinfer", "validate", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
    )
    assert ended.returncode == 2 and "100,000 values" in ended.stderr


def test_a_file_far_larger_than_a_job_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    with path.open("wb") as file:
        file.truncate(MAX_JOB_BYTES + 1)
    with pytest.raises(ConfigError, match="is larger than 4,194,304 bytes"):
        load_job(path, environ={})
    with pytest.raises(ConfigError, match="is larger than"):
        load_job("/dev/zero", environ={})


def test_values_that_aliases_repeat_are_read_while_they_are_few() -> None:
    text = "a: &a [1, 2]\nb: [*a, *a]\n"
    assert load_yaml(text, "x.yaml").data == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


def test_a_character_that_json_escapes_in_two_halves_is_one() -> None:
    assert load_yaml('a: "\\ud83d\\ude00 \u00e9"', "x.yaml").data == {"a": "\U0001f600 \u00e9"}


ODD = [
    *(
        "-1",
        "1e308",
        "1e-320",
        "1e999",
        "NaN",
        "-Infinity",
        str(2**31),
        str(2**63),
        "1" + "0" * 400,
    ),
    *("9" * 5000, "true", "null", '""', r'"\u0000"', r'"\ud800"', '"\udcff"', "[]", "{}"),
    *("[" * 50_000, '{"a":' * 500 + "1" + "}" * 500, '"' + "a" * 100_000 + '"', "~nobody-here/x"),
]


@pytest.mark.parametrize("key", [*settings()])
def test_a_setting_of_any_value_is_taken_or_refused_with_a_sentence(key: str) -> None:
    for value in ODD:
        try:
            load_job(JOB, [f"{key}={value}"], {})
            load_job(JOB, [], {"BATCHINFER__" + key.upper().replace(".", "__"): value})
        except BatchInferError as error:
            assert key.rpartition(".")[0] in str(error)


@pytest.mark.parametrize(
    ("key", "most"),
    [
        ("packing.buffer_tokens", 2**31 - 1),
        ("packing.batch_rows", 2**31 - 1),
        ("checkpoint.every_rows", 2**31 - 1),
        ("checkpoint.every_s", 10**9),
        ("sampling.max_tokens", 2**31 - 1),
        ("sampling.top_k", 2**31 - 1),
        ("sampling.repetition_penalty", 10**6),
        ("sampling.stop_token_ids", 2**31 - 1),
        ("model.max_model_len", 2**31 - 1),
        ("model.tensor_parallel_size", 2**31 - 1),
        ("model.cpu_offload_gib", 10**6),
        ("engine.max_num_seqs", 2**31 - 1),
        ("engine.max_num_batched_tokens", 2**31 - 1),
    ],
)
def test_numbers_have_an_upper_bound(key: str, most: int) -> None:
    text = f"[{most + 1}]" if key == "sampling.stop_token_ids" else str(most + 1)
    with pytest.raises(ConfigError, match=rf"{key}.* {most}\b"):
        load_job(JOB, [f"{key}={text}"], {})


@pytest.mark.parametrize("variable", ["BATCHINFER__", "BATCHINFER____", "BATCHINFER__NAME__X"])
def test_a_malformed_variable_is_named(variable: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        load_job(JOB, [], {variable: "1"})
