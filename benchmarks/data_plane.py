"""What everything around the engine costs: CPU seconds for a million completion tokens, by stage.

    python -m benchmarks.data_plane [--rows N] [--repeats N] [--json FILE]

The engine is replaced by one that hands out completions of 128 tokens at once. First each stage
alone, on the program's own functions, then a whole run (`run_job`: reader, planner, loop, writer,
ledger, fold, on local disk with fsync), with `logprobs: 1` and 5, all in a process that may use one
core. Then tokenization beside the bare `tokenizers` library on the same texts, on one core and on
all. Stages are repeated in turn; a line is the median. Tokens of prompts are not counted.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import polars as pl
import pyarrow as pa

from batchinfer.config import EngineSettings, Job, PromptSettings, SamplingSettings
from batchinfer.engine.base import EngineFacts, Request, Timing
from batchinfer.engine.demands.completion import Completion
from batchinfer.engine.vllm.output import completion_of
from batchinfer.ledger import Ledger, PartId
from batchinfer.plan import Chunk, WorkItem, plan_buffer
from batchinfer.prompt import Prepared, Prompter, PromptLimit
from batchinfer.prompt.chat import ChatTemplate
from batchinfer.prompt.drafts import Drafter, make_drafter
from batchinfer.prompt.encode import TokenEncoder
from batchinfer.runner import Host, RunOptions, WholeProcess, run_job
from batchinfer.runner.loop import Loop
from batchinfer.sink import build_table, output_schema, write_table
from batchinfer.source import Shard, ShardReader, list_shards
from batchinfer.storage import Store, open_store
from batchinfer.tasks import Generate, Result
from batchinfer.telemetry import Clock, Counters
from batchinfer.testing import FakeKind, register
from benchmarks.common import DEMO, heading

COMPLETION_TOKENS = 128
PROMPT_WORDS = 20
NUM_SHARDS = 8  # of a whole run
PART_ROWS = 512  # checkpoint.every_rows by default
NUM_LOGPROBS = (1, 5)
#: Different completions: more than a part has rows, so that compression finds no repeats.
NUM_COMPLETIONS = 4096
TEMPLATE = "{{ text }} In one sentence:"
PROMPTS = {
    "template": PromptSettings.model_validate({"template": TEMPLATE}),
    "chat": PromptSettings.model_validate({"messages": [{"role": "user", "content": TEMPLATE}]}),
}
AIMS = {1: 1_000_000, 5: 250_000}  # completion tokens/s on one core


class Completions:
    """Real text of 128 tokens with made-up logprobs, in the flat arrays an engine hands out."""

    def __init__(self, num_logprobs: int) -> None:
        texts = pl.read_parquet(DEMO / "prompts" / "*.parquet")["description"].to_list()
        flat = np.concatenate(
            TokenEncoder(str(DEMO / "model")).encode(texts, add_special_tokens=False)
        )
        random = np.random.default_rng(0)
        shape = (NUM_COMPLETIONS, COMPLETION_TOKENS, num_logprobs)
        starts = random.integers(0, len(flat) - COMPLETION_TOKENS, NUM_COMPLETIONS)
        token_ids = flat[starts[:, None] + np.arange(COMPLETION_TOKENS)]
        top_token_ids = random.integers(3, 4096, shape, dtype=np.int32)
        top_token_ids[:, :, 0] = token_ids  # greedy: the likeliest is the one that was chosen
        logprobs = -np.sort(random.exponential(1.0, shape)).astype(np.float32)
        self.offsets = np.arange(COMPLETION_TOKENS + 1, dtype=np.int32) * np.int32(num_logprobs)
        self.token_ids = list(token_ids)
        self.token_logprobs = list(np.ascontiguousarray(logprobs[:, :, 0]))
        self.top_token_ids = list(top_token_ids.reshape(NUM_COMPLETIONS, -1))
        self.top_logprobs = list(logprobs.reshape(NUM_COMPLETIONS, -1))

    def of(self, key: int) -> Completion:
        index = key % NUM_COMPLETIONS
        return Completion(
            key=key,
            token_ids=self.token_ids[index],
            num_text_tokens=COMPLETION_TOKENS,
            finish_reason="length",
            token_logprobs=self.token_logprobs[index],
            top_offsets=self.offsets,
            top_token_ids=self.top_token_ids[index],
            top_logprobs=self.top_logprobs[index],
            timing=Timing(0.001, 0.002, 0.003, 0.006),
        )


class InstantEngine:
    """Everything admitted finishes in the next step."""

    def __init__(self, completions: Completions) -> None:
        self._completions = completions
        self._keys: list[int] = []
        self.facts = EngineFacts("instant", "0", "none", "none", "none", 2048, 1024, 8192, None)

    def num_tokens_in_flight(self) -> int:
        return 0  # each finishes in one step

    @property
    def num_running(self) -> int:
        return self.facts.max_num_seqs

    def add(self, request: Request) -> None:
        self._keys.append(request.key)

    def step(self) -> list[Completion]:
        keys, self._keys = self._keys, []
        return [self._completions.of(key) for key in keys]

    def close(self) -> None:
        pass


class LoopAlone:
    """The loop without threads around it: work is put in, what it emits comes out of `run`."""

    planned_s = 0.0  # nothing is put in order

    def __init__(self, completions: Completions) -> None:
        self._completions = completions
        self._work: deque[WorkItem] = deque()

    def put(self, chunk: Chunk) -> None:
        self._work.extend(work_of(chunk))

    def take(self) -> WorkItem | None:
        return self._work.popleft() if self._work else None

    @property
    def is_exhausted(self) -> bool:
        return not self._work

    def run(self) -> list[Result]:
        results: list[Result] = []
        clock = Clock()
        Loop(
            InstantEngine(self._completions),
            self,  # type: ignore[arg-type]
            results.extend,
            Counters(clock),
            job=job_of(Path("nowhere"), 1),
            should_stop=lambda: False,
        ).run()
        return results


class Shards:
    """A shard's parts in a store, and their fold."""

    def __init__(self, store: Store, schema: pa.Schema, tables: list[pa.Table]) -> None:
        self._schema, self._tables = schema, tables
        self._num_rows = sum(table.num_rows for table in tables)
        self._ledger = Ledger(store, {"digest": "0"}, self._num_rows)

    def publish_parts(self) -> None:
        for number, table in enumerate(self._tables):
            self._ledger.publish_part("rows.parquet", PartId(0, 1, number), table)

    def fold(self) -> int:
        expected = [self._num_rows]
        return self._ledger.finish_shard("rows.parquet", self._schema, expected, lambda: None).rows


