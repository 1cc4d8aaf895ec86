"""What the engine for tests runs: models as they are, in any precision.

Must not know: machines.
"""

from __future__ import annotations

from collections.abc import Mapping

from batchinfer.quantization import ALL_DTYPES, DeviceSupport, Support

_PLAIN: Mapping[str, DeviceSupport | str] = {
    "none": DeviceSupport(("plain",), dtypes=ALL_DTYPES),
    "fp32": DeviceSupport(("plain",), dtypes=("float32",)),
    "fp16": DeviceSupport(("plain",), dtypes=("float16",)),
    "bf16": DeviceSupport(("plain",), dtypes=("bfloat16",)),
}
SUPPORT: Mapping[str, Support] = {
    "cpu": Support("the engine for tests", _PLAIN),
    "cuda": Support("the engine for tests", _PLAIN),
}
