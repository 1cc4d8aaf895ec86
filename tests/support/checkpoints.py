"""Quantized checkpoints of the demo model, packed by hand: every Linear rounded to nearest.

    python -m tests.support.checkpoints KIND FOLDER

Each kind is written as its own tools write it, so that vLLM reads it as any other checkpoint. No
calibration: what is tested is names, formats and kernels, not quality.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DEMO = Path(__file__).resolve().parents[2] / "jobs" / "demo" / "model"
GROUP_SIZE = 128
BLOCK = 128
FP8_MAX = 448.0
LARGEST_WEIGHT = 0.35  # of the demo model's Linears 0.328
FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column i of eight goes to nibble AWQ_ORDER.index(i)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """How a Linear's weight [out, in] becomes tensors, and what config.json says of it."""

    pack: Callable[[Tensor], Tensors]
    settings: Mapping[str, Any]


def write_checkpoint(kind: str, folder: Path) -> Path:
    """A copy of the demo model in `folder`, its Linears quantized. Returns the folder."""
    folder.mkdir(parents=True)
    for file in DEMO.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    tensors: Tensors = {}
    for name, tensor in load_file(DEMO / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            packed = KINDS[kind].pack(tensor.float())
            stem = name.removesuffix("weight")
            tensors |= {stem + part: value.contiguous() for part, value in packed.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((DEMO / "config.json").read_text())
    config["quantization_config"] = dict(KINDS[kind].settings)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_experts(folder: Path, *, expert_size: int = 64) -> Path:
    """A tiny mixture of experts, random weights and the demo's tokenizer. Returns the folder."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=expert_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in DEMO.iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, folder)
    return folder


def _nibbles(values: Tensor) -> Tensor:
    """Values of 0 to 15, eight to an int32, the first in the lowest bits. [.., n] -> [.., n / 8]"""
    shifts = torch.arange(0, 32, 4)
    packed = (values.long().unflatten(-1, (-1, 8)) << shifts).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def _int8(weight: Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 127  # [out, 1]
    quantized = (weight / scale).round().clamp(-128, 127).to(torch.int8)
    return {"weight": quantized, "weight_scale": scale.bfloat16()}


def _int4_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values of -8 to 7 [out, in], scales [out, in / GROUP_SIZE]."""
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    scale = groups.abs().amax(2, keepdim=True) / 7
    return (groups / scale).round().clamp(-8, 7).flatten(1), scale.squeeze(2)


def _w4a16(weight: Tensor) -> Tensors:
    values, scale = _int4_groups(weight)
    return {
        "weight_packed": _nibbles(values + 8),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }


def _gptq(weight: Tensor) -> Tensors:
    values, scale = _int4_groups(weight)
    num_out, num_in = weight.shape
    zeros = torch.full((num_in // GROUP_SIZE, num_out), 7)  # the format stores 8 as 8 - 1
    return {
        "qweight": _nibbles(values + 8).T,  # [in / 8, out]
        "qzeros": _nibbles(zeros),
        "scales": scale.T.half(),
        "g_idx": torch.arange(num_in, dtype=torch.int32) // GROUP_SIZE,
    }


def _awq(weight: Tensor) -> Tensors:
    values, scale = _int4_groups(weight)
    num_out, num_in = weight.shape

    def pack(columns: Tensor) -> Tensor:  # [n, out] -> [n, out / 8]
        return _nibbles(columns.unflatten(1, (-1, 8))[:, :, list(AWQ_ORDER)].flatten(1))

    return {
        "qweight": pack((values + 8).T),
        "qzeros": pack(torch.full((num_in // GROUP_SIZE, num_out), 8)),
        "scales": scale.T.half(),
    }


def _to_fp8(values: Tensor) -> Tensor:
    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _fp8_block(scale_name: str) -> Callable[[Tensor], Tensors]:
    def pack(weight: Tensor) -> Tensors:
        blocks = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [o, 128, i, 128]
        scale = blocks.abs().amax((1, 3)) / FP8_MAX  # [o, i]
        quantized = _to_fp8(blocks / scale[:, None, :, None])
        return {"weight": quantized.reshape(weight.shape), scale_name: scale}

    return pack


def _fp8_channel(weight: Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / FP8_MAX
    return {"weight": _to_fp8(weight / scale), "weight_scale": scale}


def _fp8_tensor(weight: Tensor) -> Tensors:
    scale = weight.abs().amax() / FP8_MAX
    return {"weight": _to_fp8(weight / scale), "weight_scale": scale}


def _to_fp4(values: Tensor) -> Tensor:
    """The nearest float4 (E2M1), two to a byte, the first in the low bits. [.., n] -> [.., n/2]"""
    nearest = (values.abs().unsqueeze(-1) - FP4_VALUES).abs().argmin(-1)
    codes = (nearest + 8 * (values < 0)).to(torch.uint8).unflatten(-1, (-1, 2))
    return codes[..., 0] | codes[..., 1] << 4


def _nvfp4(weight: Tensor) -> Tensors:
    # The same for all layers: vLLM takes one for layers that it computes together.
    global_scale = torch.tensor(FP8_MAX * 6 / LARGEST_WEIGHT)
    groups = weight.unflatten(1, (-1, 16))
    scale = _to_fp8(groups.abs().amax(2) / 6 * global_scale)  # [out, in / 16]
    values = groups * global_scale / scale.float().clamp(min=2**-9).unsqueeze(2)
    return {
        "weight_packed": _to_fp4(values.flatten(1)),
        "weight_scale": scale,
        "weight_global_scale": global_scale.reshape(1),
    }


def _mxfp4(weight: Tensor) -> Tensors:
    groups = weight.unflatten(1, (-1, 32))
    exponent = (groups.abs().amax(2) / 6).log2().ceil()  # the largest becomes at most 6
    return {
        "weight_packed": _to_fp4((groups / exponent.exp2().unsqueeze(2)).flatten(1)),
        "weight_scale": (exponent + 127).to(torch.uint8),
    }


def _compressed(
    file_format: str, weights: dict[str, Any], activations: dict[str, Any] | None = None
) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, "dynamic": False, **weights},
        "input_activations": activations and {"symmetric": True, "dynamic": True, **activations},
        "output_activations": None,
        "format": file_format,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": file_format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _int(num_bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"type": "int", "num_bits": num_bits, "strategy": strategy, **more}


def _float(num_bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"type": "float", "num_bits": num_bits, "strategy": strategy, **more}


def _bnb_4bit(
    quant_type: str, *, is_nested: bool, storage: torch.dtype = torch.uint8
) -> Callable[[Tensor], Tensors]:
    def pack(weight: Tensor) -> Tensors:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(
            weight.bfloat16(),
            quant_type=quant_type,
            compress_statistics=is_nested,
            quant_storage=storage,
        )
        pieces = state.as_dict(packed=True)
        return {"weight": packed} | {f"weight.{name}": piece for name, piece in pieces.items()}

    return pack


def _bnb_int8(weight: Tensor) -> Tensors:
    absmax = weight.abs().amax(1)
    integers = (weight / absmax[:, None] * 127).round().to(torch.int8)
    return {"weight": integers, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def _bnb(**settings: Any) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
        **settings,
    }


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_FOUR_BITS = {"bits": 4, "group_size": GROUP_SIZE}

KINDS: dict[str, Kind] = {
    "w8a8": Kind(_int8, _compressed("int-quantized", _int(8, "channel"), _int(8, "token"))),
    "w4a16": Kind(_w4a16, _compressed("pack-quantized", _int(4, "group", group_size=GROUP_SIZE))),
    "awq": Kind(_awq, {"quant_method": "awq", "version": "gemm", "zero_point": True, **_FOUR_BITS}),
    "gptq": Kind(
        _gptq,
        {"quant_method": "gptq", "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
        | _FOUR_BITS,
    ),
    "bnb-nf4": Kind(
        _bnb_4bit("nf4", is_nested=False), _bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    ),
    "bnb-nf4-nested": Kind(
        _bnb_4bit("nf4", is_nested=True),
        _bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "bnb-nf4-bf16": Kind(
        _bnb_4bit("nf4", is_nested=False, storage=torch.bfloat16),
        _bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage="bfloat16"),
    ),
    "bnb-fp4": Kind(
        _bnb_4bit("fp4", is_nested=False), _bnb(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    ),
    "bnb-int8": Kind(_bnb_int8, _bnb(load_in_8bit=True)),
    "fp8-block": Kind(_fp8_block("weight_scale_inv"), _FP8 | {"weight_block_size": [BLOCK, BLOCK]}),
    "fp8-tensor": Kind(_fp8_tensor, _FP8),
    "fp8-block-compressed": Kind(
        _fp8_block("weight_scale"),
        _compressed(
            "float-quantized",
            _float(8, "block", block_structure=[BLOCK, BLOCK]),
            _float(8, "group", group_size=BLOCK),
        ),
    ),
    "fp8-channel": Kind(
        _fp8_channel, _compressed("float-quantized", _float(8, "channel"), _float(8, "token"))
    ),
    "nvfp4": Kind(
        _nvfp4, _compressed("nvfp4-pack-quantized", _float(4, "tensor_group", group_size=16))
    ),
    "mxfp4": Kind(_mxfp4, _compressed("mxfp4-pack-quantized", _float(4, "group", group_size=32))),
}


if __name__ == "__main__":
    write_checkpoint(sys.argv[1], Path(sys.argv[2]))
