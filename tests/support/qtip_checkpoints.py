"""Two layers of the demo model in trellis codes, and the unquantized model that they stand for.

    python -m tests.support.qtip_checkpoints qtip|exl3 FOLDER [DENSE_FOLDER]

Weights are encoded greedily: quick, with some of each tile's last weights far off. What is tested
is names, layouts and layers, not quality. Bits, and in EXL3 codes, differ from layer to layer.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from batchinfer.quantization.methods.qtip.codes import CODES, gaussian_tlut, table
from batchinfer.quantization.methods.qtip.dense import Coded, dense, signs_of_bits
from batchinfer.quantization.methods.qtip.hadamard import block_hadamard
from batchinfer.quantization.methods.qtip.trellis import pack, to_sequences

DEMO = Path(__file__).resolve().parents[2] / "jobs" / "demo" / "model"
#: (code, bits) of the layers, in turn: one after the other of q, k, v, o, gate, up and down.
_QTIP = (("mcg", 4), ("mul1", 3), ("1mad", 5), ("3inst", 2), ("hyb", 2))
_EXL3 = (("mcg", 3), ("mul1", 4), ("3inst", 2), ("mul1", 2))
NUM_LAYERS = 2


def write_coded(
    kind: str, folder: Path, dense_folder: Path | None = None, *, kv_heads: int = 2
) -> None:
    """The model as `qtip` or `exl3`; in `dense_folder` unquantized, as it decodes in float32.

    `kv_heads`: 2, as it has, or 4, each of its own twice, so that two devices can share it.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    stored = load_file(DEMO / "model.safetensors")
    beyond = tuple(f"model.layers.{number}." for number in range(NUM_LAYERS, 100))
    stored = {name: tensor for name, tensor in stored.items() if not name.startswith(beyond)}
    if kv_heads == 4:
        for name in [name for name in stored if name.endswith(("k_proj.weight", "v_proj.weight"))]:
            stored[name] = stored[name].unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    if kind == "exl3":
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    for number, (name, weight) in enumerate(sorted(stored.items())):
        module = name.removesuffix(".weight")
        if not module.endswith(("_proj", "lm_head")):
            tensors[name] = plain[name] = weight
            continue
        code, num_bits = (_EXL3 if kind == "exl3" else _QTIP)[number % (4 + (kind == "qtip"))]
        layer = encode(weight, code, num_bits, seed=number)
        plain[name] = dense(layer)
        modules[module] = {"K": num_bits, "V": CODES[code], "code": code}
        is_old = kind == "exl3" and number % 5 == 0  # older files keep signs as bits
        parts = _exl3_parts(layer, is_old=is_old) if kind == "exl3" else _parts(layer)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    settings = {"quant_method": "exl3", "version": "0.0.1", "bits": 5.0, "head_bits": 6}
    if kind == "qtip":
        settings = qtip_settings(modules)
    heads = {"num_key_value_heads": kv_heads}
    _save(folder, tensors, {**heads, "quantization_config": settings})
    if dense_folder is not None:
        _save(dense_folder, plain, {**heads, "tie_word_embeddings": kind == "qtip"})


def qtip_settings(modules: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "qtip",
        "format_version": 1,
        "L": 16,
        "T": 256,
        "lane_order": "exl3",
        "had_in": "block128",
        "had_out": "block128",
        "default": {"K": 4, "V": 1, "code": "mcg"},
        "modules": modules,
    }


def encode(weight: Tensor, code: str, num_bits: int, *, seed: int = 0) -> Coded:
    """A layer for a weight [out, in]."""
    tlut = _tlut() if code == "hyb" else None
    values = table(code, tlut)
    generator = torch.Generator().manual_seed(seed)
    num_out, num_in = weight.shape
    suh = torch.randint(0, 2, (num_in,), generator=generator) * 2.0 - 1
    svh = torch.randint(0, 2, (num_out,), generator=generator) * 2.0 - 1
    coded = block_hadamard(block_hadamard((weight.float() * suh * svh[:, None]).T).T).T
    scale = (coded.square().mean() / values.float().square().mean()).sqrt() / 0.9
    svh = (svh * scale).half()
    states = _walk(to_sequences(coded / scale, "exl3"), values.float(), num_bits)
    return Coded(pack(states, num_bits), suh.half(), svh, code, tlut)


@cache
def _tlut() -> Tensor:
    return gaussian_tlut()


def _walk(sequences: Tensor, values: Tensor, num_bits: int) -> Tensor:
    """Greedy states [..., 256 / V] of sequences [..., 256], beginning and ending in zeros."""
    num_values = values.shape[1]
    step_bits = num_bits * num_values
    steps = sequences.flatten(0, -2).unflatten(-1, (-1, num_values))  # [tiles, steps, V]
    num_steps, num_kept = steps.shape[1], 16 - step_bits
    fresh = torch.arange(1 << step_bits)
    previous = torch.zeros(len(steps), dtype=torch.int64)
    states = []
    for step in range(num_steps):
        # The last state's kept bits are the first one's high ones.
        num_zeros = max(0, num_kept - (num_steps - 1 - step) * step_bits)
        allowed = fresh[:: 1 << min(num_zeros, step_bits)]
        candidates = ((previous << step_bits) & 0xFFFF)[:, None] | allowed  # [tiles, allowed]
        errors = (values[candidates] - steps[:, step, None]).square().sum(-1)
        previous = candidates.gather(1, errors.argmin(1, keepdim=True)).squeeze(1)
        states.append(previous)
    return torch.stack(states, 1).unflatten(0, sequences.shape[:-1])


def _parts(layer: Coded) -> dict[str, Tensor]:
    parts = {"trellis": layer.trellis, "suh": layer.suh, "svh": layer.svh}
    return parts if layer.tlut is None else {**parts, "tlut": layer.tlut}


def _exl3_parts(layer: Coded, *, is_old: bool) -> dict[str, Tensor]:
    parts = _parts(layer)
    if layer.code != "3inst":
        multiplier = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}[layer.code]
        parts[layer.code] = torch.tensor(multiplier - (1 << 32), dtype=torch.int32)
    if is_old:
        bits = (parts.pop("suh") < 0).long().unflatten(0, (-1, 16))
        parts["su"] = (bits << torch.arange(16)).sum(1).to(torch.int16)
        assert torch.equal(signs_of_bits(parts["su"]), layer.suh)
    return parts


def _save(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    for file in DEMO.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((DEMO / "config.json").read_text())
    config |= {"num_hidden_layers": NUM_LAYERS, **settings}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    kind, *folders = sys.argv[1:]
    write_coded(kind, *map(Path, folders))
