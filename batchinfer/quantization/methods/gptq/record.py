"""GPTQ: 4- and 8-bit integers in groups, as GPTQModel writes them."""

from __future__ import annotations

from batchinfer.quantization.methods.base import Method, Quantization, Settings, Stored
from batchinfer.quantization.methods.packed_int32 import PARTS, check_layout, count_packed

_BITS = {"gptq": 4, "gptq-8bit": 8}


def _scheme_of(family: str, settings: Settings) -> str:
    num_bits, is_symmetric = settings["bits"], settings.get("sym", True)
    if num_bits not in (4, 8) or not is_symmetric:
        return f"{num_bits} bits{'' if is_symmetric else ', asymmetric'}"
    return "gptq" if num_bits == 4 else "gptq-8bit"


def _has_act_order(settings: Settings) -> bool:
    return bool(settings.get("desc_act")) and settings.get("group_size") != -1


def _check_stored(stored: Stored) -> None:
    check_layout(stored, "GPTQ", _BITS[stored.scheme])


METHOD = Method(
    name="gptq",
    schemes={"gptq": "GPTQ, 4 bits", "gptq-8bit": "GPTQ, 8 bits"},
    names=(
        Quantization(
            name="gptq",
            meaning="a checkpoint in GPTQ's own format (4 or 8 bits)",
            bits_per_weight=4.156,
            schemes=("gptq", "gptq-8bit"),
            how_to_make="GPTQModel (`batchinfer quantize --method gptq` writes an int4 checkpoint)",
        ),
    ),
    families=("gptq", "gptq_marlin", "auto_gptq"),
    unread_files={"quantize_config.json": "gptq"},
    weight_parts=PARTS,
    scheme_of=_scheme_of,
    has_act_order=_has_act_order,
    number_keys=("bits", "w_bit", "group_size", "q_group_size", "desc_act", "sym"),
    check_stored=_check_stored,
    count_weights=count_packed,
    hints={
        "gptq": ("gptq", "gptq-8bit"),
        "int4": ("gptq",),
        "4bit": ("gptq",),
        "w4a16": ("gptq",),
        "int8": ("gptq-8bit",),
        "8bit": ("gptq-8bit",),
        "w8a16": ("gptq-8bit",),
    },
)
