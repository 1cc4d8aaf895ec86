"""Decode tokens a second of an 8B-shaped model on one GPU: trellis-coded, bf16, fp8, gptq (marlin).

    python -m benchmarks.qtip_end_to_end --log FILE [--only NAMES] [--seconds 470]

Dummy weights (speed only). Each model is a process of its own with vLLM's engine in it, CUDA graphs
for the batches measured and no torch.compile, which takes most of a start; all import vLLM at once
and then wait for their turn. Prompts are 32 random tokens, every completion is as long as asked. A
rate is of the tokens between a short and a long completion, without prefill and start-up: the
better of two. `prefill` is of 16 prompts of 1,024 tokens. Lines go to --log.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import LLAMA_8B, ROOT, machine, versions

BATCHES = (1, 16, 64, 256)
SHORT = 8
#: Parameters of a model that vLLM quantized take less; in bf16 it is 16.1e9.
QUANTIZED_BYTES = 12e9
SECONDS_OF_MODEL = 70
#: Batch -> tokens of a long completion, of seconds at most.
LONG = {1: 136, 16: 136, 64: 104, 256: 72}


def qtip(bits: int, code: str) -> dict[str, Any]:
    default = {"K": bits, "V": 2 if code == "hyb" else 1, "code": code}
    return {"quant_method": "qtip", "format_version": 1, "L": 16, "T": 256, "default": default}


#: Without a list vLLM takes those for quantized that a checkpoint's files say are; there are none.
_LAYERS = [f"self_attn.{part}_proj" for part in "qkvo"]
_LAYERS += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True,
        "modules_in_block_to_quantize": [_LAYERS]}  # fmt: skip
#: Name -> (config.json's quantization_config, vLLM's `quantization`), what matters most first.
MODELS: dict[str, tuple[dict[str, Any] | None, str | None]] = {
    "qtip 2 bits mcg": (qtip(2, "mcg"), None),
    "bf16": (None, None),
    "gptq_marlin 4 bits": (GPTQ, "gptq_marlin"),
    "qtip 4 bits mcg": (qtip(4, "mcg"), None),
    "fp8": (None, "fp8"),
    "qtip 3 bits mcg": (qtip(3, "mcg"), None),
    "qtip 2 bits hyb": (qtip(2, "hyb"), None),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=470, help="of the whole run")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)  # one, in this process
    arguments = parser.parse_args()

    def record(**line: Any) -> None:
        text = json.dumps(line)
        print(text, flush=True)  # noqa: T201
        with arguments.log.open("a") as log:
            log.write(text + "\n")

    if arguments.model:
        measure(arguments.model, arguments.only[0], record)
        return
    end = time.monotonic() + arguments.seconds
    record(**machine(), **versions())
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for number, name in enumerate(arguments.only):
            model = Path(folder) / str(number)
            model.mkdir()
            settings, _ = MODELS[name]
            config = {**LLAMA_8B, **({"quantization_config": settings} if settings else {})}
            (model / "config.json").write_text(json.dumps(config))
            command = [sys.executable, "-m", "benchmarks.qtip_end_to_end", "--model", str(model)]
            command += ["--log", str(arguments.log.resolve()), "--only", name]
            with (model / "said").open("w") as said:
                running.append(
                    subprocess.Popen(
                        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=said, stderr=said
                    )
                )
        for number, process in enumerate(running):
            left = end - time.monotonic()
            try:
                process.communicate(b"your turn", max(0.1, min(SECONDS_OF_MODEL, left)))
            except subprocess.TimeoutExpired:
                process.kill()
            if process.wait():
                said_at_end = (Path(folder) / str(number) / "said").read_text(errors="replace")
                record(model=arguments.only[number], failed=process.returncode,
                       said=said_at_end[-3000:])  # fmt: skip


def measure(folder: Path, name: str, record: Any) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    settings, quantization = MODELS[name]
    import torch

    if settings and settings["quant_method"] == "qtip":
        # As the entry point does where the package is installed.
        from batchinfer.quantization.methods.qtip import vllm as _
    from vllm import LLM

    sys.stdin.read()  # this process's turn
    begun = time.monotonic()
    llm = LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        quantization=quantization,
        max_model_len=2048,
        max_num_seqs=max(BATCHES),
        enable_prefix_caching=False,
        gpu_memory_utilization=0.4,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": list(BATCHES),
        },
    )
    loaded = sum(p.numel() * p.element_size() for p in parameters(llm))
    record(model=name, started_s=round(time.monotonic() - begun, 1), torch=torch.__version__,
           weights_gb=round(loaded / 1e9, 2))  # fmt: skip
    if (settings or quantization) and loaded > QUANTIZED_BYTES:
        raise SystemExit(f"{name}: {loaded / 1e9:.1f} GB: vLLM did not quantize it")
    for batch in BATCHES:
        timed(llm, batch, SHORT)
        times = []
        for _ in range(2):
            short, long = (timed(llm, batch, size) for size in (SHORT, LONG[batch]))
            times.append(long - short)
        tokens = batch * (LONG[batch] - SHORT)
        record(model=name, batch=batch, decode_tokens_per_s=round(tokens / min(times), 1),
               step_ms=round(min(times) / (LONG[batch] - SHORT) * 1e3, 3))  # fmt: skip
    seconds = min(timed(llm, 16, 1, 1024) for _ in range(3))
    record(model=name, prefill_tokens_per_s=round(16 * 1024 / seconds, 1))


def parameters(llm: Any) -> list[Any]:
    found: list[list[Any]] = llm.apply_model(_parameters)
    return found[0]


def _parameters(model: Any) -> list[Any]:
    return list(model.parameters())


def timed(llm: Any, batch: int, num_tokens: int, prompt_tokens: int = 32) -> float:
    """Seconds of one call."""
    import random

    from vllm import SamplingParams

    rng = random.Random(num_tokens)
    prompts = [
        {"prompt_token_ids": [rng.randrange(10, 128_000) for _ in range(prompt_tokens)]}
        for _ in range(batch)
    ]
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    params.detokenize = False
    begun = time.monotonic()
    llm.generate(prompts, params, use_tqdm=False)
    return time.monotonic() - begun


if __name__ == "__main__":
    main()
