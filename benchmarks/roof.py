"""The roof and the bound that the verdict's arithmetic foresees, beside what an H200 measured.

    python -m benchmarks.roof

Each shape's schedule is simulated with the lengths of its rows, on the H200's peaks, with
Llama-3.1-8B's sizes. The rates are those of docs/benchmarks.md, and of the shapes in
benchmarks/grid.py the best warm ones of its log, whoever reached them. Prints a table in Markdown.
Nothing is run: it takes seconds, on any machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np

from batchinfer.engine.base import EngineFacts, Running
from batchinfer.forecast.forecast import Lengths
from batchinfer.forecast.roof import foreseen
from batchinfer.model import ModelFacts
from batchinfer.model.shape import kv_bytes_per_token, shape_of
from batchinfer.verdict import Lever, peaks_of, setup_of
from benchmarks.common import LLAMA_8B, ROOT
from benchmarks.grid import SHAPES as GRID

CARD = "NVIDIA H200"
GRID_LOG = ROOT / "benchmarks" / "results" / "h200-grid.jsonl"
#: What the engine said of 0.9 of an H200 with this model: GiB that weights and KV cache share.
_ROOM_BYTES = 120 * 1024**3


@dataclass(frozen=True, slots=True)
class Shape:
    """`tokens_per_s`: of completions, measured."""

    name: str
    lengths: Callable[[], Lengths]
    tokens_per_s: float
    is_fp8: bool = False
    width: int = 1024
    kv_dtype: str = "auto"
    graph_width: int = 512


def of_grid(log: Path) -> Iterator[Shape]:
    """In 16 bits, warm; `skewed` is measured above."""
    rates: dict[str, float] = {}
    for line in map(json.loads, log.read_text().splitlines()):
        if "shape" in line and not any(word in line["test"] for word in ("cold", "fp8")):
            rate = line.get("completion_tokens_per_s", 0.0)
            rates[line["shape"]] = max(rate, rates.get(line["shape"], 0.0))
    for name, found in GRID.items():
        if name in rates and not found.is_skewed:
            lengths = equal(found.num_rows, found.num_in, found.num_out, found.num_shared)
            what = f"{name.replace('/', ' / ')}, {found.num_rows:,} rows"
            yield Shape(what, lengths, rates[name], graph_width=1024)


def equal(
    num_rows: int, prompt: int, completion: int, num_cached: int = 0
) -> Callable[[], Lengths]:
    def made() -> Lengths:
        prompts = np.full(num_rows, prompt)
        return Lengths(prompts, prompts - num_cached, np.full(num_rows, completion))

    return made


def skewed(num_rows: int) -> Callable[[], Lengths]:
    """Lognormal prompts of median 256; completions geometric, of 150 tokens, at most 512."""

    def made() -> Lengths:
        random = np.random.default_rng(0)
        prompts = np.clip(random.lognormal(np.log(256), 0.7, num_rows), 32, 2048).astype(np.int64)
        completions = np.minimum(512, random.geometric(1 / 150, num_rows))
        return Lengths(prompts, prompts, completions)

    return made


SHAPES = (
    Shape("lognormal / geometric, 2,048 rows", skewed(2048), 9448.4),
    Shape("the same, fp8 weights", skewed(2048), 10501.3, is_fp8=True),
    Shape("lognormal / geometric, 4,096 rows", skewed(4096), 9456.0, graph_width=1024),
    Shape("256 / 128, 2,048 rows", equal(2048, 256, 128), 11538.9),
    Shape("128 / 512, 2,000 rows", equal(2000, 128, 512), 17637.0),
    Shape("the same, graphs to 1,024", equal(2000, 128, 512), 19246.0, graph_width=1024),
    Shape("the same, 512 wide", equal(2000, 128, 512), 18122.0, width=512),
    Shape(
        "the same, fp8 weights and KV",
        equal(2000, 128, 512),
        21883.0,
        is_fp8=True,
        kv_dtype="fp8",
        graph_width=1024,
    ),
    Shape(
        "128 / 128, 8,000 rows, fp8 weights and KV",
        equal(8000, 128, 128),
        21757.0,
        is_fp8=True,
        kv_dtype="fp8",
        graph_width=1024,
    ),
    Shape(
        "2,040 / 128, 1,500 rows, fp8 weights and KV",
        equal(1500, 2040, 128),
        3046.0,
        is_fp8=True,
        kv_dtype="fp8",
        graph_width=1024,
    ),
)


def main() -> None:
    click.echo("| prompt / completion | measured tokens/s | roof | share | bound | setting |")
    click.echo("|---|---|---|---|---|---|")
    for shape in (*SHAPES, *of_grid(GRID_LOG)):
        lengths, model = shape.lengths(), model_of(shape)
        facts = facts_of(shape, model)
        setup = setup_of(facts, model, peaks_of(CARD, model.dtype, None, "vllm"))
        seconds = float(lengths.completion.sum()) / shape.tokens_per_s
        found, roof = (foreseen(lengths, facts, setup, s) for s in (seconds, None))
        assert found is not None and roof is not None
        share = 100 * (found.share_of_roof or 0)
        click.echo(
            f"| {shape.name} | {shape.tokens_per_s:,.0f} | {roof.tokens_per_s:,.0f} "
            f"| {share:.0f} % | {found.bound} | {_words(found.lever)} |"
        )


def _words(lever: Lever | None) -> str:
    return "none" if lever is None else f"`{lever.setting}: {lever.value}`, {lever.gain}"


def model_of(shape: Shape) -> ModelFacts:
    sizes = replace(shape_of(LLAMA_8B), caches_all_tokens=True)
    return ModelFacts(
        path="",
        tokenizer_path="",
        dtype="bfloat16",
        quantization="fp8" if shape.is_fp8 else "none",
        max_model_len=4096,
        vocab_size=sizes.vocab_size,
        eos_token_ids=(),
        weights_bytes=0,
        kv_bytes_per_token=kv_bytes_per_token(sizes, "bfloat16", shape.kv_dtype),
        digest={},
        shape=sizes,
    )


def facts_of(shape: Shape, model: ModelFacts) -> EngineFacts:
    weights_bytes = 9.1e9 if shape.is_fp8 else 16.1e9
    return EngineFacts(
        name="vllm",
        version="0.26.0",
        device=CARD,
        dtype="bfloat16",
        quantization=model.quantization,
        max_model_len=4096,
        max_num_seqs=shape.width,
        max_num_batched_tokens=16384,
        kv_cache_tokens=int((_ROOM_BYTES - weights_bytes) / model.kv_bytes_per_token),
        running=Running(
            graph_width=shape.graph_width, kv_cache_dtype=shape.kv_dtype, memory_share=0.9
        ),
    )


if __name__ == "__main__":
    main()
