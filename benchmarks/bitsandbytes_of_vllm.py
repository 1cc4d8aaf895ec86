"""The loss of vLLM's own bitsandbytes method (0.26 has one), to compare ours with.

    python -m benchmarks.bitsandbytes_of_vllm plain|bnb-nf4|bnb-fp4|bnb-int8

On the demo's reference summaries, as in benchmarks/quantization.py; `plain` is quantized in flight.
Prints a JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from benchmarks.common import DEMO
from benchmarks.quantization import NUM_SCORED_ROWS, TEMPLATE
from tests.support.checkpoints import write_checkpoint


def main(kind: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    tokenizer = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    prompts, num_scored = [], []
    columns = pq.read_table(DEMO / "prompts").slice(0, NUM_SCORED_ROWS)
    for row in columns.select(["description", "reference_summary"]).to_pylist():
        text = TEMPLATE
        for name, value in row.items():
            text = text.replace(f"{{{{ {name} }}}}", value)
        prompts.append({"prompt_token_ids": tokenizer.encode(text).ids})
        scored = f"{row['reference_summary']}<|im_end|>"
        num_scored.append(len(tokenizer.encode(scored, add_special_tokens=False).ids))
    with tempfile.TemporaryDirectory() as folder:
        is_plain = kind == "plain"
        model = DEMO / "model" if is_plain else write_checkpoint(kind, Path(folder) / "model")
        llm = LLM(
            str(model),
            quantization="bitsandbytes" if is_plain else None,
            dtype="bfloat16",
            max_model_len=2048,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 28,
        )
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    logprobs = [
        found[token].logprob
        for output, size in zip(outputs, num_scored, strict=True)
        for token, found in zip(
            output.prompt_token_ids[-size:], output.prompt_logprobs[-size:], strict=True
        )
    ]
    click.echo(json.dumps({"kind": kind, "nll": -float(np.mean(logprobs)), "num": len(logprobs)}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=["plain", "bnb-nf4", "bnb-fp4", "bnb-int8"])
    main(parser.parse_args().kind)
