"""vLLM's `LLM` with the engine arguments of `batchinfer run`, in one call or in batches.

    python -m benchmarks.peers.run_llm WORK_FOLDER OUTPUT_FOLDER [BATCH_ROWS]

Prompts are tokenized before the clock starts and nothing is detokenized: as fast as `LLM` goes. A
batch is written to a file of its own when it is done, and a second start skips the files there are,
as a careful loop does. Loading is not counted. Nothing is warmed up, here or in a run: what an
engine does in its first steps only is in both.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.cli.common import look_at
from batchinfer.config import load_job
from batchinfer.engine.kinds import engine_kind
from batchinfer.engine.vllm.settings import vllm_settings
from batchinfer.runner.factory import engine_spec
from batchinfer.tasks import task_of
from benchmarks.peers.events import tell
from benchmarks.peers.work import read_input


def main(folder: Path, output: Path, batch_rows: int | None) -> None:
    path = folder / "job.yaml"
    job = load_job(path, []).job
    model = look_at(job, str(path)).model
    engine_kind(job.engine.name).prepare(engine_spec(job, model))
    rows = read_input(folder)
    prepared = (
        task_of(job)
        .prompter(job, model)
        .prepare(pa.table({"text": pa.array([text for _, text in rows], pa.string())}))
    )
    assert not prepared.errors
    prompts = [
        {"prompt_token_ids": prepared.token_ids[start:stop].tolist()}
        for start, stop in zip(prepared.offsets[:-1], prepared.offsets[1:], strict=True)
    ]
    generate = _generator(vllm_settings(engine_spec(job, model)))
    output.mkdir(exist_ok=True)
    batch_rows = batch_rows or len(prompts)
    num_computed = 0
    tell(output, "begin")
    for number, start in enumerate(range(0, len(prompts), batch_rows)):
        path = output / f"batch-{number:05d}.parquet"
        if path.exists():
            continue
        completions = generate(prompts[start : start + batch_rows])
        num_computed += len(completions)
        tell(output, "end", rows=num_computed)
        ids = [row_id for row_id, _ in rows[start : start + batch_rows]]
        _write(path, ids, completions)
    sys.stdout.flush()
    os._exit(0)  # vLLM's goodbyes are nobody's business here


def _generator(settings: Any) -> Callable[[list[Any]], list[Any]]:
    """Prompts -> completions."""
    from batchinfer.engine.vllm.setup import engine_arguments, prepare_platform

    prepare_platform(settings)
    from vllm import LLM

    llm = LLM(**engine_arguments(settings))
    params = settings.requests.shared

    def generate(prompts: list[Any]) -> list[Any]:
        return [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]

    return generate


def _write(path: Path, ids: list[str], completions: list[Any]) -> None:
    """Durable and whole, or not there."""
    table = pa.table(
        {
            "id": ids,
            "token_ids": [list(c.token_ids) for c in completions],
            "cumulative_logprob": [c.cumulative_logprob for c in completions],
            "logprob_token_ids": [list(c.logprobs.token_ids) for c in completions],
            "logprobs": [list(c.logprobs.logprobs) for c in completions],
        }
    )
    partial = path.with_suffix(".tmp")
    with partial.open("wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
