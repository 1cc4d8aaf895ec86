"""The names of `model.quantization`: one record each, and nothing about them anywhere else.

Facts of CPUs were measured with vLLM 0.32 (AVX-512 with and without AMX, AVX2), those of GPUs with
vLLM 0.26 on an H200; least compute capabilities are those that vLLM's own classes name. Must not
know: how a checkpoint is recognised, which machine this is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from batchinfer.quantization.machine import Machine

#: What the files of a checkpoint can be -> how it is called.
SCHEMES: Mapping[str, str] = MappingProxyType(
    {
        "plain": "unquantized",
        "awq": "AWQ",
        "gptq": "GPTQ, 4 bits",
        "gptq-8bit": "GPTQ, 8 bits",
        "w8a8": "W8A8 (int8)",
        "w8a16": "W8A16 (int8 weights)",
        "w4a16": "W4A16 (int4 weights)",
        "w4a8": "W4A8 (int4 weights, int8 activations)",
        "fp8-tensor": "FP8 with a scale for each tensor",
        "fp8-channel": "FP8 with a scale for each channel",
        "fp8-block": "FP8 with a scale for each block",
        "mxfp8": "MXFP8",
        "nvfp4": "NVFP4",
        "mxfp4": "MXFP4",
        "bnb-4bit": "bitsandbytes, 4 bits (NF4, FP4)",
        "bnb-8bit": "bitsandbytes, 8 bits",
        "exl3": "EXL3",
        "qtip": "QTIP",
        "gguf": "GGUF",
    }
)

#: vLLM's name for the method that our plugin registers with it.
BITSANDBYTES = "batchinfer_bitsandbytes"

#: Below this compute capability vLLM refuses bfloat16, in which most checkpoints are.
BFLOAT16_CAPABILITY = (8, 0)

_ALL_DTYPES = ("bfloat16", "float16", "float32")
_HALF = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Device:
    """How a name runs on one kind of device, and what it needs there."""

    schemes: tuple[str, ...]  # of checkpoints
    refused: Mapping[str, str] = field(default_factory=dict)  # scheme -> why it does not run
    online: str | None = None  # vLLM's `quantization` for a plain checkpoint; None: cannot
    online_otherwise: str | None = None  # the same, weight-only and for experts; None: `online`
    made_by: str | None = None  # method (see recipes) of a checkpoint of a plain model; None: never
    is_plugin: bool = False  # then vLLM knows checkpoints too by `online` alone
    dtypes: tuple[str, ...] = _HALF  # the first is taken where the checkpoint's own cannot be
    refused_dtypes: Mapping[str, str] = field(default_factory=dict)  # dtype -> what it does
    min_capability: tuple[int, int] | None = None
    native_capability: tuple[int, int] | None = None  # below: weight-only, through Marlin
    cpu_flags: tuple[str, ...] = ()  # all of them
    kernels: Mapping[str, str] = field(default_factory=dict)  # scheme -> vLLM's CPU operator
    packages: tuple[str, ...] = ()
    refused_adapters: str = ""  # why LoRA adapters do not run beside it; "": they do
    refused_experts: str = ""  # why quantized experts do not run; "": they do
    refused_act_order: str = ""  # why GPTQ's groups out of order do not run; "": they do
    expert_cpu_flags: tuple[str, ...] = ()  # what they need, all of them


@dataclass(frozen=True, slots=True)
class Quantization:
    """One name. `cpu` and `gpu` are texts where the name does not run there: why."""

    name: str
    meaning: str
    bits_per_weight: float  # of a quantized layer, its scales included, at the usual group size
    cpu: Device | str
    gpu: Device | str
    how_to_make: str
    only_schemes: tuple[str, ...] = ()  # of a name that runs nowhere yet

    @property
    def schemes(self) -> tuple[str, ...]:
        """What a checkpoint of this name can be, whether it runs here or not."""
        found: list[str] = []
        for device in (self.cpu, self.gpu):
            if isinstance(device, Device):
                found += [*device.schemes, *device.refused]
        return tuple(dict.fromkeys(found)) or self.only_schemes

    def on(self, machine: Machine) -> Device | str:
        """How it runs on the machine's kind of device; on an unknown one as on a GPU."""
        return self.cpu if machine.device == "cpu" else self.gpu

    @property
    def runs(self) -> bool:
        """Anywhere."""
        return isinstance(self.cpu, Device) or isinstance(self.gpu, Device)

    @property
    def takes_plain(self) -> bool:
        """Whether it says what weights become; other names say what the files are."""
        devices = (self.cpu, self.gpu)
        return any(isinstance(d, Device) and (d.online or d.made_by) for d in devices)

    @property
    def dtype(self) -> str | None:
        """The one that is its whole meaning: of fp32, fp16 and bf16."""
        if isinstance(self.cpu, Device) and self.cpu.schemes == ("plain",):
            return self.cpu.dtypes[0] if len(self.cpu.dtypes) == 1 else None
        return None