@dataclass(slots=True)
class Measured:
    """CPU and wall seconds of repeats that did the same work."""

    rows: int
    cpu_s: list[float]
    wall_s: list[float]
    note: str = ""

    @property
    def cpu_s_per_million(self) -> float:
        """For a million completion tokens, as the median of the repeats."""
        return statistics.median(self.cpu_s) / self.rows / COMPLETION_TOKENS * 1e6

    def line(self, name: str) -> str:
        tokens = self.rows * COMPLETION_TOKENS
        low, high = (spent / tokens * 1e6 for spent in (min(self.cpu_s), max(self.cpu_s)))
        return (
            f"{name:<34}{1e6 / COMPLETION_TOKENS / self.cpu_s_per_million:>10,.0f}"
            f"{1e6 / self.cpu_s_per_million:>13,.0f}{self.cpu_s_per_million:>8.3f} "
            f"{f'({low:.3f} to {high:.3f})':<18}"
            f"{tokens / statistics.median(self.wall_s):>12,.0f}  {self.note}"
        ).rstrip()


Stages = dict[str, Callable[[], int]]  # each returns how many rows it worked on


def measure(
    stages: Stages, repeats: int, before: Mapping[str, Callable[[], Any]]
) -> dict[str, Measured]:
    """Every stage `repeats` times in turn, after a warm-up. `before` it runs what is not timed."""
    measured: dict[str, Measured] = {}
    for turn in range(repeats + 1):
        for name, stage in stages.items():
            if name in before:
                before[name]()
            gc.collect()
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            rows = stage()
            cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
            if turn:
                found = measured.setdefault(name, Measured(rows, [], []))
                found.cpu_s.append(cpu_s)
                found.wall_s.append(wall_s)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4096, help="of a stage; a run has 8 times more")
    parser.add_argument("--repeats", type=int, default=3, help="of a stage; a run has one less")
    parser.add_argument("--json", type=Path, default=None, help="write all numbers to this file")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as name:
            PARTS[arguments.part](Path(name), arguments.rows, arguments.repeats)
        return
    click.echo(heading())
    click.echo(
        f"{arguments.rows:,} rows a stage, {NUM_SHARDS * arguments.rows:,} a run, prompts of "
        f"{PROMPT_WORDS} words, completions of {COMPLETION_TOKENS} tokens, parts of {PART_ROWS} "
        f"rows; 1 warm-up, {arguments.repeats} repeats: median (range)"
    )
    core = max(os.sched_getaffinity(0))
    report: dict[str, Any] = {}
    for part, cores in (("stages", 1), ("runs", 1), ("tokenize", 1), ("tokenize", 0)):
        pinned = ["taskset", "-c", str(core)] if cores else []
        command = [*pinned, sys.executable, "-m", "benchmarks.data_plane", "--part", part]
        command += ["--rows", str(arguments.rows), "--repeats", str(arguments.repeats)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        lines = done.stdout.splitlines()
        name = f"{part}, {'one core' if cores else 'all cores'}"
        report[name] = json.loads(lines[-1])
        click.echo(f"\n{name}\n" + "\n".join(lines[:-1]))
    if arguments.json:
        arguments.json.write_text(json.dumps({"heading": heading(), **report}, indent=1) + "\n")


def total(measured: dict[str, Measured], num_logprobs: int) -> str:
    """The stages from the input file to the durable part, one after the other."""
    of_run = ("read", "render and tokenize, template", "plan", "loop")
    of_sink = (f"{name}, {num_logprobs}" for name in ("table", "Parquet", "durable (fsync)"))
    spent = sum(measured[name].cpu_s_per_million for name in (*of_run, *of_sink))
    without = spent - measured["render and tokenize, template"].cpu_s_per_million
    return (
        f"logprobs {num_logprobs}, read to durable part: {spent:.3f} CPU s for a million tokens, "
        f"{1e6 / spent:,.0f} tokens/s of one core (aim {AIMS[num_logprobs]:,}); "
        f"{1e6 / without:,.0f} with ready prompts"
    )


def show(measured: dict[str, Measured], below: Sequence[str] = ()) -> None:
    """A table for people, then one line of JSON for the process that started this one."""
    title = (
        f"{'':<34}{'rows/':>10}{'tokens/':>13}{'CPU s / million':>17}{'tokens/s':>22}\n"
        f"{'':<34}{'CPU s':>10}{'CPU s':>13}{'tokens (range)':>16}{'by the clock':>23}"
    )
    click.echo("\n".join([title, *(found.line(name) for name, found in measured.items()), *below]))
    click.echo(json.dumps({k: [v.rows, v.cpu_s, v.wall_s, v.note] for k, v in measured.items()}))


def measure_stages(folder: Path, num_rows: int, repeats: int) -> None:
    write_input(folder / "in", num_rows, 1)
    (shard,) = list_shards([str(folder / "in" / "*.parquet")], open_store)
    store = open_store(str(folder / "out"))
    table = read_all(shard)
    rows = table.to_pylist()
    stages: Stages = {"read": lambda: read_all(shard).num_rows}
    before: dict[str, Callable[[], Any]] = {}
    notes: dict[str, str] = {}
    for name, prompt in PROMPTS.items():
        own = prompter(prompt)
        draft = make_drafter(prompt, chat_template())
        stages[f"render, {name}"] = partial(render_all, draft, rows)
        stages[f"render and tokenize, {name}"] = partial(prepare, own, table)
    own = prompter(PROMPTS["template"])
    prepared = own.prepare(table)
    prompt_tokens = len(prepared.token_ids) / num_rows
    notes["render and tokenize, template"] = f"{prompt_tokens:.0f} tokens a prompt"
    notes["plan"] = "duplicates, order"
    stages["plan"] = lambda: len(work_of(chunk_of(table, prepared)))
    completions = Completions(1)
    flat = np.concatenate([completions.of(index).token_ids for index in range(num_rows)])
    offsets = np.arange(num_rows + 1, dtype=np.int64) * COMPLETION_TOKENS
    stages["of table: detokenize"] = lambda: len(own.decode(flat, offsets))
    loop = LoopAlone(completions)
    before["loop"] = lambda: loop.put(chunk_of(table, prepared))
    stages["loop"] = lambda: len(loop.run())
    for k in NUM_LOGPROBS:
        completions = Completions(k)
        alone = LoopAlone(completions)
        alone.put(chunk_of(table, prepared))
        parts = in_parts(alone.run())
        task = Generate(SamplingSettings(logprobs=1))
        schema = output_schema([pa.field("id", pa.string())], task.columns)
        sink = partial(build_table, schema=schema, run=1, task=task, detokenize=own.decode)
        tables = [sink(part) for part in parts]
        encoded = [encode(built) for built in tables]
        outputs = vllm_outputs(completions, min(num_rows, 1024))
        shards = Shards(store, schema, tables)
        before[f"fold, {k}"] = shards.publish_parts
        stages |= {
            f"(vLLM fills its lists, {k})": partial(fill, completions, len(outputs)),
            f"vLLM's lists to arrays, {k}": partial(convert, outputs),
            f"table, {k}": partial(build_all, sink, parts),
            f"Parquet, {k}": partial(encode_all, tables),
            f"durable (fsync), {k}": partial(put_all, store, encoded, num_rows),
            f"fold, {k}": shards.fold,
        }
        num_bytes = sum(map(len, encoded))
        notes[f"Parquet, {k}"] = f"{num_bytes / num_rows / COMPLETION_TOKENS:.2f} bytes a token"
    measured = measure(stages, repeats, before)
    for name, note in notes.items():
        measured[name].note = note
    show(measured, [total(measured, k) for k in NUM_LOGPROBS])


def measure_runs(folder: Path, num_rows: int, repeats: int) -> None:
    """The whole of `run_job`, its start and the loading of the tokenizer included."""
    write_input(folder / "in", NUM_SHARDS * num_rows, NUM_SHARDS)
    stages: Stages = {}
    before = {}
    for k in NUM_LOGPROBS:
        engine = InstantEngine(Completions(k))
        stages[f"run, logprobs: {k}"] = partial(run_once, job_of(folder, k), engine)
        before[f"run, logprobs: {k}"] = partial(shutil.rmtree, folder / "out", ignore_errors=True)
    measured = measure(stages, max(1, repeats - 1), before)
    for k, found in zip(NUM_LOGPROBS, measured.values(), strict=True):
        found.note = f"aim {AIMS[k]:,} tokens/s"
    show(measured)


def measure_tokenize(folder: Path, num_rows: int, repeats: int) -> None:
    """`batchinfer` and the bare library on the same texts, which are the rendered prompts."""
    write_input(folder / "in", num_rows, 1)
    (shard,) = list_shards([str(folder / "in" / "*.parquet")], open_store)
    table = read_all(shard)
    draft = make_drafter(PROMPTS["template"], None)
    texts = [draft(row).text for row in table.to_pylist()]
    encoder, own = TokenEncoder(str(DEMO / "model")), prompter(PROMPTS["template"])
    backend = encoder.tokenizer.backend_tokenizer
    stages = {
        "tokenizers: encode_batch_fast": lambda: len(backend.encode_batch_fast(texts)),
        "batchinfer: tokenize": lambda: len(encoder.encode(texts, add_special_tokens=True)),
        "batchinfer: render and tokenize": lambda: len(own.prepare(table).offsets) - 1,
    }
    measured = measure(stages, repeats, {})
    base = measured["tokenizers: encode_batch_fast"]
    num_tokens = len(own.prepare(table).token_ids)
    for found in measured.values():
        pairs = zip(found.cpu_s, base.cpu_s, strict=True)
        ratio = statistics.median(own_s / base_s for own_s, base_s in pairs)
        rate = num_tokens / statistics.median(found.wall_s)
        found.note = f"{ratio:.2f} of the library's CPU time; {rate:,.0f} prompt tokens/s"
    show(measured)


PARTS = {"stages": measure_stages, "runs": measure_runs, "tokenize": measure_tokenize}


def write_input(folder: Path, num_rows: int, num_shards: int) -> None:
    """Different prompts, made of the demo's first words and a number."""
    folder.mkdir()
    words = pl.read_parquet(DEMO / "prompts" / "*.parquet").select(
        pl.col("description").str.split(" ").list.head(PROMPT_WORDS).list.join(" ")
    )["description"]
    numbers = range(num_rows)
    frame = pl.DataFrame(
        {
            "id": [f"row-{n}" for n in numbers],
            "text": [f"{words[n % len(words)]} {n}" for n in numbers],
        }
    )
    for index, rows in enumerate(frame.iter_slices(-(-num_rows // num_shards))):
        rows.write_parquet(folder / f"rows-{index}.parquet")


def prompter(prompt: PromptSettings) -> Prompter:
    return Prompter(
        prompt,
        str(DEMO / "model"),
        limit=PromptLimit.of_generation(max_model_len=2048, max_tokens=COMPLETION_TOKENS),
        vocab_size=4096,
    )


def chat_template() -> ChatTemplate:
    return ChatTemplate(TokenEncoder(str(DEMO / "model")).tokenizer, None, {})


def read_all(shard: Shard) -> pa.Table:
    with ShardReader(shard, ["id", "text"], max_block_bytes=4 << 20) as reader:
        return pa.concat_tables([block.table for block in reader.blocks(0, reader.num_rows)])


def chunk_of(table: pa.Table, prepared: Prepared) -> Chunk:
    return Chunk(
        shard="rows-0.parquet",
        window=0,
        rows=np.arange(table.num_rows),
        token_ids=prepared.token_ids,
        offsets=prepared.offsets,
        carried=table.select(["id"]).combine_chunks(),
        errors={},
        is_todo=np.ones((table.num_rows, 1), dtype=np.bool_),
        deduplicate=True,
    )


def work_of(chunk: Chunk) -> list[WorkItem]:
    return list(plan_buffer([chunk], "length").items())


def job_of(folder: Path, num_logprobs: int) -> Job:
    return Job.model_validate(
        {
            "version": 1,
            "name": "data-plane",
            "input": {"path": str(folder / "in" / "*.parquet"), "id_column": "id"},
            "prompt": {"template": TEMPLATE},
            "model": {"path": str(DEMO / "model")},
            "sampling": {"max_tokens": COMPLETION_TOKENS, "logprobs": num_logprobs},
            "output": {"path": str(folder / "out")},
        }
    )


def in_parts(results: list[Result]) -> list[list[Result]]:
    return [results[at : at + PART_ROWS] for at in range(0, len(results), PART_ROWS)]


def vllm_outputs(completions: Completions, num_rows: int) -> list[Any]:
    """What vLLM's `step` returns: Python lists, filled position by position as it does."""
    from vllm.logprobs import FlatLogprobs

    outputs = []
    for index in range(num_rows):
        top_ids = completions.top_token_ids[index].reshape(COMPLETION_TOKENS, -1)
        top_logprobs = completions.top_logprobs[index].reshape(COMPLETION_TOKENS, -1)
        flat = FlatLogprobs()
        for ids, values in zip(top_ids.tolist(), top_logprobs.tolist(), strict=True):
            ranks = chain((1,), range(1, len(ids) + 1))
            flat.append_fast([ids[0], *ids], [values[0], *values], ranks, repeat(None))
        sequence = SimpleNamespace(
            token_ids=completions.token_ids[index].tolist(),
            logprobs=flat,
            finish_reason="length",
            stop_reason=None,
            text="",
        )
        outputs.append(
            SimpleNamespace(
                request_id=str(index),
                outputs=[sequence],
                num_cached_tokens=0,
                prompt_logprobs=None,
                metrics=None,
            )
        )
    return outputs


def encode(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    write_table(sink, table, {"digest": "0"})
    return sink.getvalue()


def render_all(draft: Drafter, rows: list[dict[str, Any]]) -> int:
    return len([draft(row) for row in rows])


def prepare(own: Prompter, table: pa.Table) -> int:
    return len(own.prepare(table).offsets) - 1


def build_all(sink: Callable[[list[Result]], pa.Table], parts: list[list[Result]]) -> int:
    return sum(sink(part).num_rows for part in parts)


def encode_all(tables: list[pa.Table]) -> int:
    return sum(table.num_rows for table in tables if encode(table))


def put_all(store: Store, contents: list[bytes], num_rows: int) -> int:
    for number, content in enumerate(contents):
        store.put(f"part-{number}", content)
    return num_rows


def fill(completions: Completions, num_rows: int) -> int:
    return len(vllm_outputs(completions, num_rows))


def convert(outputs: list[Any]) -> int:
    return len([completion_of(output, has_text=False) for output in outputs])


def run_once(job: Job, engine: InstantEngine) -> int:
    register("instant", FakeKind(lambda spec: engine))
    job = job.model_copy(update={"engine": EngineSettings(name="instant")})
    outcome = run_job(job, RunOptions(), Host(Counters(Clock()), tuning=WholeProcess()))
    assert outcome.status == "complete" and outcome.totals is not None
    return outcome.totals.rows


if __name__ == "__main__":
    main()
