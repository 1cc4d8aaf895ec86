"""Perplexity by the real engine beside a plain forward pass of transformers in float32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from batchinfer.evaluation import Record
from benchmarks.perplexity import DATA, negative_log_likelihoods
from tests.support.jobs import MODEL, run

pytestmark = pytest.mark.real_engine

CONTEXT, STRIDE, ROWS, TOP_K = 96, 32, 24, 5


def likeliest(model: Any, window: list[int]) -> tuple[list[list[float]], list[list[int]]]:
    """Logprobs and ids of the TOP_K likeliest tokens at each position but the first."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([window])).logits[0, :-1].float()
    found = torch.log_softmax(logits, dim=-1).topk(TOP_K)
    return found.values.tolist(), found.indices.tolist()


def check_tops(row: dict[str, Any], wanted: tuple[list[list[float]], list[list[int]]]) -> None:
    """Of the scored tokens, which are the window's last; their order may differ where equal."""
    logprobs, ids = (values[-row["num_scored_tokens"] :] for values in wanted)
    np.testing.assert_allclose(row["top_logprobs"], logprobs, rtol=1e-4, atol=1e-5)
    assert list(map(sorted, row["top_token_ids"])) == list(map(sorted, ids))


@pytest.mark.parametrize("max_model_len", [None, CONTEXT])
def test_perplexity_is_that_of_a_plain_forward_pass_at_every_window(
    max_model_len: int | None, tmp_path: Path
) -> None:
    """Also where a window fills the model, and its last token is the one that is generated."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = ["--quantization", "fp32", "--context", str(CONTEXT), "--stride", str(STRIDE)]
    asked += ["--max-rows", str(ROWS), "--work", str(tmp_path), "--top-k", str(TOP_K)]
    if max_model_len is not None:
        asked += ["--set", f"model.max_model_len={max_model_len}"]
    ended = run(str(MODEL), *asked, command=("perplexity",), engine="real", timeout_s=280)
    assert ended.code == 0, ended.stderr
    record = Record.model_validate_json(ended.stdout)
    model = AutoModelForCausalLM.from_pretrained(str(MODEL), dtype="float32").eval()
    text = "\n".join(pl.read_parquet(DATA)["text"])
    ids = AutoTokenizer.from_pretrained(str(MODEL))(text[:40_000])["input_ids"]
    wanted = negative_log_likelihoods(model, ids, CONTEXT, STRIDE, ROWS)
    rows = pl.read_parquet(tmp_path / "output/*.parquet").sort("row")
    assert rows["num_scored_tokens"].to_list() == [tokens for tokens, _ in wanted]
    for have, (_, nats) in zip(rows["cumulative_logprob"], wanted, strict=True):
        assert math.isclose(-have, nats, rel_tol=1e-4)
    for row in rows.head(3).iter_rows(named=True):
        start = row["row"] * STRIDE
        check_tops(row, likeliest(model, ids[start : start + CONTEXT]))
    nll = math.fsum(nats for _, nats in wanted) / sum(tokens for tokens, _ in wanted)
    assert math.isclose(record.nll or 0, nll, rel_tol=1e-4)
    assert math.isclose(record.perplexity or 0, math.exp(nll), rel_tol=1e-4)
