"""What `engine.max_num_seqs: auto` and `max_num_batched_tokens: auto` are measured against.

    python -m benchmarks.sizes [--seqs 64 128 256 512] [--tokens 2048 4096 8192] [--rows 800]

The demo model on this machine's engine, skewed lengths, as many in flight as a run keeps.
One size is varied while the other has its default; then with a KV cache too small for the
sequences, where vLLM evicts and computes again what it evicted. Interleaved, the best run counts.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import click
import numpy as np
import polars as pl

from batchinfer.config import SamplingSettings
from batchinfer.engine.demands.completion import CompletionDemand, CompletionRequest
from batchinfer.engine.vllm.engine import build_vllm_engine
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.engine.vllm.setup import prepare_environment
from batchinfer.runner.width.control import backlog_of
from benchmarks.common import DEMO, heading
from benchmarks.idle import STOP_TOKEN_IDS

MODEL = str(DEMO / "model")
SMALL_KV_TOKENS = 4096
SETTINGS = VllmSettings(
    model_path=MODEL,
    tokenizer_path=MODEL,
    dtype="bfloat16",
    max_model_len=2048,
    weights_bytes=13_906_376,
    kv_bytes_per_token=3072,
    demand=CompletionDemand(
        "generate",
        SamplingSettings(max_tokens=256, logprobs=1, stop_token_ids=tuple(STOP_TOKEN_IDS)),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seqs", type=int, nargs="*", default=[64, 128, 256, 512])
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--small-kv-seqs", type=int, nargs="*", default=[16, 32, 64, 256])
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    prepare_environment(weights_bytes=SETTINGS.weights_bytes, is_local_model=True)
    variants = {f"max_num_seqs {n}": replace(SETTINGS, max_num_seqs=n) for n in arguments.seqs}
    variants |= {
        f"max_num_batched_tokens {n}": replace(SETTINGS, max_num_batched_tokens=n)
        for n in arguments.tokens
    }
    small = {"kv_cache_memory_bytes": SMALL_KV_TOKENS * SETTINGS.kv_bytes_per_token}
    variants |= {
        f"{SMALL_KV_TOKENS} tokens of KV cache, max_num_seqs {n}": replace(
            SETTINGS, max_num_seqs=n, options=small
        )
        for n in arguments.small_kv_seqs
    }
    prompts = _prompts(arguments.rows)
    cpu_s: dict[str, list[float]] = {name: [] for name in variants}
    steps = {}
    for _ in range(arguments.repeats):
        for name, settings in variants.items():
            seconds, steps[name], num_tokens = _run(settings, prompts)
            cpu_s[name].append(seconds)
            click.echo(f"{name}: {seconds:.2f} CPU s, {steps[name]} steps", err=True)
    click.echo(heading())
    click.echo(
        f"{len(prompts)} prompts of {np.mean([len(p) for p in prompts]):.0f} tokens, mean; about "
        f"{num_tokens / len(prompts):.0f} generated; CPU s of the best of {arguments.repeats} runs"
    )
    for name, runs in cpu_s.items():
        click.echo(f"{name:48} {min(runs):6.2f} CPU s {steps[name]:5} steps")


def _prompts(num_rows: int) -> list[np.ndarray]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{MODEL}/tokenizer.json")
    texts = pl.read_parquet(DEMO / "prompts" / "*.parquet")["description"].head(num_rows).to_list()
    encodings = tokenizer.encode_batch([" ".join(text.split()[:60]) for text in texts])
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


def _run(settings: VllmSettings, prompts: list[np.ndarray]) -> tuple[float, int, int]:
    """(CPU seconds, steps, tokens generated), the engine's start apart."""
    engine: Any = build_vllm_engine(settings)
    width = engine.facts.max_num_seqs
    waiting = [CompletionRequest(key, prompt) for key, prompt in enumerate(prompts)][::-1]
    num_steps = num_tokens = num_in_flight = 0
    begun_s = time.process_time()
    while waiting or num_in_flight:
        while waiting and num_in_flight < width + backlog_of(width):
            engine.add(waiting.pop())
            num_in_flight += 1
        completions = engine.step()
        num_in_flight -= len(completions)
        num_tokens += sum(len(completion.token_ids) for completion in completions)
        num_steps += 1
    seconds = time.process_time() - begun_s
    engine.close()
    return seconds, num_steps, num_tokens


if __name__ == "__main__":
    main()
