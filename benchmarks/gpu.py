"""On one GPU: `batchinfer run` end to end, and one `LLM.generate` of the same prompts beside it.

    python3 -m benchmarks.gpu --log FILE [--rows 2048]

Runs (1) the demo job, (2) a job of Llama-3.1-8B's shape with dummy weights (speed only: the
weights are random), (3) the same stopped by SIGTERM in the middle and started again, (4)
`LLM.generate` with the same engine settings and prompts. Prints a JSON line for each and appends it
to --log.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DEMO_MODEL = Path("jobs/demo/model")
PROMPT_TOKENS = 256
MAX_TOKENS = 128
#: The shape of Llama-3.1-8B (its config.json), with a context of 8,192.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def write_model(folder: Path) -> None:
    """An 8B-shaped model folder: its config, and the demo model's tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    shutil.copy(DEMO_MODEL / "tokenizer.json", folder)
    tokenizer = json.loads((DEMO_MODEL / "tokenizer_config.json").read_text())
    tokenizer["model_max_length"] = LLAMA_8B["max_position_embeddings"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def write_prompts(path: Path, num_rows: int) -> np.ndarray:
    """Random prompts as token ids, in four shards. Returns them. [num_rows, PROMPT_TOKENS]"""
    tokens = np.random.default_rng(0).integers(10, 4000, (num_rows, PROMPT_TOKENS), dtype=np.int32)
    for index, part in enumerate(np.array_split(tokens, 4)):
        offsets = np.arange(0, part.size + 1, PROMPT_TOKENS, dtype=np.int32)
        column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(part.ravel()))
        pq.write_table(pa.table({"prompt": column}), path / f"p{index}.parquet")
    return tokens


def job_8b(folder: Path, output: str) -> dict[str, Any]:
    return {
        "version": 1,
        "name": "llama-8b-shape",
        "input": {"path": str(folder / "in" / "*.parquet")},
        "prompt": {"token_ids_column": "prompt"},
        "model": {"path": str(folder / "model"), "max_model_len": 4096},
        "sampling": {
            "max_tokens": MAX_TOKENS,
            "temperature": 1.0,
            "logprobs": 1,
            "ignore_eos": True,
        },
        "engine": {"options": {"load_format": "dummy"}},
        "output": {"path": str(folder / output)},
    }


def write_job(path: Path, job: dict[str, Any]) -> str:
    path.write_text(json.dumps(job))  # JSON is YAML
    return str(path)


def run_job(path: str, *arguments: str, stop_after_parts: Path | None = None) -> dict[str, Any]:
    """One `batchinfer run`; SIGTERM to its group once two parts stand in `stop_after_parts`."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "batchinfer", "run", path, *arguments],
        stdout=subprocess.PIPE,
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
    result: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    result |= {"returncode": process.returncode, "wall_s": round(ended - begun, 1)}
    if signalled is not None:
        result["s_from_signal_to_exit"] = round(ended - signalled, 2)
    return result


def generate_all(folder: Path, tokens: np.ndarray) -> dict[str, Any]:
    """One `LLM.generate` of everything, in this process, sized as batchinfer sizes the engine."""
    from batchinfer.engine.vllm_setup import LARGE_GPU_SIZES, prepare_environment

    prepare_environment(weights_bytes=16 << 30, is_local_model=True)
    from vllm import LLM, SamplingParams

    max_num_seqs, max_num_batched_tokens = LARGE_GPU_SIZES
    llm = LLM(
        str(folder / "model"),
        load_format="dummy",
        max_model_len=4096,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        disable_log_stats=False,
    )
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, logprobs=1, ignore_eos=True)
    params.detokenize = False
    prompts = [{"prompt_token_ids": row.tolist()} for row in tokens]
    seconds = []
    for _ in range(2):
        llm.reset_prefix_cache()
        begun = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.monotonic() - begun)
    num_tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    return {
        "seconds": [round(s, 2) for s in seconds],
        "completion_tokens_per_s": round(num_tokens / min(seconds), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", required=True)
    parser.add_argument("--rows", type=int, default=2048)
    arguments = parser.parse_args()

    def record(test: str, result: dict[str, Any]) -> None:
        line = json.dumps({"test": test, **result})
        print(line, flush=True)  # noqa: T201
        with Path(arguments.log).open("a") as log:
            log.write(line + "\n")

    import torch
    import vllm

    device = torch.cuda.get_device_name()
    versions = {"vllm": vllm.__version__, "torch": torch.__version__}
    record("machine", {"device": device, **versions, "python": platform.python_version()})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo = ("jobs/summarize.yaml", "--set", f"output.path={folder / 'demo'}")
        record("demo job", run_job(*demo))
        record("demo job again", run_job(*demo))
        (folder / "in").mkdir()
        write_model(folder / "model")
        tokens = write_prompts(folder / "in", arguments.rows)
        job = job_8b(folder, "whole")
        record("8B shape", run_job(write_job(folder / "whole.yaml", job)))
        stopped = write_job(folder / "stopped.yaml", job_8b(folder, "stopped"))
        record("8B shape, SIGTERM", run_job(stopped, stop_after_parts=folder / "stopped"))
        record("8B shape, resumed", run_job(stopped))
        record("8B shape, one LLM.generate", generate_all(folder, tokens))


if __name__ == "__main__":
    main()
