"""The job that all contenders do: its rows, its settings, and the forms in which they take both.

Prompts are the first words of the demo's descriptions. A completion ends at the first token of a
small set, as at an EOS, or at `MAX_TOKENS`: skewed lengths, which nothing knows beforehand. Greedy
in float32, where a completion does not depend on its batch. The chat template that `vllm run-batch`
is given is the bare prompt, so that all see the same tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import DEMO

MODEL = DEMO / "model"
MODEL_NAME = "demo"  # what a server calls it
NUM_SHARDS = 6  # so that reading, tokenizing and folding go on beside the engine
PROMPT_WORDS = 20
#: `"` `:` `L` `b` `i` ` (` `::` ` features`: the demo model's completions end at these after a
#: median of about 30 tokens, with a standard deviation of the log of about 1; one in twelve repeats
#: itself up to MAX_TOKENS.
STOP_TOKEN_IDS = (4, 28, 46, 68, 75, 326, 508, 811)
MAX_TOKENS = 256
#: Of `LLM` and the servers' requests; a job file and Ray's rows have the same fields.
SAMPLING: dict[str, Any] = {
    "max_tokens": MAX_TOKENS,
    "temperature": 0.0,
    "stop_token_ids": list(STOP_TOKEN_IDS),
}
NUM_LOGPROBS = 1
#: What has to be equal for equal completions and a bounded KV cache.
MODEL_ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "kv_cache_memory_bytes": 1 << 29,
}
#: Two waves would be over before they are a stream: narrow enough for many.
LIMITS: dict[str, Any] = {"max_num_seqs": 64, "max_num_batched_tokens": 4096, "enforce_eager": True}
#: What `batchinfer run` sets for itself on a CPU with a small model, for those that do not.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}


@dataclass(frozen=True, slots=True)
class Work:
    """The job's files in `folder`: `in/`, `job.yaml`, `requests.jsonl`, `chat_template.jinja`."""

    folder: Path
    ids: frozenset[str]

    def job(self) -> dict[str, Any]:
        """What `job.yaml` says."""
        return _job(self.folder)


def write_work(folder: Path, num_rows: int) -> Work:
    import polars as pl
    import yaml

    rows = (
        pl.read_parquet(DEMO / "prompts" / "*.parquet")
        .select(
            "id",
            pl.col("description")
            .str.split(" ")
            .list.head(PROMPT_WORDS)
            .list.join(" ")
            .alias("text"),
        )
        .head(num_rows)
    )
    (folder / "in").mkdir()
    shard_rows = -(-rows.height // NUM_SHARDS)
    for index, shard in enumerate(rows.iter_slices(shard_rows)):
        shard.write_parquet(folder / "in" / f"prompts-{index:05d}.parquet")
    (folder / "job.yaml").write_text(yaml.safe_dump(_job(folder)))
    lines = [json.dumps(_chat_request(*row)) for row in rows.select("id", "text").iter_rows()]
    (folder / "requests.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return Work(folder, frozenset(rows["id"].to_list()))


def read_input(folder: Path) -> list[tuple[str, str]]:
    """(id, prompt) of all rows, in order."""
    import polars as pl

    rows = pl.read_parquet(folder / "in" / "*.parquet", columns=["id", "text"])
    return list(rows.iter_rows())


def flags(arguments: dict[str, Any]) -> list[str]:
    """Engine arguments as a vLLM command takes them."""
    words = []
    for name, value in arguments.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return words


def _job(folder: Path) -> dict[str, Any]:
    arguments = MODEL_ARGUMENTS | LIMITS
    in_engine = ("max_num_seqs", "max_num_batched_tokens")
    in_options = ("kv_cache_memory_bytes", "enforce_eager")
    return {
        "version": 1,
        "name": "peers",
        "input": {"path": str(folder / "in" / "*.parquet"), "id_column": "id"},
        "prompt": {"column": "text"},
        "model": {
            "path": str(MODEL),
            "dtype": arguments["dtype"],
            "max_model_len": arguments["max_model_len"],
        },
        "sampling": SAMPLING | {"logprobs": NUM_LOGPROBS},
        "packing": {"deduplicate": False},  # equal prompts would be computed once
        "engine": {name: arguments[name] for name in in_engine}
        | {"options": {name: arguments[name] for name in in_options}},
        "output": {"path": str(folder / "out")},
    }


def _chat_request(row_id: str, text: str) -> dict[str, Any]:
    return {
        "custom_id": row_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": SAMPLING
        | {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": text}],
            "logprobs": True,
            "top_logprobs": NUM_LOGPROBS,
            "return_token_ids": True,
        },
    }