#: Of vLLM's CPU kernels for experts of 8- and 4-bit integers.
_EXPERT_FLAGS = ("amx_tile",)
_NO_BNB_EXPERTS = "bitsandbytes quantizes linear layers alone"
#: In vLLM 0.32; 0.26 computes it on a GPU.
_NO_ACT_ORDER = "vLLM computes groups of neighbouring inputs alone"
_NOT_YET = "not yet in this version"
#: In vLLM's libraries for AVX-512, not in that for AVX2.
_INT4_KERNEL = "cpu_gemm_wna16"
_COMPRESSED = ("compressed-tensors",)


def _plain(name: str, meaning: str, bits: float, dtypes: tuple[str, ...]) -> Quantization:
    capability = BFLOAT16_CAPABILITY if dtypes == ("bfloat16",) else None
    return Quantization(
        name=name,
        meaning=meaning,
        bits_per_weight=bits,
        cpu=Device(("plain",), dtypes=dtypes),
        gpu=Device(("plain",), dtypes=dtypes, min_capability=capability),
        how_to_make="any unquantized checkpoint",
    )


def _quantize(method: str) -> str:
    return f"`batchinfer quantize MODEL OUT --method {method}`"


TABLE: tuple[Quantization, ...] = (
    _plain("none", "unquantized, in `model.dtype`", 16, _ALL_DTYPES),
    _plain("fp32", "unquantized, float32", 32, ("float32",)),
    _plain("fp16", "unquantized, float16", 16, ("float16",)),
    _plain("bf16", "unquantized, bfloat16", 16, ("bfloat16",)),
    Quantization(
        name="int8",
        meaning="8-bit integer weights and, in W8A8, activations (compressed-tensors)",
        bits_per_weight=8.0,
        cpu=Device(
            schemes=("w8a8",),
            refused={"w8a16": "vLLM's CPU kernels for 16-bit activations take 4-bit weights"},
            dtypes=("bfloat16", "float32"),
            refused_dtypes={"float16": "aborts the process in vLLM"},
            made_by="int8",
            packages=_COMPRESSED,
            kernels={"w8a8": "onednn_scaled_mm", "plain": "onednn_scaled_mm"},
            refused_adapters="vLLM's CPU kernel takes the weights to where adapters do not find "
            "them",
            expert_cpu_flags=_EXPERT_FLAGS,
        ),
        gpu=Device(
            schemes=("w8a8", "w8a16"),
            made_by="int8",
            dtypes=_HALF,
            min_capability=(7, 5),
            packages=_COMPRESSED,
        ),
        how_to_make=_quantize("int8"),
    ),
    Quantization(
        name="int4",
        meaning="4-bit integer weights in groups, 16-bit activations (compressed-tensors)",
        bits_per_weight=4.125,
        cpu=Device(
            schemes=("w4a16", "w4a8"),
            made_by="int4",
            packages=_COMPRESSED,
            kernels={"w4a16": _INT4_KERNEL, "plain": _INT4_KERNEL},  # w4a8 has one of torch
            refused_act_order=_NO_ACT_ORDER,
            expert_cpu_flags=_EXPERT_FLAGS,
        ),
        gpu=Device(
            schemes=("w4a16",),
            made_by="int4",
            refused={"w4a8": "vLLM does not find its packed weights"},
            min_capability=(7, 5),
            packages=_COMPRESSED,
        ),
        how_to_make=f"{_quantize('int4')}, or awq or gptq with calibration",
    ),
    Quantization(
        name="fp8",
        meaning="8-bit float weights and activations, from a checkpoint or on the fly",
        bits_per_weight=8.0,
        cpu=Device(
            schemes=("fp8-block",),
            refused={
                "fp8-tensor": "vLLM has no CPU kernel that quantizes activations by tensor",
                "fp8-channel": "vLLM computes it on a CPU with a scalar reference of 30 million "
                "multiplications a second",
                "mxfp8": "vLLM has no CPU kernel for it",
            },
            online="fp8_per_block",
            dtypes=("bfloat16",),
            cpu_flags=("amx_tile", "amx_bf16"),
            kernels={"fp8-block": "fp8_scaled_mm_cpu", "plain": "fp8_scaled_mm_cpu"},
        ),
        gpu=Device(
            schemes=("fp8-tensor", "fp8-channel", "fp8-block", "mxfp8"),
            # Scales of channels and tokens are nearer to the model than one of a whole tensor, and
            # faster on an H200; not all of vLLM's kernels for experts and older GPUs know them.
            online="fp8_per_channel",
            online_otherwise="fp8",
            min_capability=(7, 5),
            native_capability=(8, 9),
        ),
        how_to_make=_quantize("fp8"),
    ),
    Quantization(
        name="fp4",
        meaning="4-bit float weights, NVFP4 or MXFP4 (compressed-tensors, ModelOpt)",
        bits_per_weight=4.5,
        cpu="vLLM has no CPU kernel for it",
        gpu=Device(
            schemes=("nvfp4", "mxfp4"),
            made_by="nvfp4",
            min_capability=(8, 0),
            native_capability=(10, 0),
            packages=_COMPRESSED,
        ),
        how_to_make=f"{_quantize('nvfp4')} or mxfp4",
    ),
    Quantization(
        name="awq",
        meaning="a checkpoint in AWQ's own format (4 bits)",
        bits_per_weight=4.156,
        cpu=Device(schemes=("awq",), kernels={"awq": _INT4_KERNEL}, expert_cpu_flags=_EXPERT_FLAGS),
        gpu=Device(schemes=("awq",), min_capability=(7, 5)),
        how_to_make="AutoAWQ (`batchinfer quantize --method awq` writes an int4 checkpoint)",
    ),
    Quantization(
        name="gptq",
        meaning="a checkpoint in GPTQ's own format (4 or 8 bits)",
        bits_per_weight=4.156,
        cpu=Device(
            schemes=("gptq",),
            kernels={"gptq": _INT4_KERNEL},
            refused={"gptq-8bit": "vLLM's CPU kernels take 4-bit weights"},
            refused_act_order=_NO_ACT_ORDER,
            expert_cpu_flags=_EXPERT_FLAGS,
        ),
        gpu=Device(schemes=("gptq", "gptq-8bit"), min_capability=(7, 5)),
        how_to_make="GPTQModel (`batchinfer quantize --method gptq` writes an int4 checkpoint)",
    ),
    Quantization(
        name="nf4",
        meaning="4-bit NormalFloat of bitsandbytes, and its checkpoints; weight-only",
        bits_per_weight=4.5,
        cpu=Device(
            schemes=("bnb-4bit", "bnb-8bit"),
            online=BITSANDBYTES,
            is_plugin=True,
            dtypes=_ALL_DTYPES,
            packages=("bitsandbytes",),
            refused_experts=_NO_BNB_EXPERTS,
        ),
        gpu=Device(
            schemes=("bnb-4bit", "bnb-8bit"),
            online=BITSANDBYTES,
            is_plugin=True,
            dtypes=_ALL_DTYPES,
            min_capability=(7, 5),
            packages=("bitsandbytes",),
            refused_experts=_NO_BNB_EXPERTS,
        ),
        how_to_make="transformers with BitsAndBytesConfig(load_in_4bit=True)",
    ),
    Quantization(
        name="qtip",
        meaning="trellis-coded weights of 2 to 4 bits (QTIP)",
        bits_per_weight=2.0,
        cpu=_NOT_YET,
        gpu=_NOT_YET,
        how_to_make="QTIP's own tools",
        only_schemes=("qtip",),
    ),
    Quantization(
        name="exl3",
        meaning="trellis-coded weights of ExLlamaV3",
        bits_per_weight=4.0,
        cpu=_NOT_YET,
        gpu=_NOT_YET,
        how_to_make="ExLlamaV3's convert.py",
        only_schemes=("exl3",),
    ),
    Quantization(
        name="gguf",
        meaning="GGUF files of llama.cpp",
        bits_per_weight=4.8,
        cpu=_NOT_YET,
        gpu=_NOT_YET,
        how_to_make="llama.cpp's convert_hf_to_gguf.py and llama-quantize",
        only_schemes=("gguf",),
    ),
)


def record_of(name: str) -> Quantization:
    """The record of a name that the job's model allows."""
    return next(record for record in TABLE if record.name == name)


def name_of(scheme: str) -> str:
    """The name that `auto` takes for a checkpoint of this scheme."""
    return next(record.name for record in TABLE if scheme in record.schemes)
