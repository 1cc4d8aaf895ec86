"""From the name asked for, the checkpoint and the machine to what will run, or why not.

Must not know: files, engines. Invariant: nothing is replaced in silence. A fallback is taken only
if the job lists it, and never for a name that contradicts the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from batchinfer.errors import RESTART, ConfigError
from batchinfer.quantization.detect import Checkpoint
from batchinfer.quantization.dtypes import Begun, auto_dtype, lacks_arithmetic
from batchinfer.quantization.machine import Machine
from batchinfer.quantization.methods.base import Quantization
from batchinfer.quantization.support import BFLOAT16_CAPABILITY, DeviceSupport, support_of
from batchinfer.quantization.table import RECIPES, SCHEMES, TABLE, name_of, record_of
from batchinfer.quantization.words import WEIGHT_ONLY, dotted, made_once

_DEVICE_NAMES = {"cpu": "a CPU", "cuda": "a GPU"}


@dataclass(frozen=True, slots=True)
class Choice:
    """What will run."""

    name: str  # of the table, or a family that only the engine knows; "none" for fp32 and such
    engine_quantization: str | None  # the engine's argument; None: as the checkpoint says
    dtype: str
    made_by: str | None = None  # the method by which the checkpoint has to be made first
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def choose(
    asked: str,
    checkpoint: Checkpoint,
    machine: Machine,
    *,
    dtype: str,
    is_dtype_asked: bool,
    fallback: Sequence[str] = (),
    begun: Begun | None = None,
) -> Choice:
    """What runs for `model.quantization: asked`. Raises ConfigError.

    `dtype` is what the model would be computed in; unless asked for, it gives way to one that the
    quantization can be computed in. `begun`: what the output has. If it is among what the job
    allows, it is that or nothing; else the output is another job's, and this says nothing of it.
    """
    if begun is not None and is_dtype_asked and dtype != begun.dtype:
        begun = None
    if asked == "auto" and checkpoint.scheme not in SCHEMES:
        note = f"the checkpoint is {checkpoint.words}, which is left to {support_of(machine).title}"
        if begun is not None and begun.quantization == checkpoint.scheme:
            dtype = begun.dtype
        return Choice(checkpoint.scheme, None, dtype, notes=(note,))
    name = name_of(checkpoint.scheme) if asked == "auto" else asked
    asked_dtype = dtype if is_dtype_asked else None
    _refuse_contradiction(name, checkpoint, machine, asked_dtype)
    if begun is not None:
        for allowed in (name, *fallback):
            if _is_what_was_begun(allowed, begun) and _is_meant(allowed, checkpoint):
                return _as_begun(allowed, name, checkpoint, machine, begun)
    reason = why_not(name, checkpoint, machine, asked_dtype)
    if reason is None:
        return _choice(name, checkpoint, machine, dtype)
    for other in fallback:
        own_dtype = record_of(other).dtype
        if can_run(other, checkpoint, machine, asked_dtype or own_dtype):
            found = _choice(other, checkpoint, machine, own_dtype or dtype)
            warning = f"quantization {other} is used instead of {name}: {reason}"
            return replace(found, warnings=(warning,))
    what = name if asked == name else f"{asked} ({name})"
    tried = f" (nor can {', '.join(fallback)})" if fallback else ""
    raise ConfigError(
        f"model.quantization {what} cannot run here: {reason}{tried}. "
        f"{_what_instead(checkpoint, machine, asked_dtype)}"
    )


def can_run(name: str, checkpoint: Checkpoint, machine: Machine, dtype: str | None) -> bool:
    """Whether the job could ask for `name` instead. `dtype` as in `why_not`."""
    return _is_meant(name, checkpoint) and why_not(name, checkpoint, machine, dtype) is None


def why_not(name: str, checkpoint: Checkpoint, machine: Machine, dtype: str | None) -> str | None:
    """Why this machine cannot run the checkpoint as `name`; None if it can.

    `dtype` is the one asked for, None if it may be chosen.
    """
    record = record_of(name)
    device = record.on(machine)
    scheme = checkpoint.scheme
    if isinstance(device, str):
        return device
    if machine.device is None:
        return None  # found out where it runs
    if checkpoint.has_experts and (reason := _refused_experts(device, machine)):
        return f"the model has experts, and {reason}"
    if scheme in device.refused:
        return f"{SCHEMES[scheme]} does not run on {_where(machine)}: {device.refused[scheme]}"
    if checkpoint.has_act_order and device.refused_act_order:
        return (
            "the checkpoint has GPTQ's activation order (desc_act, actorder: group), and on "
            f"{_where(machine)} {device.refused_act_order}"
        )
    is_made = bool(device.online or device.made_by)
    if scheme == "plain" and scheme not in device.schemes and not is_made:
        return f"the model is unquantized, and it needs a checkpoint ({record.how_to_make})"
    if lacks := _lacks(device, machine, scheme):
        return f"it {lacks}"
    if dtype is not None and dtype in device.refused_dtypes:
        return (
            f"dtype {dtype} {device.refused_dtypes[dtype]} on {_where(machine)}; it is computed in "
            f"{' or '.join(device.dtypes)}"
        )
    dtypes = _dtypes(device, machine)
    if dtype is not None and dtype not in dtypes:
        reason = f"it is not computed in {dtype}, but in {' or '.join(dtypes)}"
        if dtype in device.dtypes:
            reason += f": {dtype} needs compute capability {dotted(BFLOAT16_CAPABILITY)}"
        return reason
    return None


def for_this_machine(record: Quantization, machine: Machine) -> tuple[bool, str]:
    """Whether a name can run here with its usual checkpoint, and how, or what is missing.

    For people.
    """
    device = record.on(machine)
    if isinstance(device, str):
        return False, device
    if lacks := _lacks(device, machine, device.schemes[0]):
        return False, lacks
    ways = []
    if device.online:
        engine = support_of(machine).title
        ways.append(f'any model, on the fly ({engine}\'s "{device.online}")')
    if device.made_by:
        ways.append(made_once(device.made_by))
    if checkpoints := [SCHEMES[scheme] for scheme in device.schemes if scheme != "plain"]:
        types = f" ({', '.join(record.types)})" if record.types else ""
        ways.append(f"checkpoints: {', '.join(checkpoints)}{types}")
    if _is_weight_only(device, machine):
        ways.append(f"{WEIGHT_ONLY}; native from {dotted(device.native_capability or (0, 0))}")
    return True, "; ".join(ways) or record.meaning


def describe_auto_dtype(machine: Machine) -> str:
    """For people: what `model.dtype: auto` takes here for unquantized models, and why."""
    if isinstance(record_of("none").on(machine), str):  # an engine of one format
        return "auto takes the types that a checkpoint is stored in"
    owns: dict[str, list[str]] = {}
    lacking = []
    for own in ("bfloat16", "float16", "float32"):
        dtype, _ = auto_dtype(own, machine)
        plain = Checkpoint("plain", SCHEMES["plain"])
        taken = choose("none", plain, machine, dtype=dtype, is_dtype_asked=False).dtype
        owns.setdefault(taken, []).append(own)
        lacking += [reason] if (reason := lacks_arithmetic(own, machine)) else []
    words = [f"{taken} for models in {' and '.join(own)}" for taken, own in owns.items()]
    return f"auto takes {', '.join(words)}{''.join(f'; {reason}' for reason in lacking)}"


def _is_meant(name: str, checkpoint: Checkpoint) -> bool:
    """Whether the name can stand for such a checkpoint, on whatever machine."""
    record = record_of(name)
    return checkpoint.scheme in record.schemes or (
        checkpoint.scheme == "plain" and record.takes_plain
    )


def _is_what_was_begun(name: str, begun: Begun) -> bool:
    own_dtype = record_of(name).dtype
    if own_dtype is not None:
        return begun == Begun(own_dtype, "none")
    return name == begun.quantization


def _as_begun(
    allowed: str, name: str, checkpoint: Checkpoint, machine: Machine, begun: Begun
) -> Choice:
    """What the output has, by its name in the job. `name`: the first that the job asks for."""
    if reason := why_not(allowed, checkpoint, machine, begun.dtype):
        raise ConfigError(
            f"the output was begun in {begun}, which cannot run here: {reason}. Continue "
            f"where it can, or take another output.path; {RESTART} deletes its results"
        )
    found = _choice(allowed, checkpoint, machine, begun.dtype)
    if allowed == name:
        return found
    warning = f"quantization {allowed} is used instead of {name}: the output was begun with it"
    return replace(found, warnings=(warning,))


def _choice(name: str, checkpoint: Checkpoint, machine: Machine, dtype: str) -> Choice:
    device = record_of(name).on(machine)
    assert isinstance(device, DeviceSupport)
    notes = []
    dtypes = _dtypes(device, machine)
    if machine.device is not None and dtype not in dtypes:
        other = checkpoint.dtype if checkpoint.dtype in dtypes else dtypes[0]
        notes.append(f"quantization {name} is computed in {other} here, and not in {dtype}")
        dtype = other
    becomes_another = checkpoint.scheme == "plain" and checkpoint.scheme not in device.schemes
    made_by = device.made_by if becomes_another and not device.online else None
    if made_by:
        notes.append(
            f"the model is unquantized: its {name} checkpoint ({RECIPES[made_by].result}) is made "
            "once, and then found"
        )
    elif _is_weight_only(device, machine):
        assert device.native_capability is not None and machine.compute_capability is not None
        notes.append(
            f"{name}: {WEIGHT_ONLY}, as this GPU's compute capability is "
            f"{dotted(machine.compute_capability)} and not {dotted(device.native_capability)}"
        )
    online = device.online
    if device.online_otherwise and (checkpoint.has_experts or _is_weight_only(device, machine)):
        online = device.online_otherwise
    return Choice(
        name="none" if record_of(name).dtype else name,
        engine_quantization=online if becomes_another else device.checkpoints_as,
        dtype=dtype,
        made_by=made_by,
        notes=tuple(notes),
    )


def _refuse_contradiction(
    name: str, checkpoint: Checkpoint, machine: Machine, dtype: str | None
) -> None:
    """A name of another family than the checkpoint's; an unquantized model may become quantized."""
    record = record_of(name)
    if checkpoint.scheme in record.schemes:
        return
    if checkpoint.scheme == "plain" and (record.takes_plain or isinstance(record.on(machine), str)):
        return
    what = f"model.quantization is {name}, but the checkpoint is {checkpoint.words}"
    if checkpoint.scheme not in SCHEMES:
        raise ConfigError(f"{what}: write auto, or give another checkpoint")
    own = name_of(checkpoint.scheme)
    if reason := why_not(own, checkpoint, machine, dtype):
        instead = _what_instead(checkpoint, machine, dtype)
        raise ConfigError(f"{what}, which cannot run here: {reason}. {instead}")
    advice = f"write {own} or auto, or give another checkpoint"
    if own == "none":
        advice = "write none"
        if _any_scheme_runs(record, checkpoint, machine, dtype):
            advice = f"give a checkpoint in that format ({record.how_to_make}), or write none"
    raise ConfigError(f"{what}: {advice}")


