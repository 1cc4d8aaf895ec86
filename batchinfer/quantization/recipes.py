"""How an unquantized model becomes a quantized checkpoint: one record for each method.

`batchinfer quantize --method` knows these, and a job that names a quantization its model lacks has
its checkpoint made by one of them. Must not know: tensors, files, how anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from batchinfer.quantization.machine import Machine


@dataclass(frozen=True, slots=True)
class Recipe:
    """`preset`: the scheme of every linear layer, by compressed-tensors' name for it."""

    method: str
    meaning: str
    preset: str
    makes: str  # the name in `model.quantization` of what it makes
    modifier: str | None = None  # of llm-compressor; None: rounded to nearest, without calibration
    cpu_preset: str | None = None  # where the machine's engine is vLLM's CPU build
    revision: int = 1  # another one makes other numbers: what was made by this one is not taken

    def preset_on(self, machine: Machine) -> str:
        return self.cpu_preset if self.cpu_preset and machine.device == "cpu" else self.preset

    @property
    def result(self) -> str:
        """For people: what it makes, by compressed-tensors' name."""
        return f"{self.preset}{', weights only' if self.preset.endswith('A16') else ''}"

    @property
    def identity(self) -> str:
        """What decides the numbers, besides the model. Part of digests of jobs and caches."""
        return f"{self.method}: {self.preset} by {self.modifier or 'rounding'}, {self.revision}"


_ALL = (
    Recipe("int8", "8-bit integer weights and activations (W8A8)", "W8A8", "int8"),
    Recipe("int4", "4-bit integer weights in groups of 128 (W4A16)", "W4A16", "int4"),
    Recipe(
        "fp8",
        "8-bit float weights and activations: a scale for each channel, or on a machine with "
        "vLLM's CPU build for each block of 128 x 128",
        "FP8_DYNAMIC",
        "fp8",
        cpu_preset="FP8_BLOCK",
    ),
    Recipe(
        "nvfp4", "4-bit float weights in groups of 16, weights only (NVFP4A16)", "NVFP4A16", "fp4"
    ),
    Recipe(
        "mxfp4", "4-bit float weights in groups of 32, weights only (MXFP4A16)", "MXFP4A16", "fp4"
    ),
    Recipe("awq", "int4, its weights scaled by activations first", "W4A16", "int4", "AWQModifier"),
    Recipe(
        "gptq", "int4, each weight's error spread on later ones", "W4A16", "int4", "GPTQModifier"
    ),
)

#: By `--method`.
RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.method: recipe for recipe in _ALL})
