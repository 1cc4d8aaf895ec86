"""`batchinfer compare` on the real engine: two runs of the demo model give the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import MODEL, run

pytestmark = [pytest.mark.real_engine, pytest.mark.slow, pytest.mark.timeout(900)]


def numbers(out: Path) -> list[dict[str, Any]]:
    records = json.loads((out / "results.json").read_text())["records"]
    return [{**record, "tokens_per_s": None} for record in records]


def test_two_runs_give_identical_numbers(tmp_path: Path) -> None:
    """Nothing is kept from the first run but its numbers: these processes start from the files."""
    spec = {
        "context": 128,
        "stride": 64,
        "max_rows": 6,
        "reference": "demo fp32",
        "entries": [{"model": str(MODEL), "family": "demo", "formats": ["fp32", "int8"]}],
    }
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec))
    for name in ("one", "other"):
        ended = run(
            *(path, "--out", str(tmp_path / name)),
            command=("compare",),
            engine="real",
            spares=(2,),
            timeout_s=440,
        )
        assert ended.code == 0, ended.stderr
    one, other = numbers(tmp_path / "one"), numbers(tmp_path / "other")
    assert one == other
    fp32, int8 = one
    assert (fp32["dtype"], int8["quantization"]) == ("float32", "int8")
    assert 1 < fp32["perplexity"] < 1000
    assert 0 < int8["kl"] < 0.1
    assert int8["top1_agreement"] > 0.8
    assert 8 < int8["layer_bits_per_weight"] < 9 < fp32["layer_bits_per_weight"] == 16
