"""On a CUDA device (`make test-gpu`): every quantization, KV cache and adapter, really applied."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from batchinfer.engine.hardware import gpus
from batchinfer.engine.vllm.machine import this_machine
from tests.support.adapters import write_adapter
from tests.support.jobs import MODEL, ROOT, Place, job, results, rows, run, write_job
from tests.support.models import read_model
from tests.support.run_many import engine_facts, run_many

pytestmark = [pytest.mark.gpu, pytest.mark.real_engine, pytest.mark.timeout(600)]

log = logging.getLogger(__name__)

#: Group (one process) -> output -> (name in the job, checkpoint, what computes its layers).
#: A checkpoint is a kind of tests/support/checkpoints.py, or a method of `batchinfer quantize`.
CASES: dict[str, dict[str, tuple[str, str | None, str]]] = {
    "unquantized": {
        "bf16": ("bf16", None, "Unquantized"),
        "none": ("none", None, "Unquantized"),
        "fp16": ("fp16", None, "Unquantized"),
        "fp32": ("fp32", None, "Unquantized"),
    },
    "integers": {
        "bf16": ("bf16", None, "Unquantized"),
        "int8": ("int8", "w8a8", "W8A8Int8"),
        "int8-made": ("int8", None, "W8A8Int8"),
        "int4": ("int4", "w4a16", "WNA16"),
        "int4-made": ("int4", None, "WNA16"),
        "awq": ("awq", "awq", "AWQ"),
        "gptq": ("gptq", "gptq", "GPTQ"),
    },
    "fp8": {
        "bf16": ("bf16", None, "Unquantized"),
        "fp8": ("fp8", None, "Fp8PtpcOnline"),
        "fp8-tensor": ("fp8", "fp8-tensor", "Fp8"),
        "fp8-channel": ("fp8", "fp8-channel", "W8A8Fp8"),
        "fp8-block": ("fp8", "fp8-block", "Fp8"),
        "fp8-block-compressed": ("fp8", "fp8-block-compressed", "W8A8Fp8"),
        "fp8-quantized": ("fp8", "quantize fp8", "W8A8Fp8"),
    },
    "fp4": {
        "bf16": ("bf16", None, "Unquantized"),
        "nvfp4": ("fp4", "nvfp4", "W4A4Fp4"),
        "nvfp4-made": ("fp4", None, "Fp4"),
        "mxfp4": ("fp4", "mxfp4", "Mxfp4"),
        "mxfp4-quantized": ("fp4", "quantize mxfp4", "Mxfp4"),
    },
    "bitsandbytes": {
        "bf16": ("bf16", None, "Unquantized"),
        "nf4": ("nf4", None, "Bits4"),
        "nf4-checkpoint": ("nf4", "bnb-nf4", "Bits4"),
        "nf4-nested": ("nf4", "bnb-nf4-nested", "Bits4"),
        "nf4-fp4": ("nf4", "bnb-fp4", "Bits4"),
        "nf4-int8": ("nf4", "bnb-int8", "Bits8"),
    },
}


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("group", CASES)
def test_every_name_quantizes_every_layer(folder: Place, tmp_path: Path, group: str) -> None:
    prompts = pl.read_parquet(ROOT / "jobs" / "demo" / "prompts" / "*.parquet").head(64)
    folder.write_parquet("in/a.parquet", prompts)
    models = {}
    paths = []
    for output, (name, kind, _) in CASES[group].items():
        models[output] = model_of(kind, tmp_path / "models" / output)
        settings = job(
            folder,
            output,
            prompt={"template": "{{ description }}"},
            model={"path": models[output], "quantization": name, "max_model_len": 1024},
            sampling={"max_tokens": 4, "prompt_logprobs": True},
            engine={"options": {"kv_cache_memory_bytes": 1 << 29, "enforce_eager": True}},
        )
        paths.append(write_job(tmp_path, settings, f"{output}.yaml"))
    means = {}
    done = run_many(*paths, timeout_s=580)  # the first time DeepGEMM is compiled, for minutes
    for (output, case), ended in zip(CASES[group].items(), done, strict=True):
        name, _, method = case
        assert ended[0] == 0, (output, ended)
        assert ended[1]["rows"] == 64
        layers = engine_facts(folder.url(output, "a.parquet"))["extra"]["layers"]
        num_quantized = 0 if method == "Unquantized" else 24
        assert (layers["num_quantized_layers"], layers["num_layers"]) == (num_quantized, 24)
        assert all(method in found for found in layers["methods"]), (output, layers)
        facts = read_model(models[output], quantization=name, machine=this_machine())
        assert facts.needs is not None
        assert layers["weights_bytes"] == pytest.approx(facts.needs.weights, rel=0.05), output
        column = pl.read_parquet(folder.url(output, "a.parquet"))["prompt_token_logprobs"]
        means[output] = column.explode().drop_nans().drop_nulls().mean()
        log.info("%s: %s, needs %d, mean %.4f", output, layers, facts.needs.weights, means[output])
    # Rounding costs little where packing and scales are right; by chance a token of 4096 has -8.3.
    bf16 = means.pop("bf16")
    assert means == {name: pytest.approx(bf16, abs=0.2) for name in means}, bf16


def test_doctor_says_of_each_name_whether_it_runs() -> None:
    names = {case[0] for group in CASES.values() for case in group.values()}
    caches = {name for name, (setting, _) in CACHES.items() if setting == "kv_cache_dtype"}
    ended = run(ROOT / "jobs" / "summarize.yaml", command=("doctor",), engine="real")
    assert ended.code == 0, ended.stdout
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert {line[1] for line in lines if line[0] == "ok" and line[2] == "quantization,"} == names
    assert {line[1] for line in lines if line[0] == "ok" and line[2] == "kv_cache_dtype,"} == {
        *caches
    }


#: Output -> the setting of `model`, and how many times the tokens of bfloat16 its cache holds:
#: heads of 64 numbers, and 4 bytes of scale for each.
CACHES: dict[str, tuple[str, float]] = {
    "fp8": ("kv_cache_dtype", 2),
    "fp8_per_token_head": ("kv_cache_dtype", 128 / 68),
    "int8_per_token_head": ("kv_cache_dtype", 128 / 68),
    "int4_per_token_head": ("kv_cache_dtype", 128 / 36),
    "zero": ("lora", 1),
    "large": ("lora", 1),
}


def test_smaller_caches_and_adapters_are_really_applied(folder: Place, tmp_path: Path) -> None:
    folder.write_parquet("in/a.parquet", rows(64))
    paths = []
    for output, (setting, _) in {"auto": ("", 1.0), **CACHES}.items():
        model: dict[str, Any] = {"path": str(MODEL), "max_model_len": 256}
        if setting == "kv_cache_dtype":
            model[setting] = output
        elif setting == "lora":
            scale = 0.05 if output == "large" else 0.0
            model[setting] = str(write_adapter(tmp_path / output, scale=scale))
        settings = job(
            folder,
            output,
            model=model,
            sampling={"max_tokens": 8, "logprobs": 0, "prompt_logprobs": True},
            engine={"options": {"kv_cache_memory_bytes": 1 << 28, "enforce_eager": True}},
        )
        paths.append(write_job(tmp_path, settings, f"{output}.yaml"))
    done = run_many(*paths)
    assert [code for code, _ in done] == [0] * len(paths), done
    tables = {output: results(folder, output).sort("row") for output in ("auto", *CACHES)}
    facts = {output: engine_facts(folder.url(output, "a.parquet")) for output in tables}
    differences = {}
    for output, (setting, times) in CACHES.items():
        one, other = (tables[n]["prompt_token_logprobs"].explode() for n in ("auto", output))
        differences[output] = (one - other).drop_nans().abs().mean()
        log.info(
            "%s: %d tokens, %.5f", output, facts[output]["kv_cache_tokens"], differences[output]
        )
        tokens = facts[output]["kv_cache_tokens"] / facts["auto"]["kv_cache_tokens"]
        assert tokens == pytest.approx(times, rel=0.01)
        assert facts[output]["extra"]["layers"]["num_layers"] == 24
        if setting == "kv_cache_dtype":
            assert facts[output]["extra"]["kv_cache_dtype"] == output
            assert 0 < differences[output] < 0.3
    assert differences["zero"] < 0.02  # other kernels, the same sums
    assert differences["large"] > 0.1


#: Output -> (name in the job, checkpoint). Scales and blocks must not depend on the cut.
ON_TWO = {
    "bf16": ("bf16", None),
    "int8": ("int8", "w8a8"),
    "nf4": ("nf4", None),
    "nf4-checkpoint": ("nf4", "bnb-nf4"),
    "nf4-int8": ("nf4", "bnb-int8"),
}


@pytest.mark.skipif(len(gpus()) < 2, reason="needs two GPUs")
def test_two_gpus_compute_what_one_does(folder: Place, tmp_path: Path) -> None:
    prompts = pl.read_parquet(ROOT / "jobs" / "demo" / "prompts" / "*.parquet").head(64)
    folder.write_parquet("in/a.parquet", prompts)
    paths = {}
    for output, (name, kind) in ON_TWO.items():
        model = {"path": model_of(kind, tmp_path / "models" / output), "quantization": name}
        for num_gpus in (1, 2):
            settings = job(
                folder,
                f"{output}-{num_gpus}",
                prompt={"template": "{{ description }}"},
                model=model | {"max_model_len": 1024, "tensor_parallel_size": num_gpus},
                sampling={"max_tokens": 4, "prompt_logprobs": True},
                engine={"options": {"kv_cache_memory_bytes": 1 << 29, "enforce_eager": True}},
            )
            paths[output, num_gpus] = write_job(tmp_path, settings, f"{output}-{num_gpus}.yaml")
    with ThreadPoolExecutor(5) as pool:
        done = pool.map(lambda path: run(path, engine="real", timeout_s=280), paths.values())
    means = {}
    for (output, num_gpus), ended in zip(paths, done, strict=True):
        assert ended.code == 0, (output, num_gpus, ended.stderr)
        file = folder.url(f"{output}-{num_gpus}", "a.parquet")
        column = pl.read_parquet(file)["prompt_token_logprobs"]
        means[output, num_gpus] = column.explode().drop_nans().drop_nulls().mean()
        log.info("%s on %d: mean %.4f", output, num_gpus, means[output, num_gpus])
    for output in ON_TWO:
        assert means[output, 2] == pytest.approx(means[output, 1], abs=0.003), output


def model_of(kind: str | None, path: Path) -> str:
    """The demo model, or a checkpoint of it that is made in `path`."""
    if kind is None:
        return str(MODEL)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind.startswith("quantize "):
        method = kind.removeprefix("quantize ")
        arguments = (str(path), "--method", method)
        ended = run(
            str(MODEL), *arguments, command=("quantize",), engine="real", environ=os.environ
        )
        assert ended.code == 0, ended.stderr
        return str(path)
    from tests.support.checkpoints import write_checkpoint  # imports torch

    return str(write_checkpoint(kind, path))
