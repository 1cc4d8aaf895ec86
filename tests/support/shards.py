"""Two workers of one tensor-parallel group with vLLM's own layers, for the price of one import.

    python -m tests.support.shards

Each loads a checkpoint's weight through vLLM's loaders into a layer that is cut between them, once
along its inputs (row-parallel) and once along its outputs (column-parallel). Writes a JSON line:
the largest difference between what both hold together and what the checkpoint says, or the error.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    RowParallelLinear,
)

from batchinfer.quantization.methods.bitsandbytes.dequantize import dequantized
from batchinfer.quantization.methods.bitsandbytes.vllm import BitsAndBytesConfig
from tests.support.checkpoints import KINDS

NUM_WORKERS = 2
NUM_OUT = 64


def checkpoint_weight(kind: str | None, num_in: int) -> torch.Tensor:
    """What the loader makes of it; None: unquantized. [NUM_OUT, num_in] float32"""
    torch.manual_seed(0)
    weight = torch.randn(NUM_OUT, num_in)
    if kind is None:
        return weight
    pieces = KINDS[kind].pack(weight)
    named = ((f"x.{name}", piece) for name, piece in pieces.items())
    ((_, whole),) = dequantized(named, kind.removeprefix("bnb-"))
    return whole


def row_parallel(config: BitsAndBytesConfig, weight: torch.Tensor) -> LinearBase:
    layer = RowParallelLinear(weight.shape[1], NUM_OUT, bias=False, quant_config=config)
    layer.weight.weight_loader(layer.weight, weight)
    return layer


def column_parallel(config: BitsAndBytesConfig, weight: torch.Tensor) -> LinearBase:
    """Two layers of a checkpoint in one of vLLM's, such as gate_up_proj."""
    halves = weight.chunk(2)
    sizes = [half.shape[0] for half in halves]
    layer = MergedColumnParallelLinear(weight.shape[1], sizes, bias=False, quant_config=config)
    for number, half in enumerate(halves):
        layer.weight.weight_loader(layer.weight, half, number)
    return layer


def difference(kind: str | None, num_in: int, *, is_row_parallel: bool) -> float | str:
    weight = checkpoint_weight(kind, num_in)
    settings = KINDS[kind].settings if kind else {"bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig.from_config(dict(settings))
    config.is_checkpoint = kind is not None
    try:
        layer = (row_parallel if is_row_parallel else column_parallel)(config, weight)
    except ValueError as error:
        return str(error)
    num_here = num_in // NUM_WORKERS if is_row_parallel else num_in
    held = layer.quant_method.apply(layer, torch.eye(num_here)).T.contiguous()
    parts = [torch.empty_like(held) for _ in range(NUM_WORKERS)]
    torch.distributed.all_gather(parts, held)
    if is_row_parallel:
        together = torch.cat(parts, 1)
    else:  # each has half of both layers
        together = torch.cat([part.chunk(2)[half] for half in (0, 1) for part in parts])
    return float((together - weight).abs().max())


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["VLLM_DIST_IDENT"] = str(rank)  # differs: then vLLM makes no memory to share
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(NUM_WORKERS, rank, f"file://{folder}/meet", rank, "gloo")
        initialize_model_parallel(NUM_WORKERS)
        found: dict[str, Any] = {}
        for kind in ("bnb-int8", "bnb-nf4", "bnb-fp4", None):
            for num_in in (256, 192):
                for is_row_parallel in (True, False):
                    name = f"{kind} {num_in} {'row' if is_row_parallel else 'column'}"
                    found[name] = difference(kind, num_in, is_row_parallel=is_row_parallel)
        destroy_model_parallel()
    if rank == 0:
        sys.stdout.write(f"{json.dumps(found)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for rank in range(NUM_WORKERS):
            pid = os.fork()
            if pid == 0:
                work(rank, folder)
                os._exit(0)
            workers.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
    sys.exit(any(codes))
