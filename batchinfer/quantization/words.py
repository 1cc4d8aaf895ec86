"""The records in words: the list in the docs, and what doctor and messages are made of.

Must not know: which machine this is.
"""

from __future__ import annotations

from textwrap import fill

from batchinfer.quantization.machine import Machine
from batchinfer.quantization.support import DeviceSupport, support_of
from batchinfer.quantization.table import RECIPES, SCHEMES, TABLE

WEIGHT_ONLY = "only the weights are quantized (Marlin)"


def markdown_list(engine: str) -> str:
    """The names in docs/quantization.md: what runs on this engine."""
    machines = (Machine("cpu", engine=engine), Machine("cuda", engine=engine))
    items = []
    for record in TABLE:
        cells = [_cell(record.on(m), support_of(m).title) for m in machines]
        what = f"`{record.name}`, {record.bits_per_weight:g} bits: {record.meaning}"
        items.append(markdown_item(f"{what}. Made by: {record.how_to_make}", *cells))
    return "\n".join(items)


def markdown_item(what: str, cpu: str, gpu: str) -> str:
    """An item of a list in the docs: what a name is, and what of it runs where."""
    if cpu == gpu:
        return _wrapped(f"- {what}. On a CPU and a GPU: {cpu}.")
    devices = (f"  - On a CPU: {cpu}.", f"  - On a GPU: {gpu}.")
    return "\n".join(map(_wrapped, (f"- {what}.", *devices)))


def _wrapped(item: str) -> str:
    """In lines as wide as the docs'."""
    indent = " " * (item.index("-") + 2)
    return fill(item, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


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
