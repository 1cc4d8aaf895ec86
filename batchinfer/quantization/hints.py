"""What a folder's name says of its files: a hint that they must bear out.

Only what is certain is refused. Must not know: files, machines.
"""

from __future__ import annotations

import re

from batchinfer.errors import ConfigError
from batchinfer.quantization.detect import Checkpoint
from batchinfer.quantization.methods import METHODS
from batchinfer.quantization.table import SCHEMES, name_of

#: Word in a folder's name -> what its files can then be, as any method says.
_HINTS: dict[str, set[str]] = {}
for _method in METHODS:
    for _word, _schemes in _method.hints.items():
        _HINTS.setdefault(_word, set()).update(_schemes)

#: Those that name a format of files. Others say how weights were rounded, and to what, which
#: families that only an engine knows do as well (there are torchao checkpoints called AWQ-INT4).
_FORMAT_HINTS = frozenset(word for method in METHODS for word in method.format_hints)

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
