"""`model.kv_cache_dtype`: what runs where, what is refused; digest and estimate follow it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import polars as pl
import pytest

from batchinfer.cli.doctor import show_kv_caches
from batchinfer.config import Job
from batchinfer.config.precision import KvCacheDtype
from batchinfer.errors import ConfigError
from batchinfer.quantization import (
    KV_CACHE_TABLE,
    Machine,
    choose_kv_cache,
    kv_cache_markdown,
    kv_cache_of,
)
from batchinfer.runner.digest import identity_of
from tests.support.adapters import write_adapter
from tests.support.cpus import needs_avx512, runs_here
from tests.support.jobs import MODEL, ROOT, Place, job, results, rows, run, write_job
from tests.support.models import read_model
from tests.support.run_many import engine_facts, run_many

AVX512 = Machine("cpu", cpu_flags=frozenset({"avx512f"}), engine="vllm")
AVX2 = Machine("cpu", cpu_flags=frozenset({"avx2"}), engine="vllm")
FLOAT8 = {"num_bits": 8, "type": "float"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
H200 = Machine("cuda", compute_capability=(9, 0), engine="vllm")
A100 = Machine("cuda", compute_capability=(8, 0), engine="vllm")


def test_the_job_file_knows_the_names_of_the_table_and_no_other() -> None:
    assert get_args(KvCacheDtype) == ("auto", *(record.name for record in KV_CACHE_TABLE))


def test_the_documented_table_is_the_programs() -> None:
    assert f"\n{kv_cache_markdown('vllm')}\n" in (ROOT / "docs" / "quantization.md").read_text()


@pytest.mark.parametrize(
    ("name", "machine", "head_size", "reason"),
    [
        ("auto", AVX2, 80, None),
        ("fp8", AVX512, 64, None),
        ("fp8_e5m2", AVX512, 128, None),
        ("fp8", AVX2, 64, "CPU with avx512f"),
        ("fp8", AVX512, 80, "multiple of 32 numbers, the model's have 80"),
        (
            "int8_per_token_head",
            AVX512,
            64,
            r"computes something else.* Write model\.kv_cache_dtype: fp8 or fp8_e5m2 or auto$",
        ),
        ("int4_per_token_head", H200, 80, None),
        ("int8_per_token_head", A100, 64, None),
        ("fp8", H200, 80, None),
        ("fp8", A100, 64, r"compute capability 8\.9, this one has 8\.0.*_dtype: int8_per_token"),
        ("fp8_e5m2", H200, 64, "fails with it; fp8"),
        ("fp8_e5m2", Machine(None, engine="vllm"), 80, None),
    ],
)
def test_what_a_machine_cannot_run_is_refused_with_what_to_write(
    name: str, machine: Machine, head_size: int, reason: str | None
) -> None:
    if reason is None:
        assert choose_kv_cache(name, None, machine, head_size) == name
        return
    with pytest.raises(ConfigError, match=f"kv_cache_dtype {name} cannot run here: .*{reason}"):
        choose_kv_cache(name, None, machine, head_size)


@pytest.mark.parametrize(
    ("name", "machine", "words"),
    [
        ("auto", A100, "keeps its KV cache in fp8, which .* 8.0. Write .*: int8_per_token_head or"),
        ("auto", AVX2, "in fp8, which .* with avx512f.*lacks. Give a checkpoint of the model that"),
        ("fp8", A100, "kv_cache_dtype fp8 cannot .* int8_per_token_head or int4_per_token_head, "),
    ],
)
def test_what_the_checkpoint_says_of_its_cache_is_checked_as_what_the_job_says(
    name: str, machine: Machine, words: str
) -> None:
    settings = {"quant_method": "compressed-tensors", "kv_cache_scheme": FLOAT8}
    with pytest.raises(ConfigError, match=words) as caught:
        choose_kv_cache(name, settings, machine, 64)
    assert "or auto" not in str(caught.value)  # which is no way out
    assert choose_kv_cache("auto", settings, H200, 64) == "fp8"
    assert choose_kv_cache("int8_per_token_head", settings, A100, 64) == "int8_per_token_head"


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (None, "auto"),
        ({"quant_method": "awq"}, "auto"),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "fp8"),
        ({"quant_algo": None, "kv_cache_quant_algo": "FP8"}, "auto"),  # no quant_method: not read
        ({"quantization": {"kv_cache_quant_algo": "FP8"}}, "auto"),
        ({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "fp8"}}, "fp8"),
        ({"quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4"}, "auto"),
        (MODELOPT | {"kv_cache_scheme": FLOAT8 | {"dynamic": False}}, "fp8"),
        (MODELOPT | {"kv_cache_scheme": FLOAT8}, "auto"),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": FLOAT8}, "fp8"),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": None}, "auto"),
        ({"quant_method": "fp8", "kv_cache_scheme": "static"}, "auto"),
        ({"quant_method": "fp8", "kv_cache_scheme": FLOAT8}, "auto"),
    ],
)
def test_auto_is_as_the_checkpoint_says(settings: dict[str, Any] | None, found: str) -> None:
    assert kv_cache_of(settings) == found


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [("auto", 256), ("fp8", 128), ("int8_per_token_head", 136), ("int4_per_token_head", 72)],
)
def test_the_bytes_of_a_token_follow_the_name(name: str, num_bytes: int) -> None:
    # Two heads of 64 for keys and for values, 6 layers; 1 GiB held so many on an H200.
    assert read_model(str(MODEL), kv_cache_dtype=name).kv_bytes_per_token == 12 * num_bytes


def test_a_checkpoints_own_cache_dtype_is_counted_under_auto(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert read_model(str(folder)).kv_bytes_per_token == 12 * 128
    with pytest.raises(ConfigError, match="the checkpoint keeps its KV cache in fp8"):
        read_model(str(folder), machine=AVX2)


def test_a_latent_cache_has_one_vector_for_all_heads(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    (folder / "config.json").write_text(json.dumps(config))
    assert read_model(str(folder)).kv_bytes_per_token == 6 * 576 * 2
    assert read_model(str(folder), kv_cache_dtype="fp8").kv_bytes_per_token == 6 * 576


def test_the_digest_has_the_name_only_where_one_is_chosen(folder: Place) -> None:
    def settings_of(name: str) -> dict[str, Any]:
        model = {"path": str(MODEL), "kv_cache_dtype": name}
        found = Job.model_validate(job(folder, model=model))
        return identity_of(found, read_model(str(MODEL))).ingredients["settings"]

    assert "model.kv_cache_dtype" not in settings_of("auto")
    assert settings_of("fp8")["model.kv_cache_dtype"] == "fp8"


def test_vllms_other_word_for_fp8_is_taken(folder: Place) -> None:
    found = Job.model_validate(job(folder, model={"path": "m", "kv_cache_dtype": "fp8_e4m3"}))
    assert found.model.kv_cache_dtype == "fp8"


def test_vllms_own_option_is_refused_with_the_settings_name(folder: Place, tmp_path: Path) -> None:
    folder.write_parquet("in/a.parquet", rows(4))
    settings = job(folder, engine={"options": {"kv_cache_dtype": "fp8"}})
    ended = run(write_job(tmp_path, settings))
    assert ended.code == 2
    assert "use model.kv_cache_dtype" in ended.stderr


def test_doctor_and_explain_say_what_a_name_means_here(
    folder: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_kv_caches(AVX512)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for mark, name, *_ in lines if mark == "ok"] == ["fp8", "fp8_e5m2"]
    assert [name for _, name, *_ in lines] == [record.name for record in KV_CACHE_TABLE]
    model = {"path": str(MODEL), "kv_cache_dtype": "int8_per_token_head"}
    explained = run(write_job(tmp_path, job(folder, model=model)), command=("explain",))
    assert "KV cache int8_per_token_head: 8-bit integer" in explained.stdout


def compute(
    folder: Place, tmp_path: Path, changes: Mapping[str, Mapping[str, Any]], **engine: Any
) -> tuple[dict[str, pl.DataFrame], dict[str, dict[str, Any]]]:
    """Results and engine facts of a job for each change of its model, all in one process."""
    folder.write_parquet("in/a.parquet", rows(12))
    paths = []
    for name, change in changes.items():
        settings = job(
            folder,
            name,
            model={"path": str(MODEL), "dtype": "float32", "max_model_len": 256, **change},
            sampling={"max_tokens": 8, "logprobs": 0, "prompt_logprobs": True},
            engine={"max_num_seqs": 8, "options": engine},
        )
        paths.append(write_job(tmp_path, settings, f"{name}.yaml"))
    done = run_many(*paths)
    assert [code for code, _ in done] == [0] * len(changes), done
    tables = {name: results(folder, name).sort("row") for name in changes}
    return tables, {name: engine_facts(folder.url(name, "a.parquet")) for name in changes}


def mean_difference(one: pl.DataFrame, other: pl.DataFrame) -> float:
    """Of the prompts' logprobs."""
    left, right = (table["prompt_token_logprobs"].explode() for table in (one, other))
    difference: Any = (left - right).drop_nans().abs().mean()
    return float(difference)


