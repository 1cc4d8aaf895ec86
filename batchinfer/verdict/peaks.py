"""What a device can do at most: products of dense matrices, and bytes from its memory.

Must not know: models, engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

#: What the numbers of a product are kept in.
Precision = Literal["float32", "16 bit", "fp8", "int8"]


@dataclass(frozen=True, slots=True)
class Peaks:
    """Of one device. A precision that is missing is unknown, or the device has it not."""

    flops_per_s: Mapping[Precision, float]
    bytes_per_s: float
    source: Literal["table", "measured"]

    def times(self, num_devices: int) -> Peaks:
        """Of several that share a model, without what they tell each other."""
        flops = {name: num_devices * peak for name, peak in self.flops_per_s.items()}
        return Peaks(flops, num_devices * self.bytes_per_s, self.source)


def _card(sixteen: float, fp8: float | None, int8: float, float32: float, gb: float) -> Peaks:
    """In TFLOP/s and GB/s."""
    flops: dict[Precision, float] = {"float32": float32, "16 bit": sixteen, "int8": int8}
    if fp8 is not None:
        flops["fp8"] = fp8
    return Peaks({name: 1e12 * peak for name, peak in flops.items()}, 1e9 * gb, "table")


#: By the name that the driver has for the card. Dense, so half of what datasheets give "with
#: sparsity", and accumulated in 32 bits. From NVIDIA's datasheets, each for its card: "H100 Tensor
#: Core GPU" (SXM; PCIe by its own product brief), "H200 Tensor Core GPU", "A100 Tensor Core GPU",
#: "L4 Tensor Core GPU", "L40S GPU"; RTX 4090: "NVIDIA Ada GPU Architecture" white paper, appendix.
#: Variants with another name (NVL, 4090 D, MIG slices) are other cards.
CARDS: Mapping[str, Peaks] = {
    "NVIDIA H100 80GB HBM3": _card(989.4, 1978.9, 1978.9, 66.9, 3350),
    "NVIDIA H100 PCIe": _card(756, 1513, 1513, 51, 2000),
    "NVIDIA H200": _card(989.4, 1978.9, 1978.9, 66.9, 4800),
    "NVIDIA A100-SXM4-40GB": _card(312, None, 624, 19.5, 1555),
    "NVIDIA A100-SXM4-80GB": _card(312, None, 624, 19.5, 2039),
    "NVIDIA A100-PCIE-40GB": _card(312, None, 624, 19.5, 1555),
    "NVIDIA A100 80GB PCIe": _card(312, None, 624, 19.5, 1935),
    "NVIDIA L4": _card(121, 242.5, 242.5, 30.3, 300),
    "NVIDIA L40S": _card(362, 733, 733, 91.6, 864),
    "NVIDIA GeForce RTX 4090": _card(165.2, 330.3, 660.6, 82.6, 1008),
}


def peaks_of_card(name: str) -> Peaks | None:
    """None for a card that the table does not have."""
    return CARDS.get(name)
