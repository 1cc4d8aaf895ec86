"""Jobs on trellis-coded checkpoints: the real engine computes what their weights stand for."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from tests.support.jobs import ROOT, Ended, Place, results, run, stable

pytestmark = [pytest.mark.real_engine, pytest.mark.slow, pytest.mark.timeout(900)]

SUMMARIZE = ROOT / "jobs" / "summarize.yaml"


def summarize(folder: Place, model: Path, name: str, *sets: str) -> Ended:
    """In float32, which on the CPU is bit-equal whatever shares a batch."""
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
    return run(SUMMARIZE, *(a for s in sets for a in ("--set", s)), engine="real", timeout_s=280)


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
    footer = pq.read_metadata(folder.url("coded", "few.parquet")).metadata[b"batchinfer"]
    layers = json.loads(footer)["engine"]["extra"]["layers"]
    assert (layers["num_quantized_layers"], layers["num_layers"]) == (8, 8)
    log = (Path(folder.url("coded")) / "_batchinfer" / "logs" / "0001.log").read_text()
    assert "trellis-coded layers on a CPU are decoded into float32" in log