@pytest.mark.real_engine
@needs_avx512
def test_fp8_is_really_applied_and_counted_as_vllm_takes_it(folder: Place, tmp_path: Path) -> None:
    block_bytes = 128 * read_model(str(MODEL), dtype="float32").kv_bytes_per_token
    own = Path(shutil.copytree(MODEL, tmp_path / "own"))
    config = json.loads((own / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "kv_cache_scheme": FLOAT8 | {"strategy": "tensor", "dynamic": False, "symmetric": True},
    }
    (own / "config.json").write_text(json.dumps(config))
    unread = Path(shutil.copytree(MODEL, tmp_path / "unread"))
    said = {"producer": {"name": "modelopt"}, "quantization": {"kv_cache_quant_algo": "FP8"}}
    (unread / "hf_quant_config.json").write_text(json.dumps(said))
    changes: dict[str, dict[str, Any]] = {
        "auto": {},
        "own": {"path": str(own)},
        "unread": {"path": str(unread)},
        "fp8": {"kv_cache_dtype": "fp8"},
        "fp8_e5m2": {"kv_cache_dtype": "fp8_e5m2"},
    }
    tables, engines = compute(folder, tmp_path, changes, kv_cache_memory_bytes=40 * block_bytes)
    tokens = {name: engine["kv_cache_tokens"] for name, engine in engines.items()}
    assert tokens["auto"] == 40 * 128
    assert tokens["fp8"] == tokens["fp8_e5m2"] == 4 * tokens["auto"]  # which is in float32
    for name in ("own", "unread"):  # what the estimate counts is what vLLM takes
        per_token = read_model(str(changes[name]["path"]), dtype="float32").kv_bytes_per_token
        assert tokens[name] == 40 * block_bytes // per_token
    assert (tokens["own"], tokens["unread"]) == (tokens["fp8"], tokens["auto"])
    of_fp8, of_e5m2 = (mean_difference(tables["auto"], tables[n]) for n in ("fp8", "fp8_e5m2"))
    assert 0.001 < of_fp8 < of_e5m2 < 0.5
    for name in ("auto", "fp8", "fp8_e5m2"):
        assert engines[name]["extra"]["kv_cache_dtype"] == name


@pytest.mark.real_engine
def test_an_adapter_is_really_applied_also_beside_quantized_weights(
    folder: Place, tmp_path: Path
) -> None:
    from tests.support.checkpoints import write_checkpoint  # imports torch

    adapters = {
        "zero": write_adapter(tmp_path / "zero", scale=0.0),
        "large": write_adapter(tmp_path / "large", scale=0.2),
    }
    changes: dict[str, dict[str, Any]] = {
        "auto": {},
        "zero": {"lora": str(adapters["zero"])},
        "large": {"lora": str(adapters["large"])},
        "large, nf4": {"lora": str(adapters["large"]), "quantization": "nf4"},
    }
    if runs_here("int4"):
        int4 = write_checkpoint("w4a16", tmp_path / "int4")
        int4_change = {"lora": str(adapters["large"]), "path": str(int4), "dtype": "bfloat16"}
        changes["large, int4"] = int4_change
    tables, engines = compute(folder, tmp_path, changes, kv_cache_memory_bytes=1 << 25)
    assert mean_difference(tables["auto"], tables["zero"]) < 1e-5
    assert tables["zero"]["completion"].equals(tables["auto"]["completion"])
    assert mean_difference(tables["auto"], tables["large"]) > 1
    assert not tables["large"]["completion"].equals(tables["auto"]["completion"])
    assert engines["large"]["extra"]["lora"] == str(adapters["large"])
    for name in changes.keys() - {"auto", "zero"}:
        layers = engines[name]["extra"]["layers"]
        num_quantized = 0 if name == "large" else 24
        assert (layers["num_quantized_layers"], layers["num_layers"]) == (num_quantized, 24)
        # Rounding moves logprobs too, but far less than this adapter.
        of_adapter = mean_difference(tables["auto"], tables["large"])
        assert mean_difference(tables["large"], tables[name]) < of_adapter / 4
