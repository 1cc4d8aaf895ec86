"""The compiler of this machine that vLLM's own compilers call, looked for where they look.

On a CPU torch's inductor writes C++ once `enforce_eager` is false; on a GPU triton builds a module
in C before its first kernel, and every start of vLLM runs some. Must not know: torch, vLLM.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.quantization import Machine
from batchinfer.storage import local_path


def find_compiler(machine: Machine) -> str | None:
    """The C++ compiler for a CPU, the C compiler for a GPU; None without one."""
    if machine.device == "cuda":
        named = os.environ.get("CC")
        return shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
    return shutil.which(os.environ.get("CXX", "g++"))


def check_compiler(options: Mapping[str, Any], machine: Machine) -> None:
    """Raise ConfigError if one is needed and missing. `options`: the job's engine.options."""
    if machine.device is None or find_compiler(machine) is not None:
        return
    if machine.device == "cuda":
        if not _has_built():
            raise ConfigError(
                "no C compiler is found, and triton needs one on a GPU: install gcc or clang, or "
                "set CC to one"
            )
        return
    # Other settings of compilation may leave the compiler out; conda may install one.
    is_compiled = options.get("enforce_eager") is False and not options.get("compilation_config")
    if is_compiled and not os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):
        raise ConfigError(
            "engine.options.enforce_eager: false compiles the model, and no C++ compiler is found: "
            "install g++, set CXX to another one, or leave the option out"
        )


def _has_built() -> bool:
    """Whether triton keeps what it built earlier, perhaps all that it needs."""
    try:
        home = local_path(os.environ.get("TRITON_HOME") or "~")
    except ConfigError:
        return False
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    return folder.is_dir() and any(folder.iterdir())
