"""Perplexity of a model on WikiText-2 by transformers alone, beside that of a record.

    python -m benchmarks.perplexity MODEL --context 512 --stride 256 --max-rows 20 --record FILE

Written apart from batchinfer.evaluation: a plain forward pass in float32 over each window, whose
new tokens are scored. Prints both figures and their relative difference; exits 1 if it is more than
1e-4. `record.json` lies in the work folder of `batchinfer perplexity`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

DATA = Path(__file__).parents[1] / "batchinfer/evaluation/data/wikitext-2-test.parquet"
TOLERANCE = 1e-4


def negative_log_likelihoods(
    model: Any, ids: list[int], context: int, stride: int, max_rows: int | None
) -> list[tuple[int, float]]:
    """(scored tokens, sum of their NLL in nats) of each window."""
    import torch

    windows: list[tuple[int, float]] = []
    scored = 1  # nothing precedes the first token
    for start in range(0, len(ids), stride):
        stop = min(start + context, len(ids))
        if stop <= scored or len(windows) == max_rows:
            break
        with torch.inference_mode():
            window = torch.tensor([ids[start:stop]], device=model.device)
            logits = model(window).logits[0].float()
        logprobs = torch.log_softmax(logits, dim=-1)
        rows = slice(scored - start - 1, stop - start - 1)
        new = torch.tensor(ids[scored:stop], device=model.device)
        chosen = logprobs[rows].gather(1, new[:, None])[:, 0]
        windows.append((stop - scored, -math.fsum(chosen.double().tolist())))
        scored = stop
    return windows


def main() -> None:
    """Measure, print, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--max-rows", type=int)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = (
        AutoModelForCausalLM.from_pretrained(asked.model, dtype="float32").to(asked.device).eval()
    )
    text = "\n".join(pq.read_table(DATA).sort_by("line")["text"].to_pylist())
    ids = AutoTokenizer.from_pretrained(asked.model)(text)["input_ids"]
    windows = negative_log_likelihoods(model, ids, asked.context, asked.stride, asked.max_rows)
    num_tokens = sum(tokens for tokens, _ in windows)
    nll = math.fsum(nats for _, nats in windows) / num_tokens
    found: dict[str, Any] = {"tokens": num_tokens, "nll": nll, "perplexity": math.exp(nll)}
    if asked.record is None:
        print(json.dumps(found))  # noqa: T201
        return
    record = json.loads(asked.record.read_text())
    away = abs(record["nll"] / nll - 1)
    found |= {"record": record["nll"], "relative_difference": away}
    print(json.dumps(found))  # noqa: T201
    if away > TOLERANCE or record["tokens"] != num_tokens:
        sys.exit(1)


if __name__ == "__main__":
    main()
