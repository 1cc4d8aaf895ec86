"""On one GPU: `batchinfer run` beside one `LLM.generate` of the same prompts, and what costs what.

    python -m benchmarks.gpu --log FILE [--parts generate run processes ...]

A model of Llama-3.1-8B's shape with dummy weights (speed only: its tokens are random). 2,048
prompts of lognormal length (median 256 tokens); a completion ends at the first of 855 of 128,256
tokens, which is skewed: geometric, mean 150, at most 512. Temperature 1, logprobs 1, per-request
timing on in all, unless a line says otherwise. Sampled lengths differ from run to run, so rates
are compared, in completion tokens a second. Prints a JSON line for each measurement and appends it
to --log. Every engine is a process of its own; `LLM` is warmed up by one small call, and gets its
prompts as token ids; `batchinfer run` goes from Parquet to Parquet without a warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import DEMO, LLAMA_8B, ROOT, machine, versions

NUM_ROWS = 2048
MAX_TOKENS = 512
STOP_TOKEN_IDS = list(range(1000, 1855))
PARTS = ("generate", "run", "processes", "costs", "fp8", "order", "stop")
Record = Callable[..., None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--generate", type=Path, help=argparse.SUPPRESS)  # one LLM, in this process
    parser.add_argument("--order", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    def record(test: str, **result: Any) -> None:
        line = json.dumps({"test": test, **result})
        print(line, flush=True)  # noqa: T201
        with arguments.log.open("a") as log:
            log.write(line + "\n")

    if arguments.generate:
        generate_all(json.loads(arguments.generate.read_text()), record)
    elif arguments.order:
        measure_orders(arguments.order, record)
    else:
        import torch

        device = torch.cuda.get_device_name()
        record("machine", device=device, **machine(), **versions())
        with tempfile.TemporaryDirectory(prefix="batchinfer-gpu-") as name:
            measure(Path(name), arguments, record)


def measure(folder: Path, arguments: argparse.Namespace, record: Record) -> None:
    write_model(folder / "model")
    write_prompts(folder / "in")

    def generate(what: str, **how: Any) -> None:
        how_file = folder / "how.json"
        how_file.write_text(json.dumps({"folder": str(folder), "what": what, **how}))
        again("--generate", how_file)

    def again(option: str, value: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu", "--log", str(arguments.log)]
        subprocess.run([*command, option, str(value)], cwd=ROOT, check=False)

    def run(what: str, *, own_process: bool = False, **changes: Any) -> None:
        job = job_of(folder, output=f"out-{time.time_ns()}", **changes)
        record(what, **run_job(folder, job, own_process=own_process))

    for part in arguments.parts:
        if part == "generate":
            calls = ["all", "all", "logprobs 0", "logprobs 5", "batches of 256", "batches of 64"]
            generate("LLM.generate", calls=calls)
        elif part == "run":
            run("batchinfer run")
            run("batchinfer run, logprobs 0", logprobs=0)
            run("batchinfer run, logprobs 5", logprobs=5)
        elif part == "processes":
            calls = ["all", "all"]  # this is `LLM`'s own default
            generate("LLM.generate, engine in its own process", calls=calls, own_process=True)
            generate("LLM.generate, engine in our process", calls=calls)
            run("batchinfer run, engine in its own process", own_process=True)
            run("batchinfer run, engine in our process")
        elif part == "costs":
            generate("LLM.generate, log stats off", calls=["all", "all"], log_stats=False)
            run("batchinfer run, a seed for each row", seed=0)
            run("batchinfer run, again")
        elif part == "fp8":
            generate("LLM.generate, fp8", calls=["all", "all"], quantization="fp8")
            run("batchinfer run, fp8", quantization="fp8")
        elif part == "order":
            again("--order", folder / "model")
        else:
            job = job_of(folder, output="stopped")
            stopped = run_job(folder, job, stop_after_parts=folder / "stopped")
            record("batchinfer run, SIGTERM in the middle", **stopped)
            record("batchinfer run, started again", **run_job(folder, job))


def write_model(folder: Path) -> None:
    """An 8B-shaped model folder: its config, and the demo model's tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    shutil.copy(DEMO / "model" / "tokenizer.json", folder)
    tokenizer = json.loads((DEMO / "model" / "tokenizer_config.json").read_text())
    tokenizer["model_max_length"] = LLAMA_8B["max_position_embeddings"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def write_prompts(folder: Path) -> None:
    """Random token ids in four shards."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(256), 0.7, NUM_ROWS), 32, 2048).astype(np.int32)
    for index, part in enumerate(np.array_split(lengths, 4)):
        offsets = np.concatenate([[0], np.cumsum(part)]).astype(np.int32)
        tokens = rng.integers(10, 128_000, offsets[-1], dtype=np.int32)
        column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
        pq.write_table(pa.table({"prompt": column}), folder / f"p{index}.parquet")


def job_of(
    folder: Path,
    *,
    output: str,
    logprobs: int = 1,
    seed: int | None = None,
    quantization: str = "auto",
) -> dict[str, Any]:
    return {
        "version": 1,
        "name": "llama-8b-shape",
        "input": {"path": str(folder / "in" / "*.parquet")},
        "prompt": {"token_ids_column": "prompt"},
        "model": {
            "path": str(folder / "model"),
            "max_model_len": 4096,
            "quantization": quantization,
        },
        "sampling": {
            "max_tokens": MAX_TOKENS,
            "temperature": 1.0,
            "logprobs": logprobs,
            "seed": seed,
            "stop_token_ids": STOP_TOKEN_IDS,
            "ignore_eos": True,
        },
        "engine": {"devices": 1, "options": {"load_format": "dummy"}},
        "output": {"path": str(folder / output)},
    }


def run_job(
    folder: Path,
    job: dict[str, Any],
    *,
    own_process: bool = False,
    stop_after_parts: Path | None = None,
) -> dict[str, Any]:
    """One `batchinfer run`; SIGTERM to its group once two parts stand in `stop_after_parts`."""
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))  # JSON is YAML
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "batchinfer", "run", str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own_process))},
        text=True,
        start_new_session=True,
    )
    signalled = None
    while stop_after_parts is not None and process.poll() is None and signalled is None:
        if len(list(stop_after_parts.rglob("*.part"))) >= 2:
            os.killpg(process.pid, signal.SIGTERM)
            signalled = time.monotonic()
        time.sleep(0.1)
    stdout, _ = process.communicate()
    ended = time.monotonic()
    lines = stdout.splitlines()
    result: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    for key in ("output", "message", "run"):
        result.pop(key, None)
    result |= {"returncode": process.returncode, "wall_s": round(ended - begun, 1)}
    if result.get("generation_s"):
        rate = result["completion_tokens"] / result["generation_s"]
        result["completion_tokens_per_s"] = round(rate, 1)
    if signalled is not None:
        result["s_from_signal_to_exit"] = round(ended - signalled, 2)
    return result


def generate_all(how: dict[str, Any], record: Record) -> None:
    """`LLM.generate` in this process, sized as batchinfer sizes the engine."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(how.get("own_process", False)))
    from vllm import LLM, SamplingParams

    from batchinfer.engine.vllm.sizes import default_sizes

    folder = Path(how["folder"])
    max_num_seqs, max_num_batched_tokens = default_sizes(1)
    llm = LLM(
        str(folder / "model"),
        load_format="dummy",
        max_model_len=4096,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        quantization=how.get("quantization"),
        disable_log_stats=not how.get("log_stats", True),
    )
    column = pq.read_table(folder / "in").column("prompt")
    prompts = [{"prompt_token_ids": row} for row in column.to_pylist()]
    params = SamplingParams(
        max_tokens=MAX_TOKENS, temperature=1.0, stop_token_ids=STOP_TOKEN_IDS, ignore_eos=True
    )
    params.detokenize = False
    params.logprobs = 1
    llm.generate(prompts[:64], params, use_tqdm=False)
    for call in how["calls"]:
        own = params.clone()
        if call.startswith("logprobs"):
            own.logprobs = int(call.split()[1])
        num_batch = int(call.split()[2]) if call.startswith("batches") else len(prompts)
        own_prompts = prompts[:256] if num_batch == 64 else prompts  # it takes long
        llm.reset_prefix_cache()
        num_tokens = 0
        begun = time.monotonic()
        for start in range(0, len(own_prompts), num_batch):
            outputs = llm.generate(own_prompts[start : start + num_batch], own, use_tqdm=False)
            num_tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        seconds = time.monotonic() - begun
        record(
            how["what"] if call == "all" else f"{how['what']}, {call}",
            rows=len(own_prompts),
            completion_tokens=num_tokens,
            generation_s=round(seconds, 2),
            completion_tokens_per_s=round(num_tokens / seconds, 1),
        )
    if how.get("own_process"):
        llm.llm_engine.engine_core.shutdown()  # it would keep the GPU's memory for a while
    os._exit(0)


def measure_orders(model_path: Path, record: Record) -> None:
    """Documents of 1,000 tokens, more than the KV cache holds, in all four orders."""
    from benchmarks.order import Set, documents, measure_set

    documents_set = Set(
        "100 documents x 20 questions, shuffled",
        lambda: documents(num_documents=100, num_questions=20),
        max_tokens=16,
        max_num_seqs=256,
        kv_tokens=65_536,
    )
    found = measure_set(documents_set, 1, model_path=model_path, load_format="dummy")
    record("orders", **found)
    os._exit(0)


if __name__ == "__main__":
    main()
