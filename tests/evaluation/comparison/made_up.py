"""Records that nobody measured, for tests of tables and plots."""

from __future__ import annotations

from typing import Any

from batchinfer.evaluation.record import Record

#: format -> (bits per weight, how much worse it is)
FORMATS = {
    "bf16": (16.0, 0.0),
    "int8": (8.03, 0.002),
    "fp8": (8.0, 0.006),
    "int4": (4.125, 0.084),
    "awq": (4.156, 0.042),
    "gptq": (4.156, 0.046),
    "nf4": (4.5, 0.06),
    "nvfp4": (4.5, 0.07),
    "mxfp4": (4.25, 0.14),
}


def record(label: str = "a", family: str = "f", **fields: Any) -> Record:
    measured: dict[str, Any] = {
        "model": "m",
        "quantization": "none",
        "dtype": "float32",
        "data": "wikitext2",
        "context": 512,
        "stride": 256,
        "windows": 20,
        "tokens": 5_375,
        "nll": 1.8,
        "perplexity": 6.0,
        "perplexity_low": 5.9,
        "perplexity_high": 6.1,
        "bits_per_byte": 0.7,
        "layer_bits_per_weight": 16.0,
        "head_bits_per_weight": 16.0,
        "model_bytes": 14_000_000,
        "tokens_per_s": 12_345.6,
        "data_digest": "d",
        "batchinfer_version": "0.1.0",
    }
    return Record(label=label, family=family, **(measured | fields))


def failed(label: str = "b", family: str = "f", error: str = "it broke") -> Record:
    return Record(label=label, family=family, model="m", error=error, batchinfer_version="0.1.0")


def many(num_families: int = 3) -> list[Record]:
    """A plausible comparison of large models: nine formats of each."""
    return [
        record(
            f"model-{n} {name}",
            f"model-{n}",
            perplexity=(6.2 + 3 * n) * (1 + worse / 2),
            layer_bits_per_weight=bits,
            model_bytes=int((8e9 + n * 1e8) * bits / 8),
            tokens_per_s=(8000 - 500 * n) * (1 + 16 / bits),
            kl=worse,
            kl_top_k=64,
            top1_agreement=1 - worse,
            reference=f"model-{n} bf16",
        )
        for n in range(num_families)
        for name, (bits, worse) in FORMATS.items()
    ]
