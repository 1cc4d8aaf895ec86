"""What the order of admission is worth: `packing.order` on four kinds of input, one engine each.

    python -m benchmarks.order [--sets a b c d] [--repeats 2] [--json FILE]

The planner, the loop and vLLM as in `batchinfer run`, fed with chunks of 500 rows that are
tokenized already; nothing is written. Orders take turns in one process; the prefix cache is emptied
between them. Equal work for all orders: completions have a fixed length, but for set (a), whose
lengths are skewed; it runs in float32, where a completion does not depend on its batch, and that is
checked. "known lengths" admits by true prompt plus completion length, longest first: what an order
that learns lengths from finished rows could reach at best; it is no setting.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import yaml

from batchinfer.config import Job, load_job
from batchinfer.engine.demands.completion import Completion
from batchinfer.engine.kinds import engine_kind
from batchinfer.engine.vllm.engine import VllmEngine
from batchinfer.plan import Chunk
from batchinfer.runner.factory import build_engine, engine_spec, model_of
from batchinfer.runner.loop import Loop
from batchinfer.runner.ready import ReadyWork
from batchinfer.tasks import Result, task_of
from batchinfer.telemetry import Clock, Counters
from benchmarks.common import DEMO, heading, spread

ORDERS = ("input", "length", "prefix", "auto")
KNOWN = "known lengths"
WINDOW_ROWS = 500

Prompt = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class Set:
    """One kind of input, and an engine that it presses on."""

    what: str
    prompts: Callable[[], list[Prompt]]
    max_tokens: int
    max_num_seqs: int
    kv_tokens: int
    stop_token_ids: tuple[int, ...] = ()  # completions end here: skewed lengths

    @property
    def dtype(self) -> str:
        """Where lengths follow from the completions, they must not depend on the batch."""
        return "float32" if self.stop_token_ids else "bfloat16"


def texts() -> list[Prompt]:
    """The demo's descriptions as token ids."""
    from tokenizers import Tokenizer

    descriptions = pq.read_table(DEMO / "prompts", columns=["description"]).column(0).to_pylist()
    tokenizer = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    encoded = tokenizer.encode_batch_fast(descriptions)
    return [np.array(e.ids, np.int32) for e in encoded]


def skewed(num_rows: int = 500) -> list[Prompt]:
    """Prompts of lognormal length, 20 to 1,500 tokens, cut from the descriptions."""
    rng = np.random.default_rng(1)
    words = np.concatenate(texts())
    lengths = np.clip(rng.lognormal(4.3, 1.0, num_rows), 20, 1500).astype(int)
    starts = rng.integers(0, len(words) - 1500, num_rows)
    return [words[s : s + n] for s, n in zip(starts, lengths, strict=True)]


def documents(num_documents: int = 50, num_questions: int = 40) -> list[Prompt]:
    """Every question on every document of 1,000 to 1,200 tokens, shuffled."""
    rng = np.random.default_rng(2)
    words = np.concatenate(texts())
    sizes = rng.integers(1000, 1200, num_documents)
    starts = np.cumsum(sizes) % (len(words) - 1200)
    lengths = rng.integers(
        8, 160, (num_documents, num_questions)
    )  # no order of lengths groups them
    prompts = [
        np.concatenate([words[s : s + n], words[q * 53 : q * 53 + length]])
        for s, n, row in zip(starts, sizes, lengths, strict=True)
        for q, length in enumerate(row)
    ]
    return [prompts[i] for i in rng.permutation(len(prompts))]


def one_system_prompt(num_rows: int = 500) -> list[Prompt]:
    words = np.concatenate(texts())
    return [np.concatenate([words[:512], text[:120]]) for text in texts()[:num_rows]]


def no_sharing(num_rows: int = 600) -> list[Prompt]:
    """Descriptions after their first words, which are often alike."""
    return [text[4:160] for text in texts()[:num_rows]]