def _lacks(device: DeviceSupport, machine: Machine, scheme: str) -> str:
    """What the machine lacks, in words; "" if nothing, or if nothing is known of it."""
    if machine.device is None:
        return ""
    if flags := [flag for flag in device.cpu_flags if flag not in machine.cpu_flags]:
        return f"needs a CPU with {' and '.join(flags)}, which this one lacks"
    if lacks := _lacks_kernel(device.kernels.get(scheme, ""), machine):
        return lacks
    capability = machine.compute_capability
    if device.min_capability and capability and capability < device.min_capability:
        return (
            f"needs a GPU of compute capability {dotted(device.min_capability)}, this one has "
            f"{dotted(capability)}"
        )
    if missing := [package for package in device.packages if package not in machine.packages]:
        return f"needs the package {missing[0]}, which is not installed"
    return ""


def _lacks_kernel(kernel: str, machine: Machine) -> str:
    """In words, that the engine's library for this CPU has no such kernel; "" if it has, or may."""
    library = machine.library
    if library is None or library.kernels is None or not kernel or kernel in library.kernels:
        return ""
    return (
        f"needs the kernel {kernel}, which {support_of(machine).title}'s library for this CPU "
        f"lacks ({library.file}, for {library.instructions})"
    )


def _dtypes(device: DeviceSupport, machine: Machine) -> tuple[str, ...]:
    """Those that this very machine computes in, the first being taken where it may be chosen."""
    capability = machine.compute_capability
    if machine.device != "cuda" or not capability or capability >= BFLOAT16_CAPABILITY:
        return device.dtypes
    return tuple(dtype for dtype in device.dtypes if dtype != "bfloat16")


