"""What vLLM runs on which device: for each name, what it needs there, or why it does not run.

Names that a method of ours brings to vLLM are in that method's record. Facts of CPUs were measured
with vLLM 0.32 (AVX-512 with and without AMX, AVX2), those of GPUs with vLLM 0.26 on an H200; least
compute capabilities are those that vLLM's own classes name. Must not know: vLLM's modules, which
machine this is.
"""

from __future__ import annotations

from collections.abc import Mapping

from batchinfer.engine.vllm.adapters import RANKS, why_no_adapter
from batchinfer.quantization import (
    ALL_DTYPES,
    BFLOAT16_CAPABILITY,
    DeviceSupport,
    KvDevice,
    Support,
)

#: Of vLLM's CPU kernels for experts of 8- and 4-bit integers.
EXPERT_FLAGS = ("amx_tile",)
#: In vLLM's libraries for AVX-512, not in that for AVX2.
INT4_KERNEL = "cpu_gemm_wna16"
#: In vLLM 0.32; 0.26 computes it on a GPU.
NO_ACT_ORDER = "vLLM computes only groups of neighbouring inputs"
#: The package that vLLM reads such checkpoints with, and that ours are made by.
COMPRESSED = ("compressed-tensors",)

_GGUF = "vLLM reads no GGUF files here, and engine.name: llama_cpp does"

_CPU: Mapping[str, DeviceSupport | str] = {
    "none": DeviceSupport(("plain",), dtypes=ALL_DTYPES),
    "fp32": DeviceSupport(("plain",), dtypes=("float32",)),
    "fp16": DeviceSupport(("plain",), dtypes=("float16",)),
    "bf16": DeviceSupport(("plain",), dtypes=("bfloat16",)),
    "int8": DeviceSupport(
        schemes=("w8a8",),
        refused={"w8a16": "vLLM's CPU kernels for 16-bit activations take 4-bit weights"},
        dtypes=("bfloat16", "float32"),
        refused_dtypes={"float16": "aborts the process in vLLM"},
        made_by="int8",
        packages=COMPRESSED,
        kernels={"w8a8": "onednn_scaled_mm", "plain": "onednn_scaled_mm"},
        refused_adapters="vLLM's CPU kernel moves the weights to where adapters do not find them",
        expert_cpu_flags=EXPERT_FLAGS,
    ),
    "int4": DeviceSupport(
        schemes=("w4a16", "w4a8"),
        made_by="int4",
        packages=COMPRESSED,
        kernels={"w4a16": INT4_KERNEL, "plain": INT4_KERNEL},  # w4a8 has one of torch
        refused_act_order=NO_ACT_ORDER,
        expert_cpu_flags=EXPERT_FLAGS,
    ),
    "fp8": DeviceSupport(
        schemes=("fp8-block",),
        refused={
            "fp8-tensor": "vLLM has no CPU kernel that quantizes activations by tensor",
            "fp8-channel": "vLLM computes it on a CPU with a scalar reference of 30 "
            "million multiplications a second",
            "mxfp8": "vLLM has no CPU kernel for it",
        },
        online="fp8_per_block",
        dtypes=("bfloat16",),
        cpu_flags=("amx_tile", "amx_bf16"),
        kernels={"fp8-block": "fp8_scaled_mm_cpu", "plain": "fp8_scaled_mm_cpu"},
    ),
    "fp4": "vLLM has no CPU kernel for it",
    "awq": DeviceSupport(
        schemes=("awq",), kernels={"awq": INT4_KERNEL}, expert_cpu_flags=EXPERT_FLAGS
    ),
    "gptq": DeviceSupport(
        schemes=("gptq",),
        kernels={"gptq": INT4_KERNEL},
        refused={"gptq-8bit": "vLLM's CPU kernels take 4-bit weights"},
        refused_act_order=NO_ACT_ORDER,
        expert_cpu_flags=EXPERT_FLAGS,
    ),
    "gguf": _GGUF,
}

_CUDA: Mapping[str, DeviceSupport | str] = {
    "none": DeviceSupport(("plain",), dtypes=ALL_DTYPES),
    "fp32": DeviceSupport(("plain",), dtypes=("float32",)),
    "fp16": DeviceSupport(("plain",), dtypes=("float16",)),
    "bf16": DeviceSupport(("plain",), dtypes=("bfloat16",), min_capability=BFLOAT16_CAPABILITY),
    "int8": DeviceSupport(
        schemes=("w8a8", "w8a16"),
        made_by="int8",
        min_capability=(7, 5),
        packages=COMPRESSED,
    ),
    "int4": DeviceSupport(
        schemes=("w4a16",),
        made_by="int4",
        refused={"w4a8": "vLLM does not find its packed weights"},
        min_capability=(7, 5),
        packages=COMPRESSED,
    ),
    "fp8": DeviceSupport(
        schemes=("fp8-tensor", "fp8-channel", "fp8-block", "mxfp8"),
        # Scales of channels and tokens are nearer to the model than one of a whole tensor,
        # and faster on an H200; not all of vLLM's kernels for experts and older GPUs know
        # them.
        online="fp8_per_channel",
        online_otherwise="fp8",
        min_capability=(7, 5),
        native_capability=(8, 9),
    ),
    "fp4": DeviceSupport(
        schemes=("nvfp4", "mxfp4"),
        made_by="nvfp4",
        min_capability=(8, 0),
        native_capability=(10, 0),
        packages=COMPRESSED,
    ),
    "awq": DeviceSupport(schemes=("awq",), min_capability=(7, 5)),
    "gptq": DeviceSupport(schemes=("gptq", "gptq-8bit"), min_capability=(7, 5)),
    "gguf": _GGUF,
}

#: The CPU attention's instruction set, and the numbers of a head that it converts at once.
_CPU_ATTENTION = KvDevice(cpu_flag="avx512f", head_multiple=32)
#: Measured: one wrong result for all three names, and no error.
_NO_CPU_SCALES = "vLLM has no CPU kernel for it, accepts the name and computes something else"

_KV_CPU: Mapping[str, KvDevice | str] = {
    "fp8": _CPU_ATTENTION,
    "fp8_e5m2": _CPU_ATTENTION,
    "fp8_per_token_head": _NO_CPU_SCALES,
    "int8_per_token_head": _NO_CPU_SCALES,
    "int4_per_token_head": _NO_CPU_SCALES,
}

_KV_CUDA: Mapping[str, KvDevice | str] = {
    "fp8": KvDevice((8, 9)),
    "fp8_e5m2": "vLLM's attention on a GPU fails with it; fp8 (E4M3) takes the same memory",
    "fp8_per_token_head": KvDevice((8, 9)),
    "int8_per_token_head": KvDevice((7, 5)),
    "int4_per_token_head": KvDevice((7, 5)),
}

SUPPORT: Mapping[str, Support] = {
    device: Support(
        "vLLM",
        names,
        kv_cache,
        why_no_adapter,
        max_adapter_rank=RANKS[-1],
        vocabulary_multiple=64,
        # In float32, its softmax, and sorted values with their indices for top-p: the sampler may
        # keep them all at once.
        logit_bytes=4 + 4 + 4 + 8,
    )
    for device, names, kv_cache in (("cpu", _CPU, _KV_CPU), ("cuda", _CUDA, _KV_CUDA))
}
