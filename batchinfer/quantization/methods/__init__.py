"""The methods. A new one is a folder here, with `METHOD` in its record.py, and a line in `METHODS`.

A folder has `record.py` (plain: the `Method`) and, where needed, `files.py` (plain: stored
tensors), `write.py` (torch: how a weight becomes a checkpoint's) and `vllm.py` (torch and vLLM:
registers itself). Must not know: engines, model folders.
"""

from collections.abc import Iterable

from batchinfer.quantization.methods.awq.record import METHOD as AWQ
from batchinfer.quantization.methods.base import Method, Option, Plugin, Recipe, Stored, Tensor
from batchinfer.quantization.methods.bitsandbytes.record import METHOD as BITSANDBYTES
from batchinfer.quantization.methods.compressed_tensors.record import METHOD as COMPRESSED_TENSORS
from batchinfer.quantization.methods.exl3.record import METHOD as EXL3
from batchinfer.quantization.methods.fp4.record import METHOD as FP4
from batchinfer.quantization.methods.fp8.record import METHOD as FP8
from batchinfer.quantization.methods.gguf.record import METHOD as GGUF
from batchinfer.quantization.methods.gptq.record import METHOD as GPTQ
from batchinfer.quantization.methods.modelopt.record import METHOD as MODELOPT
from batchinfer.quantization.methods.qtip.record import METHOD as QTIP
from batchinfer.quantization.methods.unquantized.record import METHOD as UNQUANTIZED

__all__ = [
    "METHODS",
    "Method",
    "Option",
    "Plugin",
    "Recipe",
    "Stored",
    "Tensor",
    "method_of",
    "plugins",
]

#: In the order in which tables and advice name them.
METHODS: tuple[Method, ...] = (
    UNQUANTIZED,
    COMPRESSED_TENSORS,
    FP8,
    FP4,
    AWQ,
    GPTQ,
    MODELOPT,
    BITSANDBYTES,
    QTIP,
    EXL3,
    GGUF,
)


def method_of(scheme: str) -> Method | None:
    """The method that names a scheme, and knows its tensors; None if only the engine does."""
    return next((method for method in METHODS if scheme in method.schemes), None)


def plugins(engine_quantization: str | None) -> Iterable[Plugin]:
    """Code of ours that vLLM needs in order to run this `quantization` of its."""
    for method in METHODS:
        if method.vllm is not None and method.vllm.name == engine_quantization:
            yield method.vllm