#: Frequent tokens of the demo model's completions: see benchmarks/peers.
STOPS = (4, 28, 46, 68, 75, 326, 508, 811)
SETS = {
    "a": Set("skewed lengths under KV pressure", skewed, 192, 32, 4_096, STOPS),
    "b": Set("50 documents x 40 questions, shuffled", documents, 8, 32, 12_288),
    "c": Set("one system prompt of 512 tokens", one_system_prompt, 24, 64, 65_536),
    "d": Set("no shared prefixes", no_sharing, 32, 64, 65_536),
}


@dataclass(frozen=True, slots=True)
class Measurement:
    order: str
    seconds: float
    cpu_s: float
    num_steps: int  # the same in every repeat: what an order is worth, without the noise of a clock
    num_completion_tokens: int
    num_cached_tokens: int
    digest: str  # of all completions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    click.echo(heading())
    report = {}
    for name in arguments.sets:
        report[name] = measure_set(SETS[name], arguments.repeats)
        click.echo(table(name, SETS[name], report[name]))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def measure_set(
    one: Set, repeats: int, *, model_path: Path = DEMO / "model", load_format: str = "auto"
) -> dict[str, Any]:
    prompts = one.prompts()
    with tempfile.TemporaryDirectory(prefix="batchinfer-order-") as folder:
        job = job_of(one, Path(folder), model_path, load_format)
        model = model_of(job)
        engine_kind(job.engine.name).prepare(engine_spec(job, model))
        task_of(job).prompter(job, model)  # refuses what would not fit
        engine = build_engine(engine_kind(job.engine.name), engine_spec(job, model))
        assert isinstance(engine, VllmEngine)
        block_tokens = engine._core.vllm_config.cache_config.block_size
        measured = measure_orders(engine, job, prompts, repeats)
        engine.close()
    best_s = {order: min(m.seconds for m in runs) for order, runs in measured.items()}
    best_cpu_s = {order: min(m.cpu_s for m in runs) for order, runs in measured.items()}
    num_prompt_tokens = sum(map(len, prompts))
    return {
        "what": one.what,
        "rows": len(prompts),
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": measured["input"][0].num_completion_tokens,
        "max_num_seqs": one.max_num_seqs,
        "kv_cache_tokens": engine.facts.kv_cache_tokens,
        "ideal_hit_rate": ideal_cached(prompts, block_tokens) / num_prompt_tokens,
        "orders": {
            order: {
                "seconds": [m.seconds for m in runs],
                "cpu_s": [m.cpu_s for m in runs],
                "ratio_to_input": best_s[order] / best_s["input"],
                "cpu_ratio_to_input": best_cpu_s[order] / best_cpu_s["input"],
                "steps": runs[0].num_steps,
                "hit_rate": runs[0].num_cached_tokens / num_prompt_tokens,
            }
            for order, runs in measured.items()
        },
    }


def job_of(one: Set, folder: Path, model_path: Path, load_format: str) -> Job:
    settings: dict[str, Any] = {
        "version": 1,
        "name": "order",
        "input": {"path": str(folder / "*.parquet")},
        "prompt": {"token_ids_column": "prompt"},
        "model": {"path": str(model_path), "dtype": one.dtype, "max_model_len": 2048},
        "sampling": {
            "max_tokens": one.max_tokens,
            "temperature": 0.0,
            "logprobs": 1,
            "stop_token_ids": list(one.stop_token_ids),
            "ignore_eos": not one.stop_token_ids,
        },
        "engine": {
            "devices": 1,
            "max_num_seqs": one.max_num_seqs,
            "options": {"load_format": load_format},
        },
        "output": {"path": str(folder / "out")},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(settings))
    kv_bytes_per_token = model_of(load_job(path, []).job).kv_bytes_per_token
    settings["engine"]["options"]["kv_cache_memory_bytes"] = one.kv_tokens * kv_bytes_per_token
    path.write_text(yaml.safe_dump(settings))
    return load_job(path, []).job


