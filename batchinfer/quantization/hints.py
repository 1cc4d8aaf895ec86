"""What a folder's name says of its files: a hint that they must bear out.

Only what is certain is refused. Must not know: files, machines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from batchinfer.errors import ConfigError
from batchinfer.quantization.detect import Checkpoint
from batchinfer.quantization.table import SCHEMES, name_of

_INT4 = ("w4a16", "w4a8")
_INT8 = ("w8a8", "w8a16")
_FP8 = ("fp8-tensor", "fp8-channel", "fp8-block", "mxfp8")
_BNB = ("bnb-4bit", "bnb-8bit")
_ANY_BITS = ("exl3", "qtip", "gguf")

#: Word in a folder's name -> what its files can then be. AWQ and GPTQ are also methods by which
#: compressed-tensors checkpoints are made.
_HINTS: Mapping[str, tuple[str, ...]] = {
    "awq": ("awq", *_INT4, *_INT8),
    "gptq": ("gptq", "gptq-8bit", *_INT4, *_INT8),
    "int4": ("awq", "gptq", "bnb-4bit", *_INT4),
    "int8": ("gptq-8bit", "bnb-8bit", *_INT8),
    "4bit": ("awq", "gptq", "bnb-4bit", "nvfp4", "mxfp4", *_INT4, *_ANY_BITS),
    "8bit": ("gptq-8bit", "bnb-8bit", *_INT8, *_FP8, *_ANY_BITS),
    "w4a16": ("awq", "gptq", "w4a16"),
    "w4a8": ("w4a8",),
    "w8a8": ("w8a8", *_FP8),
    "w8a16": ("gptq-8bit", "w8a16"),
    "fp8": _FP8,
    "fp4": ("nvfp4", "mxfp4", "bnb-4bit"),
    "nvfp4": ("nvfp4",),
    "mxfp4": ("mxfp4",),
    "mxfp8": ("mxfp8",),
    "bnb": _BNB,
    "bitsandbytes": _BNB,
    "nf4": ("bnb-4bit",),
    "exl3": ("exl3",),
    "qtip": ("qtip",),
    "gguf": ("gguf",),
}

#: Those that name a format of files. Others say how weights were rounded, and to what, which
#: families that only vLLM knows do as well (there are torchao checkpoints called AWQ-INT4).
_FORMAT_HINTS = ("bnb", "bitsandbytes", "exl3", "qtip", "gguf")

#: What unquantized weights are called. Beside another hint it says what was quantized, or computes.
_PLAIN_HINTS = ("bf16", "fp16", "fp32")
#: Weights that were quantized, or trained for it, and are not any more.
_AGAIN_PLAIN = ("unquantized", "dequantized", "dequant", "qat", *_PLAIN_HINTS)


def check_hint(name: str, checkpoint: Checkpoint) -> None:
    """Raise ConfigError if the folder's name says another quantization than its files.

    Only for `auto`: who writes a name in the job has said what the files are.
    """
    words = re.sub(r"fp8[-_.]?kv|kv[-_.]?fp8", "", name.lower())  # says how the cache is kept
    words = re.sub(r"(?<![a-z0-9])([48])[-_.]?bits?(?![a-z0-9])", r"\1bit", words)
    found = re.split(r"[^a-z0-9]+", words)
    hints = [word for word in found if word in _HINTS]
    if checkpoint.scheme not in SCHEMES:
        wrong = [hint for hint in hints if hint in _FORMAT_HINTS]
        remedy = "rename the folder to run it as it is"
    else:
        wrong = [hint for hint in hints if checkpoint.scheme not in _HINTS[hint]]
        if checkpoint.scheme == "plain" and any(word in _AGAIN_PLAIN for word in found):
            wrong = []
        if not hints and checkpoint.scheme != "plain":
            wrong = [word for word in found if word in _PLAIN_HINTS]
        remedy = f"write model.quantization: {name_of(checkpoint.scheme)} to run it as it is"
    if wrong:
        raise ConfigError(
            f"the model's name {name} says {wrong[0]}, but its files are {checkpoint.words}: give "
            f"the checkpoint that was meant, or {remedy}"
        )
