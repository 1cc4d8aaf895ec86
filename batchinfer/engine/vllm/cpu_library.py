"""Which of vLLM's CPU libraries this machine loads, and the kernels it has, without loading it.

vLLM's CPU build has one shared library for each level of instruction sets, and each registers
operators of its own: what a CPU can run is what its library has. torch takes seconds to import and
vLLM more, so the operators' schemas are read where the library keeps them, in the constants of its
file; a test compares them with what torch has registered once the library is loaded. Must not know:
what needs a kernel, torch, vLLM.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Set
from importlib.util import find_spec
from pathlib import Path

from batchinfer.quantization import CpuLibrary

#: Of ELF files of 64 bits: where the header says where the table of sections is, and its rows.
_ELF_HEADER = struct.Struct("<40xQ10xHHH")
_ELF_SECTION = struct.Struct("<I20xQQ")
#: What stands between arguments and results in the schema of an operator.
_RESULT = b") -> "


def cpu_library(flags: Set[str]) -> CpuLibrary | None:
    """The library for a CPU with these instruction sets, chosen as vLLM does; None if not there.

    vLLM 0.32, `CpuPlatform.import_kernels`. It asks torch, which asks the CPU as the kernel does,
    and no environment variable.
    """
    name, instructions = "_C", "AVX-512 with bfloat16"
    if platform.machine() != "x86_64":
        instructions = platform.machine()
    elif "avx512f" not in flags:
        name, instructions = "_C_AVX2", "AVX2"
    elif "avx512_bf16" not in flags:
        name, instructions = "_C_AVX512", "AVX-512"
    vllm = find_spec("vllm")
    folders = vllm.submodule_search_locations if vllm is not None else None
    for folder in folders or ():
        for file in sorted(Path(folder).glob(f"{name}.*so")):
            return CpuLibrary(file.name, instructions, registered_operators(file))
    return None


def loaded_cpu_library() -> str | None:
    """The file name of the library that is mapped into this process; None before vLLM maps one."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        file = Path(line.rpartition(" ")[2])
        if file.parent.name == "vllm" and file.name.startswith("_C") and file.suffix == ".so":
            return file.name
    return None


def registered_operators(file: Path) -> frozenset[str] | None:
    """Names of the torch operators that a shared library registers; None if it is unknown."""
    try:
        constants = _constants(file)
    except (OSError, ValueError, IndexError, struct.error):
        return None
    names = set()
    end = constants.find(_RESULT)
    while end >= 0:
        text = constants[constants.rfind(b"\0", 0, end) + 1 : end]
        names.add(text.partition(b"(")[0].decode("ascii", "replace"))
        end = constants.find(_RESULT, end + 1)
    return frozenset(name for name in names if name.isidentifier())


def _constants(file: Path) -> bytes:
    """The section of an ELF file that has its texts."""
    with file.open("rb") as opened:
        table_begin, row_bytes, num_rows, names_row = _ELF_HEADER.unpack(
            opened.read(_ELF_HEADER.size)
        )
        opened.seek(table_begin)
        table = opened.read(row_bytes * num_rows)
        rows = [_ELF_SECTION.unpack_from(table, row_bytes * i) for i in range(num_rows)]
        _, begin, size = rows[names_row]
        opened.seek(begin)
        names = opened.read(size)
        for name, begin, size in rows:
            if names[name : names.index(b"\0", name)] == b".rodata":
                opened.seek(begin)
                return opened.read(size)
    raise ValueError(f"{file} has no .rodata")
