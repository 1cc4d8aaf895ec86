"""AWQ: 4-bit integers in groups, as AutoAWQ writes them."""

from __future__ import annotations

from batchinfer.quantization.methods.base import Method, Quantization, Settings, Stored
from batchinfer.quantization.methods.packed_int32 import PARTS, check_layout, count_packed


def _scheme_of(family: str, settings: Settings) -> str:
    num_bits = settings.get("bits") or settings["w_bit"]
    return "awq" if num_bits == 4 else f"{num_bits} bits"


def _check_stored(stored: Stored) -> None:
    check_layout(stored, "AWQ", 4)


METHOD = Method(
    name="awq",
    schemes={"awq": "AWQ"},
    names=(
        Quantization(
            name="awq",
            meaning="a checkpoint in AWQ's own format (4 bits)",
            bits_per_weight=4.156,
            schemes=("awq",),
            how_to_make="AutoAWQ (`batchinfer quantize --method awq` writes an int4 checkpoint)",
        ),
    ),
    families=("awq", "awq_marlin", "auto_awq"),
    weight_parts=PARTS,
    scheme_of=_scheme_of,
    number_keys=("bits", "w_bit", "group_size", "q_group_size", "desc_act", "sym"),
    check_stored=_check_stored,
    count_weights=count_packed,
    # AWQ and GPTQ are also ways by which compressed-tensors checkpoints are made.
    hints={word: ("awq",) for word in ("awq", "int4", "4bit", "w4a16")},
)
