"""What an engine runs on a kind of device, for each name: the form of the table that it keeps.

The table is the engine's and is imported late, by `Machine.engine`. Must not know: any engine, any
method.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from batchinfer.quantization.machine import Machine

HALF = ("bfloat16", "float16")
ALL_DTYPES = (*HALF, "float32")

#: Below this compute capability no engine computes in bfloat16, in which most checkpoints are.
BFLOAT16_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class DeviceSupport:
    """How a name runs on one kind of device, and what it needs there."""

    schemes: tuple[str, ...]  # of checkpoints
    refused: Mapping[str, str] = field(default_factory=dict)  # scheme -> why it does not run
    online: str | None = None  # the engine's name for it, of a plain checkpoint
    online_otherwise: str | None = None  # the same, weight-only and for experts; None: `online`
    made_by: str | None = None  # recipe of a checkpoint of a plain model; None: never
    checkpoints_as: str | None = None  # the engine's name for checkpoints that a plugin reads
    dtypes: tuple[str, ...] = HALF  # the first is taken where the checkpoint's own cannot be
    refused_dtypes: Mapping[str, str] = field(default_factory=dict)  # dtype -> what it does
    min_capability: tuple[int, int] | None = None
    native_capability: tuple[int, int] | None = None  # below: weight-only
    cpu_flags: tuple[str, ...] = ()  # all of them
    kernels: Mapping[str, str] = field(default_factory=dict)  # scheme -> the engine's CPU operator
    packages: tuple[str, ...] = ()
    refused_adapters: str = ""  # why LoRA adapters do not run beside it; "": they do
    refused_experts: str = ""  # why quantized experts do not run; "": they do
    refused_act_order: str = ""  # why GPTQ's groups out of order do not run; "": they do
    expert_cpu_flags: tuple[str, ...] = ()  # what they need, all of them


@dataclass(frozen=True, slots=True)
class KvDevice:
    """What a name of `model.kv_cache_dtype` needs on one kind of device."""

    min_capability: tuple[int, int] | None = None
    cpu_flag: str = ""
    head_multiple: int = 1  # numbers of a head have to be a multiple of it


def _runs_any_adapter(config: Mapping[str, Any]) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Support:
    """What an engine runs on one kind of device; a text says why it does not."""

    title: str  # the engine, as people call it
    names: Mapping[str, DeviceSupport | str]  # of `model.quantization`
    kv_cache: Mapping[str, KvDevice | str] = field(default_factory=dict)  # `model.kv_cache_dtype`
    #: An adapter's adapter_config.json -> why the engine cannot run such an adapter; None: it can.
    why_no_adapter: Callable[[Mapping[str, Any]], str | None] = _runs_any_adapter
    max_adapter_rank: int | None = None
    vocabulary_multiple: int = 1  # embedding and output layer are filled up to one of it, in tokens
    #: Bytes of a token's logits in a step, besides one number of the model's dtype.
    logit_bytes: int = 4


def support_of(machine: Machine) -> Support:
    """What the machine's engine runs there; on an unknown device as on a GPU.

    It is `SUPPORT`, by device, of the module `support` in the engine's folder.
    """
    folder = machine.engine if "." in machine.engine else f"batchinfer.engine.{machine.engine}"
    tables: Mapping[str, Support] = importlib.import_module(f"{folder}.support").SUPPORT
    return tables[machine.device or "cuda"]
