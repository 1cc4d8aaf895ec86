"""Our C++ and CUDA, and the CPU that they are compiled for.

Compiled when first used: no import and no installation needs a compiler. The sources are in
`kernels/` beside the package; an installed package has them as `kernels_src`. A library is named
after its sources and the flags, so that other ones make another library, and one that was compiled
elsewhere is taken where there is no compiler. Must not know: what is compiled.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_SOURCES = Path(__file__).parent / "kernels_src"

_DIGEST_BYTES = 32
#: Environment variable: a folder with libraries that were compiled elsewhere.
PREBUILT = "BATCHINFER_KERNELS"


class Tools(NamedTuple):
    """What compiles a language."""

    language: str
    variable: str  # of the environment: a program, perhaps with arguments, that is taken instead
    programs: tuple[str, ...]
    flags: tuple[str, ...]


CPP = Tools(
    "C++", "CXX", ("g++", "c++", "clang++"), ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")
)
CUDA = Tools(
    "CUDA",
    "NVCC",
    ("nvcc", "/usr/local/cuda/bin/nvcc"),
    ("-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-shared"),
)


class NotCompiled(Exception):
    """Says why: no compiler, or what it said. There is a slower way."""


def cpu_flags() -> frozenset[str]:
    """Instruction sets of the CPU, by the kernel's names; none where it writes none."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return frozenset(flags)


def instruction_flags(cpu_flags: frozenset[str]) -> tuple[str, ...]:
    """The compiler options for a CPU that has these flags in /proc/cpuinfo."""
    if "avx512f" in cpu_flags:
        return ("-mavx512f",)
    return ("-mavx2", "-mfma") if {"avx2", "fma"} <= cpu_flags else ()


def user_folder() -> Path:
    """Where libraries are kept between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "batchinfer" / "kernels"


def compiled(source: str, flags: Sequence[str], folder: Path, tools: Tools = CPP) -> Path:
    """The shared library of a source, such as cpu/viterbi.cpp, in `folder`. Seconds, once.

    Raises NotCompiled.
    """
    found = already_compiled(source, flags, folder, tools)
    if found is not None:
        return found
    compiler = _compiler(tools)
    if compiler is None:
        raise NotCompiled(_no_compiler(tools))
    library = folder / _name(source, flags, tools)
    temporary = folder / f".{library.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # a linker does not say why it cannot
        command = [*compiler, *tools.flags, *flags, str(_SOURCES / source), "-o", str(temporary)]
        _call(command)
        _seal(temporary)
        temporary.replace(library)
    except OSError as error:
        raise NotCompiled(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):  # there is none, or nothing that it could be in
            temporary.unlink()
    return library


def already_compiled(
    source: str, flags: Sequence[str], folder: Path, tools: Tools = CPP
) -> Path | None:
    """The same if nothing is left to do."""
    prebuilt = os.environ.get(PREBUILT)
    folders = [Path(prebuilt), folder] if prebuilt else [folder]
    files = [found / _name(source, flags, tools) for found in folders]
    return next(filter(_is_whole, files), None)


def why_none(source: str, flags: Sequence[str], folder: Path, tools: Tools = CPP) -> str | None:
    """Why `compiled` would fail, as far as can be seen in no time; None if it should not."""
    if already_compiled(source, flags, folder, tools) is not None or _compiler(tools) is not None:
        return None
    return _no_compiler(tools)


def _seal(library: Path) -> None:
    """Write its digest behind it, where no loader looks, and have both on the disk.

    A library that was cut off would end the process in the middle of a call.
    """
    with library.open("r+b") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def _is_whole(library: Path) -> bool:
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _compiler(tools: Tools) -> list[str] | None:
    """A command's first words ("ccache g++"); None if none is there.

    One that the variable names is never replaced: another one was not asked for.
    """
    named = _named(tools)
    commands = [named] if named else [[program] for program in tools.programs]
    return next((words for words in commands if shutil.which(words[0])), None)


def _named(tools: Tools) -> list[str]:
    value = os.environ.get(tools.variable, "")
    try:
        return shlex.split(value)
    except ValueError:  # a quote without its end
        return [value]


def _no_compiler(tools: Tools) -> str:
    named = _named(tools)
    which = (
        f" {named[0]!r}, which {tools.variable} names,"
        if named
        else f" ({', '.join(tools.programs)}, or {tools.variable}),"
    )
    return (
        f"there is no {tools.language} compiler{which} and no library of this version in {PREBUILT}"
    )


def _name(source: str, flags: Sequence[str], tools: Tools) -> str:
    """After all sources of its folder, as they include each other."""
    file = _SOURCES / source
    key = hashlib.sha256()
    for part in sorted(file.parent.iterdir()):
        if part.is_file():
            key.update(f"{part.name}\0{part.stat().st_size}\0".encode() + part.read_bytes())
    key.update("\0".join([*tools.flags, *flags]).encode())
    return f"{file.stem}-{key.hexdigest()[:20]}.so"


def _call(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotCompiled(f"{command[0]} does not start: {error.strerror}") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if "error" in line.lower()]
        said = (lines or done.stderr.strip().splitlines() or ["no message"])[0]
        raise NotCompiled(f"{command[0]} fails: {said[:200]}")
    return done.stdout
