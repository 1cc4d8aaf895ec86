"""Jobs on trellis-coded checkpoints: the real engine computes what their weights stand for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from tests.support.jobs import ROOT, Ended, Place, results, run, stable

pytestmark = [pytest.mark.real_engine, pytest.mark.slow, pytest.mark.timeout(900)]

SUMMARIZE = ROOT / "jobs" / "summarize.yaml"


def summarize(
    folder: Place,
    model: Path,
    name: str,
    *sets: str,
    environ: Mapping[str, str] | None = None,
    spares: Sequence[int] = (),
) -> Ended:
    """In float32, which on the CPU is bit-equal whatever shares a batch. One thread, unless
    `environ` says otherwise: several wait for each other at every layer, and others need the cores.
    """
    environ = environ or {"VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0)))}
    prompts = ROOT / "jobs" / "demo" / "prompts" / "prompts-00000-of-00004.parquet"
    few = model.parent / "few.parquet"
    pl.read_parquet(prompts).head(16).write_parquet(few)
    sets = (
        f"model.path={model}",
        "model.dtype=fp32",
        'engine.options={"enable_prefix_caching": false, "enable_chunked_prefill": false}',
        f"input.path={few}",
        "sampling.max_tokens=8",
        f"output.path={folder.url(name)}",
        *sets,
    )
    arguments = [a for s in sets for a in ("--set", s)]
    return run(SUMMARIZE, *arguments, engine="real", timeout_s=280, environ=environ, spares=spares)


@pytest.mark.parametrize("kind", ["qtip", "exl3"])
def test_a_coded_model_gives_the_results_of_the_one_it_decodes_into(
    kind: str, folder: Place, tmp_path: Path
) -> None:
    """Every code, bits that differ among q, k and v, and in EXL3 old signs and a head of its own.

    The model's embedding is tied to its output layer, which EXL3 codes all the same.
    """
    from tests.support.qtip_checkpoints import write_coded

    write_coded(kind, tmp_path / kind, tmp_path / "plain")
    coded = summarize(folder, tmp_path / kind, "coded", f"model.quantization={kind}")
    assert coded.code == 0, coded.stderr
    plain = summarize(folder, tmp_path / "plain", "plain")
    assert plain.code == 0, plain.stderr
    found, expected = results(folder, "coded"), results(folder, "plain")
    assert stable(found).equals(stable(expected))
    assert found.height == 16 and found["error_type"].null_count() == 16
    _layers(folder, "coded")
    log = (Path(folder.url("coded")) / "_batchinfer" / "logs" / "0001.log").read_text()
    assert "trellis-coded layers on a CPU are decoded into float32" in log


@pytest.mark.parametrize("kind", ["qtip", "exl3"])
def test_a_model_whose_weights_stay_packed_gives_the_same_tokens(
    kind: str, folder: Place, tmp_path: Path
) -> None:
    """Every code; q, k and v of different bits; a coded output layer in EXL3."""
    from tests.support.qtip_checkpoints import write_coded

    write_coded(kind, tmp_path / kind)
    decoded = summarize(folder, tmp_path / kind, "decoded", f"model.quantization={kind}")
    assert decoded.code == 0, decoded.stderr
    sets = (f"model.quantization={kind}", "model.keep_packed=true")
    packed = summarize(folder, tmp_path / kind, "packed", *sets)
    assert packed.code == 0, packed.stderr
    found, expected = results(folder, "packed"), results(folder, "decoded")
    assert found["token_ids"].equals(expected["token_ids"])
    off = (found["cumulative_logprob"] - expected["cumulative_logprob"]).abs().max()
    assert isinstance(off, float) and off < 1e-4  # sums of float32 in another order
    log = (Path(folder.url("packed")) / "_batchinfer" / "logs" / "0001.log").read_text()
    assert "trellis-coded layers stay packed in memory, and the CPU decodes them" in log
    loaded = [_layers(folder, name)["weights_bytes"] for name in ("packed", "decoded")]
    assert loaded[0] < loaded[1] / 2


def test_a_layer_that_the_checkpoint_lacks_is_named(folder: Place, tmp_path: Path) -> None:
    """It was computed with whatever was in memory."""
    from safetensors.torch import load_file, save_file

    from tests.support.qtip_checkpoints import write_coded

    write_coded("exl3", tmp_path / "exl3")
    file = tmp_path / "exl3" / "model.safetensors"
    lost = "model.layers.1.mlp.down_proj"
    tensors = {n: t for n, t in load_file(file).items() if not n.startswith(lost)}
    save_file(tensors, file, metadata={"format": "pt"})
    ended = summarize(folder, tmp_path / "exl3", "out", "model.quantization=exl3")
    assert ended.code == 2, ended.stderr
    assert f"neither a trellis nor a weight of {lost}" in ended.stderr


def test_two_workers_with_packed_layers_give_the_tokens_of_one_that_decodes(
    folder: Place, tmp_path: Path
) -> None:
    """Outputs of q, k, v, gate and up are cut, and inputs of o and down; each has a CPU."""
    from tests.support.qtip_checkpoints import write_coded

    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    write_coded("qtip", tmp_path / "qtip", kv_heads=4)
    alone = summarize(folder, tmp_path / "qtip", "alone", "model.quantization=qtip")
    assert alone.code == 0, alone.stderr
    sets = ("model.quantization=qtip", "model.keep_packed=true", "model.tensor_parallel_size=2")
    bound = {"VLLM_CPU_OMP_THREADS_BIND": f"{cpus[0]}|{cpus[1]}"}
    shared = summarize(folder, tmp_path / "qtip", "shared", *sets, environ=bound, spares=(2,))
    assert shared.code == 0, shared.stderr
    found, expected = results(folder, "shared"), results(folder, "alone")
    assert found.height == 16 and found["token_ids"].equals(expected["token_ids"])
    off = (found["cumulative_logprob"] - expected["cumulative_logprob"]).abs().max()
    assert isinstance(off, float) and off < 1e-4  # sums of float32 in another order


def _layers(folder: Place, name: str) -> dict[str, int]:
    footer = pq.read_metadata(folder.url(name, "few.parquet")).metadata[b"batchinfer"]
    layers: dict[str, int] = json.loads(footer)["engine"]["extra"]["layers"]
    assert (layers["num_quantized_layers"], layers["num_layers"]) == (8, 8)
    return layers