def _refused_experts(device: DeviceSupport, machine: Machine) -> str:
    lacks = [flag for flag in device.expert_cpu_flags if flag not in machine.cpu_flags]
    if lacks:
        engine = support_of(machine).title
        return f"{engine}'s CPU kernels for them need {' and '.join(lacks)}, which this CPU lacks"
    return device.refused_experts


def _is_weight_only(device: DeviceSupport, machine: Machine) -> bool:
    capability, native = machine.compute_capability, device.native_capability
    return machine.device == "cuda" and bool(capability and native and capability < native)


def _where(machine: Machine) -> str:
    return _DEVICE_NAMES[machine.device or "cuda"]


def _what_instead(checkpoint: Checkpoint, machine: Machine, dtype: str | None) -> str:
    """What the job can say instead, for this model or another. `dtype`: the one asked for, if any.

    Every name in it is one that `choose` takes there.
    """
    records = [record for record in TABLE if not record.dtype]
    for tried, start in ((dtype, "This"), (None, "With model.dtype: auto this")):
        names = [r.name for r in records if can_run(r.name, checkpoint, machine, tried)]
        if names:
            return f"{start} model can run as {' or '.join(names)}"
    for tried, also in ((dtype, ""), (None, " and model.dtype: auto")):
        names = [r.name for r in records if _any_scheme_runs(r, checkpoint, machine, tried)]
        if names:
            named = " or ".join(name for name in names if name != "none")
            ways = ["the unquantized model"] if "none" in names else []
            ways += [f"a checkpoint for {named}"] if named else []
            return (
                f"With model.quantization: auto{also} give {' or '.join(ways)} "
                "(see `batchinfer doctor`)"
            )
    return "No checkpoint of this model can run here (see `batchinfer doctor`)"


def _any_scheme_runs(
    record: Quantization, checkpoint: Checkpoint, machine: Machine, dtype: str | None
) -> bool:
    """Whether some checkpoint of the same model, of this name, can run here."""
    return any(
        why_not(
            record.name, replace(checkpoint, scheme=scheme, has_act_order=False), machine, dtype
        )
        is None
        for scheme in record.schemes
    )
