"""What llama.cpp runs: GGUF files, as they are.

Must not know: its library, which machine this is.
"""

from __future__ import annotations

from collections.abc import Mapping

from batchinfer.quantization import ALL_DTYPES, KV_CACHE_TABLE, TABLE, DeviceSupport, Support

_NOT_GGUF = (
    "llama.cpp reads only GGUF files; `batchinfer quantize MODEL OUT.gguf --method gguf` makes one"
)
_NAMES: Mapping[str, DeviceSupport | str] = {
    **{record.name: _NOT_GGUF for record in TABLE},
    "gguf": DeviceSupport(("gguf",), dtypes=ALL_DTYPES),
}
_KV = {record.name: "llama.cpp has no such type" for record in KV_CACHE_TABLE}

SUPPORT: Mapping[str, Support] = {
    device: Support(
        "llama.cpp",
        _NAMES,
        _KV,
        lambda _: "llama.cpp takes adapters in GGUF, which this version does not load",
    )
    for device in ("cpu", "cuda")
}
