"""The records in words: the table of the docs, and what doctor and messages are made of.

Must not know: which machine this is.
"""

from __future__ import annotations

from batchinfer.quantization.machine import Machine
from batchinfer.quantization.support import DeviceSupport, support_of
from batchinfer.quantization.table import RECIPES, SCHEMES, TABLE

WEIGHT_ONLY = "only the weights are quantized (Marlin)"


def markdown_table(engine: str) -> str:
    """The table in docs/quantization.md: what runs on this engine."""
    machines = (Machine("cpu", engine=engine), Machine("cuda", engine=engine))
    lines = [
        "| name | what it is | bits | on a CPU | on a GPU | how to make a checkpoint |",
        "|---|---|---|---|---|---|",
    ]
    for record in TABLE:
        cells = (
            f"`{record.name}`",
            record.meaning,
            f"{record.bits_per_weight:g}",
            *(_cell(record.on(m), support_of(m).title) for m in machines),
            record.how_to_make,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(device: DeviceSupport | str, engine: str) -> str:
    if isinstance(device, str):
        return f"no: {device}"
    parts = []
    checkpoints = [SCHEMES[scheme] for scheme in device.schemes if scheme != "plain"]
    if device.online:
        parts.append(f'on the fly ({engine}\'s "{device.online}")')
    if device.made_by:
        parts.append(made_once(device.made_by))
    if checkpoints:
        parts.append(f"checkpoints: {', '.join(checkpoints)}")
    if needs := _needs(device, engine):
        parts.append(f"needs {needs}")
    if device.native_capability:
        parts.append(f"below {dotted(device.native_capability)} {WEIGHT_ONLY}")
    parts += [f"not {SCHEMES[scheme]} ({why})" for scheme, why in device.refused.items()]
    parts += [f"{dtype} {why}" for dtype, why in device.refused_dtypes.items()]
    return "; ".join(parts) or "yes"


def made_once(method: str) -> str:
    """What an unquantized model becomes, in words."""
    return f"any unquantized model, rounded to nearest once ({RECIPES[method].result}) and kept"


def _needs(device: DeviceSupport, engine: str) -> str:
    """What has to be there, in words; "" if nothing has to."""
    needs = []
    if device.min_capability:
        needs.append(f"compute capability {dotted(device.min_capability)}")
    if device.cpu_flags:
        needs.append(f"a CPU with {' and '.join(device.cpu_flags)}")
    if device.kernels:
        needs.append(f"{engine}'s kernel {' and '.join(sorted(set(device.kernels.values())))}")
    return ", ".join(needs)


def dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
