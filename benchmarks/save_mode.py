"""On one GPU: a working set of twice the KV cache, with `model.save_mode` and without.

    python -m benchmarks.save_mode [--documents 64] [--rounds 4] [--kv-gib 8]

A model of Llama-3.1-8B's shape with dummy weights. Documents of 2,048 random tokens that together
take twice the KV cache; each comes back once a round, followed by a question of its own, so that
without save mode every document is computed anew each round. 16 completion tokens. Two `batchinfer
run`s, in the order of the input; prints a JSON line for each: seconds of generation, prompt tokens
a second, and the share of prompt tokens that were cached. Then one with `model.cpu_offload_gib: 4`
on two documents, for what is left on the GPU. One run each, no warm-up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.common import ROOT, machine, versions
from benchmarks.gpu import LLAMA_8B, write_model

DOCUMENT_TOKENS = 2048
QUESTION_TOKENS = 32
KV_BYTES_PER_TOKEN = 2 * 32 * 8 * 128 * 2  # layers, heads, their size, bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--kv-gib", type=float, default=8.0)
    arguments = parser.parse_args()
    needed = arguments.documents * DOCUMENT_TOKENS * KV_BYTES_PER_TOKEN
    kv_bytes = int(arguments.kv_gib * (1 << 30))
    show(machine() | versions() | {"working_set_of_kv_cache": round(needed / kv_bytes, 2)})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        write_prompts(folder / "many.parquet", arguments.documents, arguments.rounds)
        write_prompts(folder / "few.parquet", 2, arguments.rounds)
        options = {"kv_cache_memory_bytes": kv_bytes}
        show({"save_mode": False} | run(folder, "many", options))
        saved = {"save_mode": True, "save_mode_gib": 2 * needed / (1 << 30)}
        show(saved | run(folder, "many", options, **saved))
        moved = {"cpu_offload_gib": 4.0}
        show(moved | run(folder, "few", options, **moved))


def write_prompts(file: Path, num_documents: int, num_rounds: int) -> None:
    """Rows of a round are next to each other: a document returns after all the others."""
    random = np.random.default_rng(0)
    high = int(str(LLAMA_8B["vocab_size"]))
    documents = random.integers(10, high, (num_documents, DOCUMENT_TOKENS), dtype=np.int32)
    rows = [
        np.concatenate([document, random.integers(10, high, QUESTION_TOKENS, dtype=np.int32)])
        for _ in range(num_rounds)
        for document in documents
    ]
    pq.write_table(pa.table({"prompt": pa.array(rows)}), file)


def run(folder: Path, rows: str, options: dict[str, Any], **model: Any) -> dict[str, Any]:
    output = folder / f"{rows}-{'-'.join(model) or 'plain'}"
    job = {
        "version": 1,
        "name": "save-mode",
        "input": {"path": str(folder / f"{rows}.parquet")},
        "prompt": {"token_ids_column": "prompt"},
        "model": {"path": str(folder / "model"), "max_model_len": 4096, **model},
        "sampling": {"max_tokens": 16, "ignore_eos": True},
        "packing": {"order": "input", "deduplicate": False},
        "engine": {
            "devices": 1,
            "max_num_seqs": 16,
            "options": {"load_format": "dummy", **options},
        },
        "output": {"path": str(output)},
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))  # JSON is YAML
    done = subprocess.run(
        [sys.executable, "-m", "batchinfer", "run", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode:
        return {"exit_code": done.returncode, "stderr": done.stderr[-600:]}
    result = json.loads(done.stdout.splitlines()[-1])
    file = output / f"{rows}.parquet"
    table = pq.read_table(file, columns=["num_prompt_tokens", "num_cached_tokens"])
    engine = json.loads(pq.read_metadata(file).metadata[b"batchinfer"])["engine"]
    num_tokens, num_cached = (pc.sum(column).as_py() for column in table.columns)
    return {
        "generation_s": result["generation_s"],
        "prompt_tokens_per_s": round(num_tokens / result["generation_s"]),
        "cached_share": round(num_cached / num_tokens, 3),
        "startup_s": result["startup_s"],
        "kv_cache_tokens": engine["kv_cache_tokens"],
        "weights_bytes": engine["extra"]["layers"]["weights_bytes"],
        "device_bytes": engine["extra"]["layers"]["device_bytes"],
    }


def show(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
