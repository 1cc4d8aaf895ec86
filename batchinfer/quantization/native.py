"""Our C++, compiled when it is first used: no import and no installation needs a compiler.

The sources are in `kernels/` beside the package; an installed package has them as `kernels_src`. A
library is named after its source, the flags and the compiler, so that another of any of these makes
another one. Must not know: what is compiled, where libraries are kept.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

_SOURCES = Path(__file__).parents[1] / "kernels_src"
_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")


class NotCompiled(Exception):
    """Says why: no compiler, or what it said. There is a slower way."""


def instruction_flags(cpu_flags: frozenset[str]) -> tuple[str, ...]:
    """For the compiler, of a CPU with these flags of /proc/cpuinfo."""
    if "avx512f" in cpu_flags:
        return ("-mavx512f",)
    return ("-mavx2", "-mfma") if {"avx2", "fma"} <= cpu_flags else ()


def compiled(source: str, flags: Sequence[str], folder: Path) -> Path:
    """The shared library of a source, such as cpu/viterbi.cpp, in `folder`. Seconds, once.

    Raises NotCompiled.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise NotCompiled(f"there is no C++ compiler ({', '.join(_COMPILERS)}, or CXX)")
    file = _SOURCES / source
    command = [compiler, *_FLAGS, *flags]
    key = hashlib.sha256(file.read_bytes())
    key.update("\0".join([*command, _call([compiler, "--version"])]).encode())
    library = folder / f"{file.stem}-{key.hexdigest()[:20]}.so"
    if not library.exists():
        temporary = folder / f".{library.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _call([*command, str(file), "-o", str(temporary)])
            temporary.replace(library)
        except OSError as error:
            raise NotCompiled(f"{folder} cannot be written: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)
    return library


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
