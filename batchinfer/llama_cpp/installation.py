"""Whether llama.cpp can be loaded here, found without loading it.

Must not know: how it is called.
"""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec

from batchinfer.native import cpu_flags

#: The distribution that brings it, prebuilt.
PACKAGE = "xllamacpp"
#: Those whose structures `library` describes: llama.cpp promises no others that they are the same.
VERSIONS = ("2026.10.11549",)
#: What the wheels were compiled for. Without them the first matrix ends the process (SIGILL).
CPU_FLAGS = ("avx2", "fma", "f16c", "bmi2")

_INSTALL = f"pip install 'batchinfer[llama]', or {PACKAGE}=={VERSIONS[-1]}"


def installed_version() -> str | None:
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


def installation_fault() -> str | None:
    """What is wrong whatever the job says, in words. None: nothing, as far as can be seen."""
    version = installed_version()
    if version is None or find_spec(PACKAGE) is None:
        return f"llama.cpp is not installed (package {PACKAGE}): {_INSTALL}"
    if version not in VERSIONS:
        return (
            f"{PACKAGE} {version} is installed, and this version of batchinfer knows the library "
            f"of {' and '.join(VERSIONS)} alone: {_INSTALL}"
        )
    if missing := [flag for flag in CPU_FLAGS if flag not in cpu_flags()]:
        return (
            f"{PACKAGE}'s llama.cpp needs a CPU with {', '.join(CPU_FLAGS)}, and this one lacks "
            f"{', '.join(missing)}: run the job elsewhere"
        )
    return None