def measure_orders(
    engine: VllmEngine, job: Job, prompts: list[Prompt], repeats: int
) -> dict[str, list[Measurement]]:
    warm_up = [prompt[:64] + 1 for prompt in prompts[:32]]
    lengths = generate(engine, job, warm_up, "input")[1]
    measured: dict[str, list[Measurement]] = {order: [] for order in ORDERS}
    for repeat in range(repeats):
        turn = repeat % len(ORDERS)
        for order in ORDERS[turn:] + ORDERS[:turn]:
            measurement, lengths = generate(engine, job, prompts, order)
            measured[order].append(measurement)
    if job.sampling.stop_token_ids:
        expected = -(lengths + np.array([len(p) for p in prompts]))
        known = [prompts[i] for i in np.argsort(expected, kind="stable")]
        measured[KNOWN] = [generate(engine, job, known, "input")[0] for _ in range(repeats)]
        if len({m.digest for runs in measured.values() for m in runs}) != 1:
            raise SystemExit("the completions differ between orders: this compares different work")
    return measured


def generate(
    engine: VllmEngine, job: Job, prompts: Sequence[Prompt], order: str
) -> tuple[Measurement, np.ndarray[Any, Any]]:
    """Everything once, with an empty prefix cache. Returns the length of each completion too."""
    engine._core.reset_prefix_cache()
    ready = ReadyWork(order=order, max_tokens=job.packing.buffer_tokens)
    results: list[Result] = []
    counters = Counters(Clock())
    loop = Loop(
        engine,
        ready,
        results.extend,
        counters,
        job=job,
        should_stop=lambda: False,
    )

    def feed() -> None:
        for start in range(0, len(prompts), WINDOW_ROWS):
            window = prompts[start : start + WINDOW_ROWS]
            ready.put(Chunk.of_prompts(window, window=start // WINDOW_ROWS, first_row=start))
        ready.close()

    feeder = threading.Thread(target=feed)
    feeder.start()
    feeder.join(0.5)  # a run reads while the model loads
    started_s, started_cpu_s = time.monotonic(), time.process_time()
    loop.run()
    seconds, cpu_s = time.monotonic() - started_s, time.process_time() - started_cpu_s
    feeder.join()
    lengths = np.zeros(len(prompts), np.int64)
    completions = set()
    for result in results:
        row = int(result.chunk.rows[result.index])
        lengths[row] = len(Completion.of(result.answer).token_ids)
        completions.add((prompts[row].tobytes(), Completion.of(result.answer).token_ids.tobytes()))
    digest = hashlib.sha256(repr(sorted(completions)).encode()).hexdigest()
    cached = sum(Completion.of(result.answer).num_cached_tokens for result in results)
    return Measurement(
        order=order,
        seconds=seconds,
        cpu_s=cpu_s,
        num_steps=counters.snapshot().num_steps,
        num_completion_tokens=int(lengths.sum()),
        num_cached_tokens=cached,
        digest=digest,
    ), lengths


def ideal_cached(prompts: Sequence[Prompt], block_tokens: int) -> int:
    """Prompt tokens that an unbounded cache of whole blocks would have. The last is always run."""
    seen: set[bytes] = set()
    num_cached = 0
    for prompt in prompts:
        for stop in range(block_tokens, len(prompt), block_tokens):
            path = hashlib.blake2b(prompt[:stop].tobytes(), digest_size=16).digest()
            num_cached += block_tokens * (path in seen)
            seen.add(path)
    return num_cached


def table(name: str, one: Set, report: dict[str, Any]) -> str:
    lines = [
        f"\n({name}) {one.what}: {report['rows']:,} rows, {report['prompt_tokens']:,} + "
        f"{report['completion_tokens']:,} tokens, {one.max_num_seqs} sequences, "
        f"KV cache of {report['kv_cache_tokens']:,} tokens, {one.dtype}",
        f"{'order':<16} {'time':>6} {'CPU':>6} {'steps':>6} {'cached':>7}  seconds",
    ]
    for order, found in report["orders"].items():
        lines.append(
            f"{order:<16} {found['ratio_to_input']:6.3f} {found['cpu_ratio_to_input']:6.3f} "
            f"{found['steps']:6,} {found['hit_rate']:7.1%}  {spread(found['seconds'])}"
        )
    lines.append(f"{'ideal':<16} {'':>20} {report['ideal_hit_rate']:7.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
